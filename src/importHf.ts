/**
 * A Hugging Face config.json to a job: what the architecture says goes into `model`, the rest is a small run on one rank to start from.
 * A config that asks for what is not built here is refused, with every reason: a model that is nearly the same trains to something else.
 */
import { Document } from "yaml";
import type { z } from "zod";
import { type Device, devices, hasExperts, type Job, JobText } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";
import { type Config, type Experts, type Family, families, mustBe, mustBeOff } from "./hfFamilies.ts";

type JobInput = z.input<typeof JobText>;
type Model = JobInput["model"];
type Rope = NonNullable<Model["rope"]>;

/** What a job may have at most; schemas/job.ts. */
const MOST_LAYERS = 65536;

/** What DeepSeek-V3 ended its training with; configs do not say. */
const DEPTHS_WEIGH = 0.1;

// Long contexts are for use, not for a first training run: attention memory grows with the square.
const FIRST_SEQ = 4096;

export interface ImportSettings {
  /** Take multi-token prediction, too, which transformers leaves out. */
  readonly mtp?: boolean;
}

export function importHf(
  config: unknown,
  name: string,
  { mtp = false }: ImportSettings = {},
): { readonly job: JobInput; readonly notes: readonly string[] } {
  if (!isRecord(config)) throw new Trouble("the config is not a JSON object", "name the config.json of a Hugging Face model");
  const type = config.model_type;
  const family = typeof type === "string" && Object.hasOwn(families, type) ? families[type] : undefined;
  if (family === undefined) {
    throw new Trouble(
      `model_type ${JSON.stringify(type) ?? "is missing and"} cannot be imported`,
      `models of these types can: ${Object.keys(families).join(", ")}`,
    );
  }
  const reasons: string[] = [];
  const read = reader(config, reasons);

  const hidden = read.count("hidden_size");
  const heads = read.count("num_attention_heads");
  const layers = read.count("num_hidden_layers");
  const positions = read.count("max_position_embeddings", FIRST_SEQ);
  const seq = Math.min(positions, FIRST_SEQ);
  const mla = latentOf(family, read);
  const biases = family.bias && (family.bias.key === null || read.flag(family.bias.key, family.bias.otherwise)) ? family.bias.of : "none";
  const attentionDropout = read.real("attention_dropout", 0);
  const model = {
    layers,
    hidden,
    ffn: read.count("intermediate_size"),
    heads,
    kv_heads: read.count("num_key_value_heads", family.kvHeads === "heads" ? heads : family.kvHeads),
    ...(mla ? { mla } : { head_dim: headDimOf(family, read, reasons, hidden, heads) }),
    vocab: read.count("vocab_size"),
    seq,
    norm: { type: "rmsnorm" as const, eps: read.real("rms_norm_eps", family.eps) },
    rope: ropeOf(config, family, read, reasons),
    activation: "swiglu" as const,
    tie_embeddings: read.flag("tie_word_embeddings", false),
    ...(biases === "none" ? {} : { qkv_bias: true }),
    ...(biases === "all" ? { out_bias: true } : {}),
    qk_norm: family.qkNorm,
    ...(attentionDropout > 0 ? { dropout: { attention: attentionDropout } } : {}),
    moe: family.moe && expertsOf(config, family.moe, read, reasons, layers),
    ...(mtp && { mtp: { layers: read.count("num_nextn_predict_layers"), coeff: DEPTHS_WEIGH } }),
  };
  if (mla && model.kv_heads !== heads)
    reasons.push(`num_key_value_heads ${model.kv_heads} is not supported: each of the ${heads} heads has its own keys and values`);
  const initStd = read.real("initializer_range", 0.02);
  reasons.push(...unsupported(config, type as string, family, seq), ...(family.never ?? []));
  if (reasons.length > 0) {
    throw new Trouble(
      `this ${type} config cannot be imported:${reasons.map((reason) => `\n  ${reason}`).join("")}`,
      "import a model without these",
    );
  }
  const job: JobInput = {
    name,
    model,
    parallel: { world: 1 },
    train: {
      micro_batch: 1,
      global_batch: 8,
      steps: 1000,
      precision: "bf16",
      init_std: initStd,
      optimizer: { type: "adamw", lr: 3e-4, min_lr: 3e-5, warmup_steps: 100, decay_steps: 1000, schedule: "cosine" },
    },
    data: { path: "corpus.txt", tokenizer: "bytes" },
    cluster: { nodes: 1, gpus_per_node: 1, device: roomiest(bytesToTrain(model)) },
  };
  // a size past what a job may say, such as a million layers
  const issues = JobText.safeParse(job).error?.issues ?? [];
  if (issues.length > 0) {
    const lines = issues.map(({ path, message }) => `\n  ${path.join(".")}: ${message}`);
    throw new Trouble(`this ${type} config makes no valid job:${lines.join("")}`, "import a smaller model");
  }
  return { job, notes: notesOf(config, model, positions) };
}

