/** The sections `train` and `data` of a job. A run of Megatron counts in iterations or in samples; a job counts in steps. */
import type { MappedName } from "../arguments/spec.ts";
import { knownValue, type ScriptText, shownText } from "../bash/text.ts";
import type { Importing } from "./importing.ts";

/** Puts `train`. `data`: the data degree. */
export function putTrain({ args, job }: Importing, data: number): void {
  const microBatch = args.numberIfGiven("micro-batch-size");
  if (microBatch === undefined && !args.has("micro-batch-size"))
    job.reject("--micro-batch-size", "it is not given, and Megatron has no default", "give --micro-batch-size");
  job.put("train.micro_batch", microBatch ?? 1, ["micro-batch-size"]);
  const batch = args.numberIfGiven("global-batch-size") ?? (microBatch ?? 1) * data;
  job.put("train.global_batch", batch, ["global-batch-size"]);
  const length = putSteps({ args, job }, batch);
  const rampup = args.textsIfGiven("rampup-batch-size")?.map(Number);
  if (rampup) {
    const [start, increment, samples] = rampup;
    const remark = "later releases of Megatron read it no more, and keep the batch constant";
    job.put("train.batch_rampup", { start, increment, samples }, ["rampup-batch-size"], remark);
  }
  if (args.has("calculate-per-token-loss")) job.put("train.loss_weighting", "token", ["calculate-per-token-loss"]);
  putPrecision({ args, job });
  putStateTypes({ args, job });
  putRecompute({ args, job });
  job.put("train.seed", args.number("seed"), ["seed"]);
  job.put("train.init.std", args.number("init-method-std"), ["init-method-std"]);
  job.put("train.init.output_scaling", "depth", [], "Megatron's default");
  putOptimizer({ args, job });
  putRates({ args, job }, batch, length);
}

/** The length of a run, by the count that it uses. */
interface Length {
  readonly counts: "iterations" | "samples";
  readonly steps: number;
}

function putSteps({ args, job }: Importing, batch: number): Length {
  const iterations = args.numberIfGiven("train-iters");
  const samples = args.numberIfGiven("train-samples");
  if (iterations !== undefined && samples !== undefined)
    job.reject("--train-iters --train-samples", "a run counts in iterations or in samples", "leave out one of them");
  if (samples !== undefined) {
    job.put("train.steps", Math.floor(samples / batch), ["train-samples"], `${samples} / ${batch}`);
    return { counts: "samples", steps: samples / batch };
  }
  if (iterations === undefined && !args.has("train-iters"))
    job.reject("--train-iters", "neither it nor --train-samples is given", "give --train-iters");
  job.put("train.steps", iterations ?? 1, ["train-iters"]);
  return { counts: "iterations", steps: iterations ?? 1 };
}

function putPrecision({ args, job }: Importing): void {
  if (args.has("fp16") && args.has("bf16")) job.reject("--fp16 --bf16", "Megatron refuses them together", "leave out one of them");
  const precision = args.has("bf16") ? "bf16" : args.has("fp16") ? "fp16" : "fp32";
  job.put("train.precision", precision, ["bf16", "fp16"]);
  if (precision !== "fp16") return;
  const constant = args.numberIfGiven("loss-scale");
  if (constant !== undefined) {
    job.put("train.loss_scale", constant, ["loss-scale"]);
    return;
  }
  job.put("train.loss_scale.initial", args.number("initial-loss-scale"), ["initial-loss-scale"]);
  job.put("train.loss_scale.growth_interval", args.number("loss-scale-window"), ["loss-scale-window"]);
  job.put("train.loss_scale.hysteresis", args.number("hysteresis"), ["hysteresis"]);
  job.put("train.loss_scale.min", args.number("min-loss-scale"), ["min-loss-scale"]);
}

/** Returns whether gradients are sent in bf16. Megatron reads `--grad-reduce-in-bf16` with `--bf16` alone, and sums in fp32 if that is asked for. */
export const reducesInBf16 = ({ args }: Pick<Importing, "args">): boolean =>
  args.has("bf16") && args.has("grad-reduce-in-bf16") && !args.given.has("accumulate-allreduce-grads-in-fp32");

