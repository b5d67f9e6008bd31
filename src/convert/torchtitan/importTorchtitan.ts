/** Imports a configuration of torchtitan for one of its mixture-of-experts models. */
import { Trouble } from "../../../schemas/trouble.ts";
import { layoutText } from "../../analysis/evenLayout.ts";
import { type ImportedJob, makeImported } from "../importedJob.ts";
import { type JobBuilder, newJobBuilder } from "../jobBuilder.ts";
import type { Problem } from "../problems.ts";
import { type Flavor, flavors } from "./flavors.ts";
import { readSettings, type SettingName, type TitanSettings, whyWithoutEffect } from "./settings.ts";

/** Settings of the import. */
export interface TorchtitanSettings {
  /** The name of the job. */
  readonly name: string;
  /** The number of ranks; a configuration seldom says it. */
  readonly world?: number;
  /** Settings to leave out, as in "training.seed". */
  readonly drop?: readonly string[];
}

interface Importing {
  readonly settings: TitanSettings;
  readonly job: JobBuilder<SettingName>;
  readonly flavor: Flavor;
}

/** YaRN of DeepSeek's models in torchtitan; it scales where a sequence is longer than the original ones. */
const YARN = { originalSeq: 4096, factor: 40 };

/** The setting that stands for the bias by which torchtitan balances experts; it is no setting of the file, but can be left out. */
const BIAS = "load_balance_coeff";

/** Imports a configuration. Throws an ImportTrouble that lists all that is missing and all that rankc lacks. */
export function importTorchtitan(text: string, file: string, { name, world, drop = [] }: TorchtitanSettings): ImportedJob {
  const problems: Problem[] = [];
  const settings = readSettings(text, file, new Set(drop), problems);
  const job = newJobBuilder<SettingName>(settings.has, "torchtitan's default", problems, "");
  const importing = { settings, job, flavor: flavorOf(settings) };
  putModel(importing);
  putExperts(importing, drop.includes(BIAS));
  const data = putParallel(importing, world);
  putTrain(importing, data);
  job.put("data.path", "tokens.bin", [], "to be set to a file of token ids");
  job.put("data.order", "shuffled", []);
  const reports = [...settings.given].map(([key, value]) => ({
    argument: `${key} = ${String(value)}`,
    keys: job.keysOf.get(key) ?? [],
    why: whyWithoutEffect(key) ?? "has no effect in this combination",
  }));
  return makeImported({ name, job, problems, reports, dropped: drop });
}

function flavorOf(settings: TitanSettings): Flavor {
  const model = settings.text("model.name");
  const name = settings.text("model.flavor");
  const known = Object.hasOwn(flavors, model) ? flavors[model] : undefined;
  const flavor = known && Object.hasOwn(known, name) ? known[name] : undefined;
  if (flavor) return flavor;
  const list = Object.entries(flavors).map(([of, all]) => `${of} (${Object.keys(all).join(", ")})`);
  throw new Trouble(`model.name ${model || "(not given)"} with flavor ${name} cannot be imported`, `these can: ${list.join("; ")}`);
}

