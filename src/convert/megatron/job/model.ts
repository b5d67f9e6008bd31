/** The section `model` of a job, without its experts (moe.ts): sizes, attention, positions, norms and what a launch leaves out. */
import type { MappedName } from "../arguments/spec.ts";
import { putLayers } from "./feedForward.ts";
import type { Importing } from "./importing.ts";
import { putVocabulary } from "./vocabulary.ts";

/** Sizes that other sections derive values from. */
export interface ModelSizes {
  readonly layers: number;
  readonly hidden: number;
  readonly ffn: number;
  readonly tensor: number;
}

/** YaRN of latent attention has these numbers whatever the arguments say, as does --position-embedding-type yarn without them. */
const YARN = { originalSeq: 4096, betaFast: 32, betaSlow: 1 };

/** Numbers of --use-rope-scaling, which are fixed in the code of the model. */
const LLAMA3 = { type: "llama3", factor: 8, original_seq: 8192, low_freq: 1, high_freq: 4 };

/** Puts the keys of `model` except `model.moe`, and returns the sizes. `tokenizerSize`: the size of the tokenizer, where the user gives it. */
export function putModel({ args, job }: Importing, tokenizerSize: number | undefined): ModelSizes {
  const needed = (name: MappedName, older?: MappedName): number => {
    const value = args.numberIfGiven(name) ?? (older && args.numberIfGiven(older));
    if (value === undefined && !args.has(name)) job.reject(`--${name}`, "it is not given, and Megatron has no default", `give --${name}`);
    return value ?? 1;
  };
  const isLatent = args.has("multi-latent-attention");
  const layers = needed("num-layers", "encoder-num-layers");
  const hidden = needed("hidden-size");
  const heads = needed("num-attention-heads");
  const isGated = args.has("swiglu");
  const ffn = args.numberIfGiven("ffn-hidden-size") ?? (isGated ? Math.floor((8 * hidden) / 3 / 64) * 64 : 4 * hidden);
  const tensor = args.number("tensor-model-parallel-size");

  job.put("model.layers", layers, ["num-layers", "encoder-num-layers"]);
  job.put("model.hidden", hidden, ["hidden-size"]);
  job.put("model.ffn", ffn, ["ffn-hidden-size"]);
  job.put("model.heads", heads, ["num-attention-heads"]);
  putHeads({ args, job }, isLatent, heads);
  putVocabulary({ args, job }, tensor, tokenizerSize);
  job.put("model.seq", needed("seq-length", "encoder-seq-length"), ["seq-length", "encoder-seq-length"]);
  putNorms({ args, job }, isLatent);
  putPositions({ args, job }, isLatent);
  putLayers({ args, job });
  job.put("model.tie_embeddings", !args.has("untie-embeddings-and-output-weights"), ["untie-embeddings-and-output-weights"]);
  job.put("model.dropout.attention", args.number("attention-dropout"), ["attention-dropout"]);
  job.put("model.dropout.hidden", args.number("hidden-dropout"), ["hidden-dropout"]);
  const depths = args.numberIfGiven("mtp-num-layers") ?? 0;
  if (depths > 0) {
    job.put("model.mtp.layers", depths, ["mtp-num-layers"]);
    job.put("model.mtp.coeff", args.number("mtp-loss-scaling-factor"), ["mtp-loss-scaling-factor"]);
  }
  return { layers, hidden, ffn, tensor };
}

function putHeads({ args, job }: Importing, isLatent: boolean, heads: number): void {
  const isGrouped = args.has("group-query-attention");
  if (isLatent && isGrouped)
    job.reject("--multi-latent-attention --group-query-attention", "Megatron refuses them together", "leave out --group-query-attention");
  if (isGrouped) job.put("model.kv_heads", args.number("num-query-groups"), ["group-query-attention", "num-query-groups"]);
  else job.put("model.kv_heads", heads, ["num-attention-heads"]);
  if (!isLatent) {
    const channels = args.numberIfGiven("kv-channels");
    if (channels !== undefined) job.put("model.head_dim", channels, ["kv-channels"]);
    return;
  }
  const rank = args.numberIfGiven("q-lora-rank");
  // Pai-Megatron-Patch gives 0 for none
  if (rank !== undefined && rank > 0) job.put("model.mla.q_rank", rank, ["q-lora-rank"]);
  job.put("model.mla.kv_rank", args.number("kv-lora-rank"), ["kv-lora-rank"]);
  const nope = args.numberIfGiven("qk-nope-head-dim") ?? args.number("qk-head-dim");
  const rope = args.numberIfGiven("qk-rope-head-dim") ?? args.number("qk-pos-emb-head-dim");
  job.put("model.mla.nope_dim", nope, ["qk-head-dim", "qk-nope-head-dim"]);
  job.put("model.mla.rope_dim", rope, ["qk-pos-emb-head-dim", "qk-rope-head-dim"]);
  job.put("model.mla.v_dim", args.number("v-head-dim"), ["v-head-dim"]);
}

function putNorms({ args, job }: Importing, isLatent: boolean): void {
  job.put("model.norm.type", args.text("normalization") === "RMSNorm" ? "rmsnorm" : "layernorm", ["normalization"]);
  job.put("model.norm.zero_centered", args.has("apply-layernorm-1p"), ["apply-layernorm-1p"]);
  job.put("model.norm.eps", args.number("norm-epsilon"), ["norm-epsilon"]);
  if (isLatent) {
    job.put("model.mla.norm_eps", args.number("norm-epsilon"), ["norm-epsilon"]);
    job.put("model.mla.norm", args.has("qk-layernorm"), ["qk-layernorm"]);
  } else if (args.has("qk-layernorm")) job.put("model.qk_norm", "head", ["qk-layernorm"]);
}