/** Puts the types of gradient sums and moments. Gradients that are sent in bf16 also lie in bf16, but for named parameters. */
function putStateTypes({ args, job }: Importing): void {
  const sums = ["grad-reduce-in-bf16", "main-grads-dtype"] as const;
  const isReduced = reducesInBf16({ args });
  const isNarrow = isReduced || (args.has("bf16") && args.text("main-grads-dtype") === "bf16");
  const local = "ddp-param-name-patterns-for-fp32-local-accumulation";
  const isLocal = isReduced && (args.textsIfGiven(local) ?? []).includes("all");
  job.put("train.gradients", isNarrow && !isLocal ? "bf16" : "f32", [...sums, local]);
  job.put("train.gradient_reduction", isReduced ? "bf16" : "f32", sums);
  const moments = ["exp-avg-dtype", "exp-avg-sq-dtype"] as const;
  const types = moments.map((name) => args.text(name));
  if (types.some((type) => type !== "fp32") && types.some((type) => type !== "bf16"))
    job.refuse(
      moments.map((name) => `--${name} ${args.text(name)}`).join(" "),
      "both moments have one type, fp32 or bf16",
      "give both as bf16, or leave both out",
    );
  job.put("train.optimizer.moments", types[0] === "bf16" ? "bf16" : "f32", moments);
}