function putModel({ settings, job, flavor }: Importing): void {
  const { layers, hidden, ffn, heads, vocab, eps, theta, attention, mscale } = flavor;
  job.decides("model.name", "model");
  job.decides("model.flavor", "model");
  const put = (key: string, value: unknown): void => job.put(`model.${key}`, value, [], `flavor ${settings.text("model.flavor")}`);
  for (const [key, value] of Object.entries({ layers, hidden, ffn, heads })) put(key, value);
  if ("kvHeads" in attention) {
    put("kv_heads", attention.kvHeads);
    put("head_dim", attention.headDim);
    put("qk_norm", "head");
  } else {
    if (attention.queryRank > 0) put("mla.q_rank", attention.queryRank);
    put("mla.kv_rank", attention.kvRank);
    put("mla.nope_dim", attention.nopeDim);
    put("mla.rope_dim", attention.ropeDim);
    put("mla.v_dim", attention.vDim);
    put("mla.norm_eps", eps);
    put("rope.interleaved", true);
  }
  put("vocab", vocab);
  const seq = settings.number("training.seq_len");
  job.put("model.seq", seq, ["training.seq_len"]);
  put("norm.eps", eps);
  put("rope.theta", theta);
  if (mscale !== undefined && seq > YARN.originalSeq) {
    put("rope.scaling.type", "yarn");
    put("rope.scaling.factor", YARN.factor);
    put("rope.scaling.original_seq", YARN.originalSeq);
    put("rope.scaling.mscale", mscale);
    put("rope.scaling.mscale_all_dim", mscale);
  }
  const converters = settings.given.get("model.converters");
  if (converters !== undefined && String(converters) !== "")
    job.refuse(
      `model.converters = ${String(converters)}`,
      "products are computed in bf16 or fp32",
      "--drop model.converters to import the job in bf16",
    );
}

function putExperts({ settings, job, flavor }: Importing, isUnbiased: boolean): void {
  const { experts, topK, expertFfn, shared, firstDense, score, normalize, scaling, groups } = flavor;
  const put = (key: string, value: unknown): void => job.put(`model.moe.${key}`, value, [], `flavor ${settings.text("model.flavor")}`);
  put("experts", experts);
  put("top_k", topK);
  put("ffn", expertFfn);
  put("layers", firstDense === 0 ? "all" : { first_dense: firstDense });
  if (shared > 0) put("shared.ffn", shared * expertFfn);
  put("router.score", score);
  put("router.normalize_top_k", normalize);
  put("router.scaling", scaling);
  if (groups) {
    put("router.groups", groups.count);
    put("router.group_top_k", groups.chosen);
    put("router.group_scores", 2);
  }
  put("router.balance", "none");
  if (settings.flag("debug.moe_force_load_balance")) job.put("model.moe.router.force", "uniform", ["debug.moe_force_load_balance"]);
  if (isUnbiased) return;
  if (score === "softmax")
    job.refuse(
      `an expert bias of rate 0.001 beside softmax scores, as in flavor ${settings.text("model.flavor")}`,
      "a bias needs sigmoid or softplus scores",
      `--drop ${BIAS}, and set model.moe.router.balance`,
    );
  else put("router.expert_bias", true);
}

/** Puts `parallel`, and returns the data degree. */
function putParallel({ settings, job, flavor }: Importing, world: number | undefined): number {
  const tensor = settings.number("parallelism.tensor_parallel_degree");
  const pipeline = settings.number("parallelism.pipeline_parallel_degree");
  const context = settings.number("parallelism.context_parallel_degree");
  const replicas = settings.number("parallelism.data_parallel_replicate_degree");
  const shards = settings.number("parallelism.data_parallel_shard_degree");
  const counted = shards > 0 ? replicas * shards * tensor * pipeline * context : undefined;
  const ranks = world ?? counted;
  if (ranks === undefined)
    job.reject(
      "parallelism.data_parallel_shard_degree = -1",
      "it takes all ranks that are left, and their number is not known",
      "--world N",
    );
  else if (counted !== undefined && counted !== ranks)
    job.reject(`--world ${ranks}`, `the degrees multiply to ${counted}`, `--world ${counted}`);
  const data = (ranks ?? tensor * pipeline * context) / (tensor * pipeline * context);
  job.put(
    "parallel.world",
    ranks ?? 1,
    shards > 0 ? ["parallelism.data_parallel_shard_degree"] : [],
    world === undefined ? undefined : "--world",
  );
  job.put("parallel.tensor", tensor, ["parallelism.tensor_parallel_degree"]);
  if (tensor > 1) job.put("parallel.sequence", true, ["parallelism.tensor_parallel_degree"]);
  job.put("parallel.pipeline", pipeline, ["parallelism.pipeline_parallel_degree"]);
  if (pipeline > 1) putSchedule({ settings, job, flavor }, pipeline);
  job.put("parallel.expert", settings.number("parallelism.expert_parallel_degree"), ["parallelism.expert_parallel_degree"]);
  job.put("parallel.expert_tensor", settings.number("parallelism.expert_tensor_parallel_degree"), [
    "parallelism.expert_tensor_parallel_degree",
  ]);
  job.put("parallel.context", context, ["parallelism.context_parallel_degree"]);
  if (context > 1) {
    if (settings.text("parallelism.context_parallel_rotate_method") === "allgather")
      job.put("parallel.context_method", "all_gather", ["parallelism.context_parallel_rotate_method"]);
    else job.put("parallel.context_method", "ring", ["parallelism.context_parallel_rotate_method"]);
  }
  if (data > 1) {
    const remark = "torchtitan shards weights and gradients, too; here each rank holds them whole";
    job.put("parallel.distributed_optimizer", true, ["parallelism.data_parallel_shard_degree"], remark);
    job.put("parallel.optimizer_instances", replicas, ["parallelism.data_parallel_replicate_degree"]);
    job.note(
      "torchtitan shards weights and gradients over data ranks (FSDP); rankc shards the optimizer's state, so that a rank needs more memory.",
    );
  }
  return data;
}