/** The same as the text of a job file, with what was assumed as comments above. */
export function importHfText(config: unknown, name: string, settings: ImportSettings = {}): string {
  const { job, notes } = importHf(config, name, settings);
  const document = new Document(job);
  document.commentBefore = [
    ` ${name}: the model is that of the Hugging Face config; parallel, train, data and cluster are a start, to be set.`,
    ...notes.map((note) => ` ${note}`),
  ].join("\n");
  return document.toString({ lineWidth: 140 });
}

interface Reader {
  count(key: string, otherwise?: number): number;
  /** The first of these keys that is given. */
  countOf(keys: readonly string[]): number;
  /** null says none; a key that is not written has the default. */
  countOrNone(key: string, otherwise: number | null): number | null;
  real(key: string, otherwise: number): number;
  flag(key: string, otherwise: boolean): boolean;
}

/** Reads keys; what is missing or of another type is noted as a reason, and reading goes on. null counts as not given, as in transformers. */
function reader(config: Config, reasons: string[]): Reader {
  const refuse = (key: string, wanted: string): number => {
    reasons.push(config[key] == null ? `${key} is missing` : `${key} is ${JSON.stringify(config[key])}; expected ${wanted}`);
    return 1;
  };
  const count: Reader["count"] = (key, otherwise) => {
    const value = config[key] ?? otherwise;
    const given = config[key] != null;
    if (typeof value === "number" && (given ? Number.isSafeInteger(value) && value > 0 : true)) return value;
    return refuse(key, "a whole number of 1 or more");
  };
  return {
    count,
    countOf: (keys) => count(keys.find((key) => config[key] != null) ?? keys[0]!),
    countOrNone(key, otherwise) {
      if (config[key] === null || (config[key] === undefined && otherwise === null)) return null;
      return count(key, otherwise ?? undefined);
    },
    real: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : refuse(key, "a number of 0 or more");
    },
    flag: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      return typeof value === "boolean" ? value : refuse(key, "true or false") === 0;
    },
  };
}

function headDimOf(family: Family, read: Reader, reasons: string[], hidden: number, heads: number): number {
  const headDim = read.count("head_dim", family.headDim === "quotient" ? hidden / heads : family.headDim);
  if (!Number.isInteger(headDim))
    reasons.push(`head_dim is not given and hidden_size ${hidden} is not a multiple of num_attention_heads ${heads}`);
  return headDim;
}

function latentOf({ latent }: Family, read: Reader): Model["mla"] {
  if (!latent) return null;
  return {
    q_rank: read.countOrNone("q_lora_rank", latent.queryRank),
    kv_rank: read.count("kv_lora_rank", 512),
    nope_dim: read.count("qk_nope_head_dim", 128),
    rope_dim: read.count("qk_rope_head_dim", 64),
    v_dim: read.count("v_head_dim", 128),
  };
}

