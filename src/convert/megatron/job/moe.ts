/** The section `model.moe` of a job: experts, router, dispatch and capacity. */
import { hasTwoHops, nodesOfExperts } from "../../../../schemas/experts.ts";
import type { MappedName } from "../arguments/spec.ts";
import { putExpertBiases } from "./feedForward.ts";
import type { Importing } from "./importing.ts";
import { evaluatePattern } from "./layerPattern.ts";
import type { ModelSizes } from "./model.ts";
import { degreesOf, smallestWorld, type World } from "./parallel.ts";

/** Puts the keys of `model.moe`, if the launch has experts. Returns whether it has. */
export function putExperts({ args, job }: Importing, { layers, ffn }: ModelSizes, world: World | undefined): boolean {
  const experts = args.numberIfGiven("num-experts") ?? 0;
  if (experts === 0) return false;
  const pattern = evaluatePattern(args.textIfGiven("moe-layer-freq") ?? "1");
  if (Array.isArray(pattern) && pattern.length === layers && !pattern.includes(1)) {
    job.note("--moe-layer-freq gives no layer experts, so that the model is dense and arguments of experts have no effect.");
    return false;
  }
  job.put("model.moe.experts", experts, ["num-experts"]);
  job.put("model.moe.top_k", args.number("moe-router-topk"), ["moe-router-topk"]);
  job.put("model.moe.ffn", args.numberIfGiven("moe-ffn-hidden-size") ?? ffn, ["moe-ffn-hidden-size"]);
  putLayers({ args, job }, layers);
  putExpertBiases({ args, job });
  const shared = args.numberIfGiven("moe-shared-expert-intermediate-size") ?? 0;
  if (shared > 0) {
    job.put("model.moe.shared.ffn", shared, ["moe-shared-expert-intermediate-size"]);
    job.put("model.moe.shared.gate", args.has("moe-shared-expert-gate"), ["moe-shared-expert-gate"]);
  }
  const latent = args.numberIfGiven("moe-latent-size");
  if (latent !== undefined) job.put("model.moe.latent", latent, ["moe-latent-size"]);
  putRouter({ args, job });
  const dispatch = { allgather: "all_gather", alltoall: "all_to_all", flex: onceTo({ args, job }, world) }[
    args.text("moe-token-dispatcher-type")
  ];
  job.put("model.moe.dispatch", dispatch, ["moe-token-dispatcher-type"]);
  putCapacity({ args, job });
  return true;
}

/** Returns the dispatch of the flex dispatcher, whose libraries send a token once to each node, and in it once to each rank, and the ranks of experts return sums. */
function onceTo(importing: Importing, world: World | undefined): "once" | "once_per_node" {
  const { expertTensor: expert_tensor, ...degrees } = degreesOf(importing, true);
  const order = importing.args.has("use-tp-pp-dp-mapping") ? "tp-cp-ep-pp-dp" : "tp-cp-ep-dp-pp";
  const parallel = {
    ...degrees,
    expert_tensor,
    order,
    world: world?.ranks ?? smallestWorld({ ...degrees, expertTensor: expert_tensor }),
  } as const;
  const found = nodesOfExperts({ parallel, cluster: { gpus_per_node: world?.perNode ?? 8 } });
  return found && hasTwoHops(found) ? "once_per_node" : "once";
}

function putLayers({ args, job }: Importing, layers: number): void {
  const text = args.textIfGiven("moe-layer-freq");
  if (text === undefined) return;
  const from: readonly MappedName[] = ["moe-layer-freq"];
  const value = evaluatePattern(text);
  if (value === undefined) {
    const fix = "write an integer, or a Python list of digits, commas, brackets, parentheses, + and *, without blanks";
    job.reject(`--moe-layer-freq ${text}`, "it is neither a period nor a list of layers", fix);
    return;
  }
  if (typeof value === "number") {
    job.put("model.moe.layers", value === 1 ? "all" : { every: value }, from);
    return;
  }
  if (value.length !== layers) {
    job.reject(`--moe-layer-freq ${text}`, `the list has ${value.length} items for ${layers} layers`, "write an item for each layer");
    return;
  }
  const firstDense = value.indexOf(1);
  const isPrefix = firstDense >= 0 && value.every((has, i) => has === (i < firstDense ? 0 : 1));
  job.put("model.moe.layers", !isPrefix ? value : firstDense === 0 ? "all" : { first_dense: firstDense }, from);
}

const balances: Readonly<Record<string, string>> = { quantile_balancing: "quantile" };

function putRouter({ args, job }: Importing): void {
  putScores({ args, job });
  job.put("model.moe.router.scaling", args.numberIfGiven("moe-router-topk-scaling-factor") ?? 1, ["moe-router-topk-scaling-factor"]);
  const precision = args.textIfGiven("moe-router-dtype");
  if (precision === "fp64")
    job.refuse("--moe-router-dtype fp64", "logits are kept in the model's precision or in fp32", "--moe-router-dtype fp32");
  if (precision === "fp32") job.put("model.moe.router.precision", "fp32", ["moe-router-dtype"]);
  const jitter = args.numberIfGiven("moe-input-jitter-eps");
  if (jitter !== undefined) job.put("model.moe.router.jitter", jitter, ["moe-input-jitter-eps"]);
  const groups = args.numberIfGiven("moe-router-num-groups");
  const groupTopK = args.numberIfGiven("moe-router-group-topk");
  if (groups !== undefined && groupTopK !== undefined && isAlone({ args, job }, "sinkhorn"))
    job.note("Megatron ignores groups of experts beside Sinkhorn's method.");
  else if (groups !== undefined && groupTopK !== undefined) {
    job.put("model.moe.router.groups", groups, ["moe-router-num-groups"]);
    job.put("model.moe.router.group_top_k", groupTopK, ["moe-router-group-topk"]);
  }
  putBalance({ args, job });
  const z = args.numberIfGiven("moe-z-loss-coeff");
  if (z !== undefined) job.put("model.moe.router.z_coeff", z, ["moe-z-loss-coeff"]);
  if (args.has("moe-router-force-load-balancing")) {
    const remark = "Megatron draws experts at random, rankc deals them in turns";
    job.put("model.moe.router.force", "uniform", ["moe-router-force-load-balancing"], remark);
  }
}