const modules = new Set(["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]);

function putRecompute({ args, job }: Importing): void {
  const granularity = args.textIfGiven("recompute-granularity");
  const isOld = args.has("recompute-activations") || args.has("moe-layer-recompute");
  const mode = isOld ? "selective" : granularity;
  if (mode === undefined) return;
  job.put("train.recompute.mode", mode, ["recompute-granularity", "recompute-activations", "moe-layer-recompute"]);
  if (mode === "full") {
    const method = args.textIfGiven("recompute-method");
    const layers = args.numberIfGiven("recompute-num-layers");
    if (method === undefined || layers === undefined)
      job.reject(
        "--recompute-granularity full",
        "Megatron needs a method and a number of layers",
        "give --recompute-method and --recompute-num-layers",
      );
    job.put("train.recompute.method", method ?? "uniform", ["recompute-method"]);
    job.put("train.recompute.layers", layers ?? 1, ["recompute-num-layers"]);
    return;
  }
  const named = [...new Set(args.textsIfGiven("recompute-modules") ?? (args.has("moe-layer-recompute") ? ["moe"] : ["core_attn"]))];
  const unknown = named.filter((name) => !modules.has(name));
  if (unknown.length > 0)
    job.refuse(`--recompute-modules ${unknown.join(" ")}`, "rankc has no such module", `choose from ${[...modules].join(", ")}`);
  job.put("train.recompute.modules", named, ["recompute-modules", "moe-layer-recompute"]);
}

function putOptimizer({ args, job }: Importing): void {
  const type = args.text("optimizer");
  const isMuon = type === "muon" || type === "dist_muon";
  if (type !== "adam" && type !== "sgd" && !isMuon)
    job.refuse(`--optimizer ${type}`, "optimizers are AdamW, Adam, SGD and Muon", "--optimizer adam, or muon");
  job.put("train.optimizer.type", isMuon ? "muon" : type === "sgd" ? "sgd" : "adamw", ["optimizer"]);
  if (isMuon) putMuon({ args, job });
  const rate = args.numberIfGiven("lr");
  if (rate === undefined && !args.has("lr")) job.reject("--lr", "it is not given, and Megatron has no default", "give --lr");
  job.put("train.optimizer.lr", rate ?? 0, ["lr"]);
  job.put("train.optimizer.min_lr", args.number("min-lr"), ["min-lr"]);
  if (type === "sgd") job.put("train.optimizer.momentum", args.number("sgd-momentum"), ["sgd-momentum"]);
  else {
    job.put("train.optimizer.betas", [args.number("adam-beta1"), args.number("adam-beta2")], ["adam-beta1", "adam-beta2"]);
    job.put("train.optimizer.eps", args.number("adam-eps"), ["adam-eps"]);
  }
  job.put("train.optimizer.weight_decay", args.number("weight-decay"), ["weight-decay"]);
  const growth = args.text("weight-decay-incr-style");
  job.put("train.optimizer.weight_decay_schedule", growth, ["weight-decay-incr-style"]);
  if (growth !== "constant") {
    job.put("train.optimizer.weight_decay_start", args.numberIfGiven("start-weight-decay") ?? null, ["start-weight-decay"]);
    job.put("train.optimizer.weight_decay_end", args.numberIfGiven("end-weight-decay") ?? null, ["end-weight-decay"]);
  }
  job.put("train.optimizer.clip", args.number("clip-grad"), ["clip-grad"]);
}

/** Muon: the defaults are those of Emerging-Optimizers. */
function putMuon({ args, job }: Importing): void {
  job.put("train.optimizer.muon.momentum", args.number("muon-momentum"), ["muon-momentum"]);
  job.put("train.optimizer.muon.nesterov", args.has("muon-nesterov"), ["muon-nesterov"]);
  job.put("train.optimizer.muon.scale_mode", args.text("muon-scale-mode"), ["muon-scale-mode"]);
  job.put("train.optimizer.muon.extra_scale_factor", args.number("muon-extra-scale-factor"), ["muon-extra-scale-factor"]);
  const coefficients = args.text("muon-coefficient-type");
  const key = "train.optimizer.muon";
  if (coefficients === "quintic" || coefficients === "simple")
    job.put("train.optimizer.muon.coefficients", coefficients, ["muon-coefficient-type"]);
  else
    job.refuse(
      `--muon-coefficient-type ${coefficients}`,
      "Muon has the coefficients of quintic or of simple",
      "--muon-coefficient-type quintic",
    );
  const steps = args.number("muon-num-ns-steps");
  job.decides("muon-num-ns-steps", key);
  if (steps !== 5) job.refuse(`--muon-num-ns-steps ${steps}`, "Muon has 5 iterations", "--muon-num-ns-steps 5");
  job.decides("muon-tp-mode", key);
  if (args.text("muon-tp-mode") === "blockwise" && args.number("tensor-model-parallel-size") > 1)
    job.refuse("--muon-tp-mode blockwise", "whole matrices are made orthogonal, whatever the tensor degree", "--muon-tp-mode duplicated");
  job.decides("muon-scalar-optimizer", key);
  if (args.text("muon-scalar-optimizer") !== "adam")
    job.refuse("--muon-scalar-optimizer lion", "AdamW updates what Muon does not", "--muon-scalar-optimizer adam");
  if (args.has("muon-no-split-qkv") && !args.has("multi-latent-attention"))
    job.refuse("--muon-no-split-qkv", "queries, keys and values are made orthogonal apart", "leave out --muon-no-split-qkv");
  if (args.has("swiglu"))
    job.note("Megatron's Muon makes the gate and the up projection of SwiGLU orthogonal as one matrix; rankc has two.");
}

/** Learning rates: counts of samples become quotients by the batch, which need not be whole. */
function putRates({ args, job }: Importing, batch: number, { counts, steps }: Length): void {
  const style = args.text("lr-decay-style");
  job.put("train.optimizer.schedule", style === "WSD" ? "wsd" : style.replaceAll("-", "_"), ["lr-decay-style"]);
  const stepsOf = (inIterations: MappedName, inSamples: MappedName): readonly [number | undefined, string | undefined] => {
    const [own, other] = counts === "samples" ? [inSamples, inIterations] : [inIterations, inSamples];
    if (args.has(other) && (args.numberIfGiven(other) ?? 0) !== 0)
      job.reject(args.given.get(other)?.shown ?? "", `the run counts in ${counts}`, `use --${own}`);
    const value = args.numberIfGiven(own);
    if (value === undefined) return [undefined, undefined];
    return counts === "samples" ? [value / batch, `${value} / ${batch}`] : [value, undefined];
  };
  const [decay = steps, ofDecay] = stepsOf("lr-decay-iters", "lr-decay-samples");
  job.put("train.optimizer.decay_steps", decay, ["lr-decay-iters", "lr-decay-samples"], ofDecay);
  const share = args.numberIfGiven("lr-warmup-fraction");
  const [count, ofCount] = stepsOf("lr-warmup-iters", "lr-warmup-samples");
  if (share !== undefined && count !== undefined && count !== 0)
    job.reject(`--lr-warmup-fraction ${share}`, "Megatron refuses a fraction beside a number", "leave out one of them");
  // a product in binary has digits that the fraction has not
  const warmup = share === undefined ? (count ?? 0) : Number((share * decay).toPrecision(15));
  const remark = share === undefined ? ofCount : `${share} x ${decay}`;
  job.put("train.optimizer.warmup_steps", warmup, ["lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction"], remark);
  job.put("train.optimizer.warmup_init", args.number("lr-warmup-init"), ["lr-warmup-init"]);
  if (style !== "WSD") return;
  const [fall, ofFall] = stepsOf("lr-wsd-decay-iters", "lr-wsd-decay-samples");
  if (fall === undefined) job.reject("--lr-decay-style WSD", "Megatron needs the length of the fall", "give --lr-wsd-decay-iters");
  else job.put("train.optimizer.wsd_decay_steps", fall, ["lr-wsd-decay-iters", "lr-wsd-decay-samples"], ofFall);
  job.put("train.optimizer.wsd_decay", args.text("lr-wsd-decay-style"), ["lr-wsd-decay-style"]);
}

/** Where a script names no data that a job can: the user sets the path. */
const PLACEHOLDER = "tokens.bin";

/** The shares of training, validation and test without --split. */
const DEFAULT_SPLIT = "969, 30, 1";

/** Returns the data sets of a list of arguments: prefixes, each of which may stand after its weight; undefined if one is not known. */
function sourcesOf(words: readonly ScriptText[]): { readonly path: string; readonly weight?: number }[] | undefined {
  const texts = words.map(knownValue);
  if (texts.length === 0 || texts.some((word) => word === undefined)) return undefined;
  const known = texts.flatMap((word) => word ?? []);
  const isWeighted = known.length % 2 === 0 && known.every((word, i) => i % 2 === 1 || /^[\d.]+(?:e-?\d+)?$/.test(word));
  if (!isWeighted) return known.map((path) => ({ path }));
  return known.flatMap((path, i) => (i % 2 === 1 ? [{ path, weight: Number(known[i - 1]) }] : []));
}

/** Puts `data`, and `train.evaluation`. Sources are prefixes of PREFIX.bin and PREFIX.idx; each may stand after its weight. */
export function putData(importing: Importing): void {
  const { args, job } = importing;
  const names = ["data-path", "train-data-path"] as const;
  const words = names.flatMap((name) => args.given.get(name)?.values ?? []);
  const loader = args.textIfGiven("dataloader-type");
  if (loader === "external") job.refuse("--dataloader-type external", "data are read by rankc", "use --dataloader-type single");
  const sources = sourcesOf(words);
  if (sources) job.put("data.sources", sources, names);
  else {
    const remark = words.length === 0 ? "" : `${words.map(shownText).join(" ")}, `;
    job.put("data.path", PLACEHOLDER, [...names, "mock-data"], `${remark}to be set to a file of token ids`);
    job.put("data.order", "shuffled", ["dataloader-type"]);
  }
  putEvaluation(importing, sources !== undefined);
  if (args.has("log-params-norm")) job.put("train.metrics.parameter_norm", true, ["log-params-norm"]);
  putDocuments(importing, sources === undefined ? 0 : undefined);
}

/** Puts the shares and the data sets that an evaluation reads, and `train.evaluation` where the script names an interval. */
function putEvaluation({ args, job }: Importing, hasSources: boolean): void {
  const iterations = args.number("eval-iters");
  const every = args.numberIfGiven("eval-interval");
  const evaluates = every !== undefined && every > 0 && (iterations > 0 || args.has("full-validation"));
  const lists = (
    [
      ["data.validation", "valid-data-path"],
      ["data.test", "test-data-path"],
    ] as const
  ).flatMap(([key, name]) => {
    const found = sourcesOf(args.given.get(name)?.values ?? []);
    return found ? [{ key, name, found }] : [];
  });
  // quotes and blanks stay part of the value in some scripts
  const split = (args.textIfGiven("split") ?? DEFAULT_SPLIT).match(/[\d.]+/g)?.map(Number);
  const isSplit = split !== undefined && !args.has("train-data-path") && lists.length === 0 && (hasSources || evaluates);
  if (isSplit) job.put("data.split", split, ["split"]);
  if (evaluates) for (const { key, name, found } of lists) job.put(key, found, [name]);
  const hasValidation = (isSplit && (split[1] ?? 0) > 0) || lists.some(({ key }) => key === "data.validation");
  if (!evaluates || !hasValidation) return;
  const from = ["eval-interval", "eval-iters", "full-validation"] as const;
  job.put("train.evaluation", { every, steps: args.has("full-validation") ? "all" : iterations }, from);
}

/** Puts `data.documents`. `end`: a token that the user replaces, for data without a description. */
function putDocuments({ args, job }: Importing, end?: number): void {
  const names = ["reset-attention-mask", "reset-position-ids", "eod-mask-loss"] as const;
  const [mask, positions, loss] = names.map((name) => args.has(name));
  if (!mask && !positions && !loss) return;
  const remark = end === undefined ? undefined : "end is to be set to the id of the token that ends a document";
  job.put("data.documents", { mask, positions, loss, ...(end !== undefined && { end }) }, names, remark);
}