/** transformers 5 writes rope_parameters; before it, rope_theta and (for stretched contexts) rope_scaling. */
function ropeOf(config: Config, family: Family, read: Reader, reasons: string[]): Rope {
  const inner = isRecord(config.rope_parameters) ? config.rope_parameters : isRecord(config.rope_scaling) ? config.rope_scaling : {};
  const part = inner.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  if (part !== 1) reasons.push(`partial_rotary_factor ${JSON.stringify(part)} is not supported: the whole head is rotated`);
  const own = reader(inner, reasons);
  const theta = inner.rope_theta == null ? read.real("rope_theta", family.theta) : own.real("rope_theta", family.theta);
  const woven = family.latent?.interleaved ?? false;
  const interleaved = typeof woven === "string" ? read.flag(woven, true) : woven;
  const scaling = scalingOf(inner, config, own, reasons);
  return { theta, ...(interleaved && { interleaved }), ...(scaling && { scaling }) };
}

function scalingOf(inner: Config, config: Config, own: Reader, reasons: string[]): Rope["scaling"] {
  const type = inner.rope_type ?? inner.type ?? "default";
  // a model's own key counts more than the one inside, as in transformers
  const original = (): number => {
    const above = reader(config, reasons);
    return (
      above.countOrNone("original_max_position_embeddings", null) ??
      own.count("original_max_position_embeddings", above.count("max_position_embeddings", FIRST_SEQ))
    );
  };
  switch (type) {
    case "default":
      return null;
    case "linear":
      return { type: "linear", factor: own.real("factor", 1) };
    case "llama3":
      return {
        ...{ type: "llama3" as const, factor: own.real("factor", 1), original_seq: original() },
        ...{ low_freq: own.real("low_freq_factor", 1), high_freq: own.real("high_freq_factor", 4) },
      };
    case "yarn": {
      if (inner.truncate === false)
        reasons.push("rope truncate false is not supported: the pairs between which scaling sets in are whole numbers");
      const seq = original();
      const above = typeof config.max_position_embeddings === "number" ? config.max_position_embeddings : seq;
      // null and 0 count as not given
      const given = (key: string) => (inner[key] ? own.real(key, 0) : null);
      return {
        ...{ type: "yarn" as const, factor: own.real("factor", above / seq), original_seq: seq },
        ...{ beta_fast: given("beta_fast") ?? 32, beta_slow: given("beta_slow") ?? 1 },
        ...{ mscale: given("mscale"), mscale_all_dim: given("mscale_all_dim") },
        attention_factor: inner.attention_factor == null ? null : own.real("attention_factor", 1),
      };
    }
    default:
      reasons.push(`rope of type ${JSON.stringify(type)} is not supported: wavelengths are stretched by linear, llama3 or yarn`);
      return null;
  }
}

function expertsOf(config: Config, of: Experts, read: Reader, reasons: string[], layers: number): NonNullable<Model["moe"]> {
  const { normalize, shared } = of;
  const width = read.count(of.ffn);
  const topK = read.count("num_experts_per_tok");
  const beside = shared === null ? 0 : shared.gate ? read.count(shared.ffn) : width * read.count(shared.widths, shared.otherwise);
  const pattern = layersOf(config, of, read, reasons, layers);
  const router = {
    score: of.score,
    normalize_top_k: typeof normalize === "boolean" ? normalize : read.flag(normalize.key, normalize.otherwise),
    ...(of.scaling === null ? {} : { scaling: read.real("routed_scaling_factor", of.scaling) }),
    ...(of.exact && { precision: "fp32" as const }),
    ...groupsOf(config, of, read, reasons),
    ...(of.expertBias && { expert_bias: true }),
    ...balance(read.real("router_aux_loss_coef", of.auxCoeff)),
  };
  return {
    ...{ experts: read.countOf(of.count), top_k: topK, ffn: width },
    ...(beside > 0 && { shared: { ffn: beside, gate: shared!.gate } }),
    layers: pattern,
    router,
  };
}