/** Puts the keys of scores and weights. Sinkhorn's method uses its own scores and ignores the arguments. */
function putScores({ args, job }: Importing): void {
  const topK = args.number("moe-router-topk");
  if (isAlone({ args, job }, "sinkhorn")) {
    job.put("model.moe.router.score", topK === 1 ? "sigmoid" : "softmax", ["moe-router-load-balancing-type"]);
    job.put("model.moe.router.normalize_top_k", false, ["moe-router-load-balancing-type"]);
    return;
  }
  const score = args.text("moe-router-score-function");
  const isPreSoftmax = args.has("moe-router-pre-softmax");
  job.put("model.moe.router.score", score === "sqrtsoftplus" ? "sqrt_softplus" : score, ["moe-router-score-function"]);
  if (score === "softmax" && topK === 1 && !isPreSoftmax)
    job.reject("--moe-router-topk 1", "Megatron refuses it without --moe-router-pre-softmax", "add --moe-router-pre-softmax");
  // sigmoid and softplus scores are normalised if top_k exceeds 1
  const isSoftmax = score === "softmax";
  const from: readonly MappedName[] = isSoftmax ? ["moe-router-pre-softmax"] : ["moe-router-score-function"];
  job.put("model.moe.router.normalize_top_k", isSoftmax ? !isPreSoftmax : topK > 1, from);
}

/** Returns whether exactly one method balances the load. */
function isAlone({ args }: Importing, name: string): boolean {
  const given = args.textsIfGiven("moe-router-load-balancing-type");
  return given?.length === 1 && given[0] === name;
}

/** Returns the methods of balancing and their coefficients, without those that Megatron ignores: notes name these. */
function balancing({ args, job }: Importing): { readonly names: readonly string[]; readonly coeffs: readonly number[] } {
  const names = (args.textsIfGiven("moe-router-load-balancing-type") ?? ["aux_loss"]).map((name) => balances[name] ?? name);
  const coeffs = (args.textsIfGiven("moe-aux-loss-coeff") ?? ["0.0"]).map(Number);
  // a list with another number of coefficients is left to the rules
  if (names.length !== coeffs.length) return { names, coeffs };
  if (names.length === 1) {
    if (names[0] !== "quantile" || coeffs[0] === 0) return { names, coeffs };
    job.note("Megatron ignores --moe-aux-loss-coeff beside quantile balancing.");
    return { names, coeffs: [0] };
  }
  const isIgnored = (name: string): boolean => name === "sinkhorn" || name === "quantile";
  const counts = names.map((name, i) => !isIgnored(name) && names.indexOf(name) === i);
  if (names.some(isIgnored)) job.note("Megatron ignores sinkhorn and quantile_balancing in a list of balancing types.");
  if (names.some((name, i) => names.indexOf(name) !== i))
    job.note("Of a balancing type that is given twice Megatron takes the first coefficient.");
  if (!counts.includes(true)) return { names: ["none"], coeffs: [0] };
  return { names: names.filter((_, i) => counts[i]), coeffs: coeffs.filter((_, i) => counts[i]) };
}

function putBalance({ args, job }: Importing): void {
  if (args.has("moe-router-enable-expert-bias") && isAlone({ args, job }, "quantile_balancing"))
    job.note("Megatron ignores the bias of experts beside quantile balancing.");
  else if (args.has("moe-router-enable-expert-bias")) {
    job.put("model.moe.router.expert_bias", true, ["moe-router-enable-expert-bias"]);
    job.put("model.moe.router.bias_rate", args.number("moe-router-bias-update-rate"), ["moe-router-bias-update-rate"]);
  }
  const { names, coeffs } = balancing({ args, job });
  const only = <T>(list: readonly T[]): T | readonly T[] => (list.length === 1 && list[0] !== undefined ? list[0] : list);
  job.put("model.moe.router.balance", only(names), ["moe-router-load-balancing-type"]);
  job.put("model.moe.router.aux_coeff", only(coeffs), ["moe-aux-loss-coeff"]);
  if (names.includes("quantile")) {
    const ema = args.number("moe-router-quantile-balancing-ema");
    job.put("model.moe.router.quantile_ema", ema, ["moe-router-quantile-balancing-ema"]);
  }
}

function putCapacity({ args, job }: Importing): void {
  const factor = args.numberIfGiven("moe-expert-capacity-factor");
  if (factor !== undefined && factor < 0)
    job.put("model.moe.capacity", "dropless", ["moe-expert-capacity-factor"], "a negative factor drops nothing");
  else if (factor !== undefined) {
    job.put("model.moe.capacity.factor", factor, ["moe-expert-capacity-factor"]);
    job.put("model.moe.capacity.drop", args.text("moe-token-drop-policy"), ["moe-token-drop-policy"]);
    job.put("model.moe.capacity.pad", args.has("moe-pad-expert-input-to-capacity"), ["moe-pad-expert-input-to-capacity"]);
  }
  const rows = args.numberIfGiven("moe-expert-rank-capacity-factor");
  if (rows === undefined) return;
  job.put("model.moe.rows_bound", rows, ["moe-expert-rank-capacity-factor"], "Megatron drops rows beyond it, a run of rankc ends");
}
