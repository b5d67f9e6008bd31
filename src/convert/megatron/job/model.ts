/** The section `model` of a job, without its experts (moe.ts): sizes, attention, positions, norms and what a launch leaves out. */
import type { MappedName } from "../arguments/spec.ts";
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
  putActivation({ args, job });
  putBiases({ args, job });
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
  if (args.text("normalization") === "RMSNorm") job.put("model.norm.type", "rmsnorm", ["normalization"]);
  else job.refuse("--normalization LayerNorm, Megatron's default", "norms are RMSNorm", "--normalization RMSNorm, if the model has it");
  job.put("model.norm.eps", args.number("norm-epsilon"), ["norm-epsilon"]);
  if (isLatent) {
    job.put("model.mla.norm_eps", args.number("norm-epsilon"), ["norm-epsilon"]);
    if (!args.has("qk-layernorm"))
      job.refuse(
        "no --qk-layernorm, beside --multi-latent-attention",
        "latents are always normalised",
        "--qk-layernorm, if the model has it",
      );
  } else if (args.has("qk-layernorm")) job.put("model.qk_norm", "head", ["qk-layernorm"]);
}

function putPositions({ args, job }: Importing, isLatent: boolean): void {
  const type = args.has("use-rotary-position-embeddings") ? "rope" : args.text("position-embedding-type");
  if (type !== "rope" && type !== "yarn") {
    const isDefault = !args.has("position-embedding-type");
    job.refuse(
      `--position-embedding-type ${type}${isDefault ? ", Megatron's default" : ""}`,
      "positions are rotary",
      "--position-embedding-type rope, if the model has it",
    );
    return;
  }
  job.put("model.rope.theta", args.number("rotary-base"), ["rotary-base"]);
  job.decides("position-embedding-type", "model.rope");
  job.decides("use-rotary-position-embeddings", "model.rope");
  const percent = args.number("rotary-percent");
  if (percent !== 1 && !isLatent)
    job.refuse(`--rotary-percent ${percent}`, "the whole head is rotated", "import a model with --rotary-percent 1.0");
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

function putActivation({ args, job }: Importing): void {
  if (args.has("swiglu") && args.has("squared-relu"))
    job.reject("--swiglu --squared-relu", "Megatron refuses them together", "leave out one of them");
  const other = args.has("quick-geglu")
    ? "--quick-geglu"
    : args.has("squared-relu")
      ? "--squared-relu"
      : "no --swiglu: GELU, Megatron's default";
  if (args.has("swiglu")) job.put("model.activation", "swiglu", ["swiglu"]);
  else job.refuse(other, "the activation is SwiGLU, or GeGLU with the tanh approximation", "--swiglu, if the model has it");
  const softmax = args.text("softmax-type");
  if (softmax !== "vanilla") job.refuse(`--softmax-type ${softmax}`, "softmax is over the keys alone", "leave it out");
}

function putBiases({ args, job }: Importing): void {
  if (args.has("disable-bias-linear")) job.put("model.out_bias", false, ["disable-bias-linear"]);
  else
    job.refuse(
      "no --disable-bias-linear: biases everywhere, Megatron's default",
      "matrices of the feed-forward part and of experts have no biases",
      "--disable-bias-linear, if the model has none",
    );
  job.put("model.qkv_bias", args.has("add-qkv-bias"), ["add-qkv-bias"]);
}