function groupsOf(config: Config, { groups }: Experts, read: Reader, reasons: string[]) {
  if (groups === null) return {};
  const method = groups.method === undefined ? "group_limited_greedy" : (config[groups.method] ?? "greedy");
  if (method === "greedy") return {};
  if (method !== "group_limited_greedy")
    reasons.push(`${groups.method} ${JSON.stringify(method)} is not supported: greedy or group_limited_greedy`);
  const count = read.count("n_group", groups.count ?? undefined);
  const chosen = read.count("topk_group", groups.chosen ?? undefined);
  return count > 1 ? { groups: count, group_top_k: chosen, group_scores: groups.scores } : {};
}

type Layers = NonNullable<NonNullable<Model["moe"]>["layers"]>;

function layersOf(config: Config, { layers: by }: Experts, read: Reader, reasons: string[], layers: number): Layers {
  if (by === "all") return "all";
  if (by !== "sparse_step") {
    const first = config[by.after] ?? by.otherwise;
    if (typeof first === "number" && Number.isSafeInteger(first) && first >= 0) return first === 0 ? "all" : { first_dense: first };
    reasons.push(`${by.after} is ${JSON.stringify(first)}; expected a whole number of 0 or more`);
    return "all";
  }
  const step = read.count("decoder_sparse_step", 1);
  const denseLayers: unknown = config.mlp_only_layers ?? [];
  if (!Array.isArray(denseLayers) || !denseLayers.every((l) => Number.isSafeInteger(l) && l >= 0)) {
    reasons.push(`mlp_only_layers is ${JSON.stringify(denseLayers)}; expected a list of layers`);
    return "all";
  }
  if (layers > MOST_LAYERS) return "all"; // refused as a size, below
  const pattern = Array.from({ length: layers }, (_, l) =>
    (l + 1) % step === 0 && !denseLayers.includes(l) ? (1 as const) : (0 as const),
  );
  return pattern.every((has) => has === 1) ? "all" : pattern;
}

const balance = (coefficient: number) =>
  coefficient > 0 ? ({ balance: "aux_loss", aux_coeff: coefficient } as const) : ({ balance: "none", aux_coeff: 0 } as const);

/** Keys that change what the model computes. */
function unsupported(config: Config, type: string, family: Family, seq: number): readonly string[] {
  const off = (value: unknown): boolean => value == null || value === false || value === 0;
  const reasons: string[] = [];
  if ((config.hidden_act ?? "silu") !== "silu")
    reasons.push(`hidden_act ${JSON.stringify(config.hidden_act)} is not supported: the feed-forward part is silu(gate) x up`);
  const biases = family.bias === null && !off(config.attention_bias);
  if (biases) reasons.push(`attention_bias ${JSON.stringify(config.attention_bias)} is not supported: these layers have no biases`);
  for (const [key, why] of Object.entries(mustBeOff)) {
    if (!off(config[key])) reasons.push(`${key} ${JSON.stringify(config[key])} is not supported: ${why}`);
  }
  for (const [key, { value, why }] of Object.entries(mustBe[type] ?? {})) {
    if (config[key] != null && config[key] !== value) reasons.push(`${key} ${JSON.stringify(config[key])} is not supported: ${why}`);
  }
  const window = config.sliding_window === undefined ? (family.window?.otherwise ?? null) : config.sliding_window;
  const asked = family.window?.only === undefined ? config.use_sliding_window !== false : config[family.window.only] === true;
  if (asked && !off(window) && !(typeof window === "number" && window >= seq)) {
    reasons.push(`sliding_window ${JSON.stringify(window)} is shorter than a sequence of ${seq}: attention here sees all earlier tokens`);
  }
  return reasons;
}

type Sized = Model & { readonly ffn: number; readonly kv_heads: number };