/** Chunks of a stage: given by the layers of a part, else 1, or with looped schedules 2. */
function putSchedule({ settings, job, flavor }: Importing, pipeline: number): void {
  const schedule = settings.text("parallelism.pipeline_parallel_schedule");
  const isLooped = schedule === "Interleaved1F1B";
  if (!isLooped && schedule !== "1F1B")
    job.refuse(`parallelism.pipeline_parallel_schedule = ${schedule}`, "schedules are 1F1B and Interleaved1F1B", "use one of these");
  for (const name of ["parallelism.pipeline_parallel_split_points", "parallelism.module_fqns_per_model_part"] as const)
    if (settings.has(name))
      job.refuse(
        `${name} = ${String(settings.given.get(name))}`,
        "parts are named by parallel.layout",
        `--drop ${name}, and set parallel.layout`,
      );
  // the embedding and the head count as layers, so that the first and the last part have fewer
  const ends = ["parallelism.pipeline_parallel_first_stage_less_layers", "parallelism.pipeline_parallel_last_stage_less_layers"] as const;
  const [embedding, head] = [settings.number(ends[0]), settings.number(ends[1])];
  const weight = flavor.layers + embedding + head;
  const name = "parallelism.pipeline_parallel_layers_per_stage";
  const perPart = settings.numberIfGiven(name);
  const parts = perPart === undefined ? pipeline * (isLooped ? 2 : 1) : Math.ceil(weight / perPart);
  if (parts % pipeline !== 0)
    job.reject(`${name} = ${perPart}`, `${parts} parts are no multiple of ${pipeline} stages`, "choose another number of layers");
  job.put("parallel.virtual_pipeline", parts / pipeline, ["parallelism.pipeline_parallel_schedule", name]);
  const counts = Array.from({ length: parts }, (_, i) => {
    const all = Math.floor(weight / parts) + (i < weight % parts ? 1 : 0);
    return Math.max(0, all - (i === 0 ? embedding : 0) - (i === parts - 1 ? head : 0));
  });
  job.put("parallel.layout", layoutText(counts, 0), ends, "embedding and head count as layers");
}

const falls: Readonly<Record<string, string>> = { linear: "linear", cosine: "cosine", sqrt: "minus_sqrt" };