function putPositions({ args, job }: Importing, isLatent: boolean): void {
  const type = args.has("use-rotary-position-embeddings") ? "rope" : args.text("position-embedding-type");
  if (type === "mrope" || type === "relative") {
    job.refuse(
      `--position-embedding-type ${type}`,
      "positions are rotary, learned or none",
      "--position-embedding-type rope, if the model has it",
    );
    return;
  }
  const isRotary = type === "rope" || type === "yarn";
  if (args.has("no-position-embedding") && !isRotary)
    job.reject(
      "--no-position-embedding",
      "Megatron takes it beside rotary positions alone",
      "give --position-embedding-type rope, or none",
    );
  const from: readonly MappedName[] = ["position-embedding-type", "use-rotary-position-embeddings"];
  const remark = isLatent && !isRotary ? "heads are rotated, too" : undefined;
  job.put("model.positions", isRotary ? "rope" : type === "none" ? "none" : "learned", from, remark);
  if (type === "learned_absolute") putTable({ args, job });
  if (!isRotary && !isLatent) return;
  job.put("model.rope.theta", args.number("rotary-base"), ["rotary-base"]);
  job.decides("position-embedding-type", "model.rope");
  job.decides("use-rotary-position-embeddings", "model.rope");
  if (!isLatent) job.put("model.rope.fraction", args.number("rotary-percent"), ["rotary-percent"]);
  if (isLatent) {
    job.put("model.rope.interleaved", true, ["multi-latent-attention"], "it pairs neighbouring channels");
    putLatentScaling({ args, job });
    return;
  }
  if (args.has("rotary-interleaved")) job.put("model.rope.interleaved", true, ["rotary-interleaved"]);
  if (args.textIfGiven("rope-type") === "yarn")
    job.reject("--rope-type yarn", "Megatron takes it with --multi-latent-attention alone", "use --position-embedding-type yarn");
  const stretch = args.numberIfGiven("rotary-seq-len-interpolation-factor") ?? 1;
  const isLlama = args.has("use-rope-scaling");
  if ([type === "yarn", stretch !== 1, isLlama].filter(Boolean).length > 1) {
    job.refuse("several scalings of rotary positions", "one at a time is possible", "leave out all but one");
  } else if (type === "yarn") {
    putYarn({ args, job }, ["position-embedding-type"]);
  } else if (stretch !== 1) {
    job.put("model.rope.scaling.type", "linear", ["rotary-seq-len-interpolation-factor"]);
    job.put("model.rope.scaling.factor", stretch, ["rotary-seq-len-interpolation-factor"]);
  } else if (isLlama) {
    for (const [key, value] of Object.entries(LLAMA3)) job.put(`model.rope.scaling.${key}`, value, ["use-rope-scaling"]);
  }
}

/** The table of learned positions. */
function putTable({ args, job }: Importing): void {
  const rows = args.numberIfGiven("max-position-embeddings");
  if (rows !== undefined) job.put("model.max_positions", rows, ["max-position-embeddings"]);
  if ((args.numberIfGiven("mtp-num-layers") ?? 0) > 0)
    job.reject(
      "--mtp-num-layers with learned positions",
      "Megatron takes it beside rotary positions, or none, alone",
      "give --position-embedding-type rope",
    );
}

/** Latent attention has YaRN unless --rope-type says rope. Megatron's default factor is 1, which scales nothing. */
function putLatentScaling({ args, job }: Importing): void {
  const factor = args.number("rotary-scaling-factor");
  const isPlain = args.textIfGiven("rope-type") === "rope";
  if (factor === 1) return;
  if (!isPlain) putYarn({ args, job }, ["rope-type"]);
  else if (args.number("mscale-all-dim") !== 0)
    job.refuse(
      `--rope-type rope --rotary-scaling-factor ${factor} --mscale-all-dim ${args.number("mscale-all-dim")}`,
      "attention scores are scaled by mscale_all_dim with YaRN alone",
      "use --rope-type yarn, or --rotary-scaling-factor 1",
    );
}

function putYarn({ args, job }: Importing, by: readonly MappedName[]): void {
  const isLatent = args.has("multi-latent-attention");
  const of = (name: MappedName, otherwise: number): number => (isLatent ? otherwise : (args.numberIfGiven(name) ?? otherwise));
  const from = (name: MappedName): readonly MappedName[] => (isLatent ? by : [name]);
  job.put("model.rope.scaling.type", "yarn", by, args.has("rope-type") || !isLatent ? undefined : "latent attention has YaRN");
  job.put("model.rope.scaling.factor", args.number("rotary-scaling-factor"), ["rotary-scaling-factor"]);
  const original = of("yarn-original-max-position-embeddings", YARN.originalSeq);
  job.put("model.rope.scaling.original_seq", original, from("yarn-original-max-position-embeddings"));
  job.put("model.rope.scaling.beta_fast", of("yarn-beta-fast", YARN.betaFast), from("yarn-beta-fast"));
  job.put("model.rope.scaling.beta_slow", of("yarn-beta-slow", YARN.betaSlow), from("yarn-beta-slow"));
  job.put("model.rope.scaling.mscale", args.number("mscale"), ["mscale"]);
  job.put("model.rope.scaling.mscale_all_dim", args.number("mscale-all-dim"), ["mscale-all-dim"]);
}