/** Parameters of the model; of latent attention about. */
function parametersOf({ layers, hidden, heads, kv_heads, head_dim = 0, mla, vocab, ffn, moe, mtp }: Sized): number {
  const attention = mla
    ? hidden * (mla.kv_rank + mla.rope_dim + heads * mla.v_dim) +
      mla.kv_rank * heads * (mla.nope_dim + mla.v_dim) +
      heads * (mla.nope_dim + mla.rope_dim) * (mla.q_rank ?? hidden) +
      (mla.q_rank ?? 0) * hidden
    : 2 * hidden * head_dim * (heads + kv_heads);
  const sparse = Array.from({ length: Math.min(layers, MOST_LAYERS) }, (_, l) => hasExperts({ moe: moe as Job["model"]["moe"] }, l)).filter(
    Boolean,
  ).length;
  const width = moe ? moe.experts * moe.ffn! + (moe.shared?.ffn ?? 0) : 0;
  const ahead = mtp?.layers ?? 0;
  const further = ahead * (attention + 3 * hidden * (moe ? width : ffn) + 2 * hidden * hidden);
  return layers * attention + 3 * hidden * (sparse * width + (layers - sparse) * ffn) + 2 * vocab * hidden + further;
}

/** bf16 parameters, f32 gradients, master weights and two moments. */
const bytesToTrain = (model: Sized): number => 18 * parametersOf(model);

/** The smallest GPU with twice this memory: activations need room as well; else the largest there is. */
function roomiest(bytes: number): Device {
  const gpus = Object.entries(devices).filter(([name]) => name !== "cpu");
  const bySize = gpus.sort(([, a], [, b]) => a.memory - b.memory).map(([name, { memory }]) => ({ name: name as Device, memory }));
  return (bySize.find(({ memory }) => memory > 2 * bytes) ?? bySize.at(-1)!).name;
}

function notesOf(config: Config, model: Sized, positions: number): readonly string[] {
  const notes: string[] = [];
  if (model.seq < positions) notes.push(`model.seq: the model takes up to ${positions} tokens; training starts with ${model.seq}.`);
  if (model.vocab !== 256)
    notes.push(
      `data: the text is read as bytes, of which a vocabulary of ${model.vocab} uses ${model.vocab < 256 ? "too few: ASCII at most" : "the first 256 ids"}.`,
    );
  if (model.moe != null && model.moe.router?.balance === "aux_loss") {
    notes.push(
      "model.moe.router.aux_coeff: taken from router_aux_loss_coef; transformers counts over all layers and all k choices at once, here each layer is",
    );
    notes.push("balanced by itself, as in Megatron Core: the same number weighs differently.");
  }
  if (model.moe?.router?.expert_bias) {
    notes.push(
      "model.moe.router.bias_rate: the config does not say how far the experts' biases move in a step; DeepSeek-V3 trained with 0.001.",
    );
  }
  if (model.mtp)
    notes.push("model.mtp.coeff: the config does not say how much further tokens weigh; DeepSeek-V3 trained with 0.3, then 0.1.");
  else if (typeof config.num_nextn_predict_layers === "number" && config.num_nextn_predict_layers > 0) {
    notes.push(
      `model.layers: a checkpoint's further layers (${config.num_nextn_predict_layers}), which predict tokens after the next, are not read; --mtp takes them.`,
    );
  }
  const bytes = bytesToTrain(model);
  const gpus = Math.ceil(bytes / devices["b200-192gb"].memory);
  if (gpus > 1)
    notes.push(
      `parallel: weights, gradients and optimizer take about ${Math.round(bytes / 1e9)} GB: raise world and the degrees before a run.`,
    );
  if (config.dtype !== undefined || config.torch_dtype !== undefined) {
    notes.push(
      `train.precision: the checkpoint is kept in ${config.dtype ?? config.torch_dtype}; training here is bf16 with f32 master weights.`,
    );
  }
  return notes;
}

const isRecord = (value: unknown): value is Config => typeof value === "object" && value !== null && !Array.isArray(value);