function putTrain({ settings, job }: Importing, data: number): void {
  const local = settings.number("training.local_batch_size");
  const isPipelined = settings.number("parallelism.pipeline_parallel_degree") > 1;
  const micro = isPipelined ? settings.number("parallelism.pipeline_parallel_microbatch_size") : local;
  const from: SettingName = isPipelined ? "parallelism.pipeline_parallel_microbatch_size" : "training.local_batch_size";
  job.put("train.micro_batch", micro, [from]);
  const given = settings.number("training.global_batch_size");
  job.put("train.global_batch", given > 0 ? given : local * data, [given > 0 ? "training.global_batch_size" : "training.local_batch_size"]);
  const steps = settings.number("training.steps");
  job.put("train.steps", steps, ["training.steps"]);
  const precision = settings.text("training.mixed_precision_param");
  job.put("train.precision", precision === "float32" ? "fp32" : "bf16", ["training.mixed_precision_param"]);
  if (settings.text("training.dtype") === "bfloat16")
    job.refuse(
      "training.dtype = bfloat16",
      "weights that the optimizer changes are fp32",
      "--drop training.dtype to import the job with them",
    );
  const seed = settings.numberIfGiven("training.seed");
  if (seed !== undefined) job.put("train.seed", seed, ["training.seed"]);
  const mode = settings.text("activation_checkpoint.mode");
  if (mode === "memory_budget")
    job.refuse(`activation_checkpoint.mode = ${mode}`, "recomputation is chosen by module or by layer", "use selective, full or none");
  const remark = mode === "selective" ? "torchtitan keeps every second product instead" : undefined;
  job.put("train.recompute.mode", mode, ["activation_checkpoint.mode"], remark);
  const type = settings.text("optimizer.name");
  if (type !== "AdamW" && type !== "Adam")
    job.refuse(`optimizer.name = ${type}`, "optimizers of torchtitan that rankc has are AdamW and Adam", "use AdamW");
  if (settings.flag("optimizer.early_step_in_backward"))
    job.refuse(
      "optimizer.early_step_in_backward = true",
      "a step begins when all gradients are there",
      "--drop optimizer.early_step_in_backward",
    );
  job.put("train.optimizer.type", type === "Adam" ? "adam" : "adamw", ["optimizer.name"]);
  const rate = settings.number("optimizer.lr");
  job.put("train.optimizer.lr", rate, ["optimizer.lr"]);
  job.put(
    "train.optimizer.betas",
    [settings.number("optimizer.beta1"), settings.number("optimizer.beta2")],
    ["optimizer.beta1", "optimizer.beta2"],
  );
  job.put("train.optimizer.eps", settings.number("optimizer.eps"), ["optimizer.eps"]);
  job.put("train.optimizer.weight_decay", settings.number("optimizer.weight_decay"), ["optimizer.weight_decay"]);
  job.put("train.optimizer.clip", settings.number("training.max_norm"), ["training.max_norm"]);
  putRates({ settings, job }, rate, steps);
}

/** The rate is constant after warm-up, and falls over the last steps, or right away. */
function putRates({ settings, job }: Pick<Importing, "settings" | "job">, rate: number, steps: number): void {
  const warmup = settings.number("lr_scheduler.warmup_steps");
  job.put("train.optimizer.warmup_steps", warmup, ["lr_scheduler.warmup_steps"]);
  const share = settings.numberIfGiven("lr_scheduler.decay_ratio");
  const fall = Math.min(share === undefined ? steps : Math.round(steps * share), steps - warmup);
  job.put("train.optimizer.schedule", "wsd", ["lr_scheduler.decay_ratio", "lr_scheduler.decay_type"]);
  job.put("train.optimizer.wsd_decay", falls[settings.text("lr_scheduler.decay_type")] ?? "linear", ["lr_scheduler.decay_type"]);
  job.put("train.optimizer.wsd_decay_steps", fall, ["lr_scheduler.decay_ratio"]);
  const factor = settings.numberIfGiven("lr_scheduler.min_lr_factor") ?? settings.number("lr_scheduler.lr_min");
  const least = Number((rate * factor).toPrecision(12));
  job.put(
    "train.optimizer.min_lr",
    least,
    ["lr_scheduler.min_lr_factor", "lr_scheduler.lr_min"],
    factor === 0 ? undefined : `${factor} x ${rate}`,
  );
}
