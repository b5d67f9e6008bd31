/**
 * A Hugging Face config.json to a job: what the architecture says goes into `model`, the rest is a small run on one rank to start from.
 * A config that asks for what is not built here is refused, with every reason: a model that is nearly the same trains to something else.
 */
import { Document } from "yaml";
import type { z } from "zod";
import { type Device, devices, JobText } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";

type Config = Readonly<Record<string, unknown>>;
type JobInput = z.input<typeof JobText>;

/** What transformers takes where config.json is silent, and how each architecture differs from the others. */
type Family = {
  readonly kvHeads: number | "heads";
  readonly headDim: number | "quotient";
  readonly theta: number;
  readonly eps: number;
  readonly window: number | null;
  readonly qkNorm: "none" | "head" | "full";
  readonly moe: null | { readonly experts: string; readonly normalizeTopK: boolean | string; readonly auxCoeff: number };
};
const dense = { headDim: "quotient", window: null, qkNorm: "none", moe: null } as const;
const families: Readonly<Record<string, Family>> = {
  llama: { ...dense, kvHeads: "heads", theta: 1e4, eps: 1e-6 },
  mistral: { ...dense, kvHeads: 8, theta: 1e4, eps: 1e-6, window: 4096 },
  qwen3: { ...dense, kvHeads: 32, headDim: 128, theta: 1e4, eps: 1e-6, qkNorm: "head" },
  mixtral: { ...dense, kvHeads: 8, theta: 1e6, eps: 1e-5, moe: { experts: "num_local_experts", normalizeTopK: true, auxCoeff: 0.001 } },
  olmoe: {
    ...dense,
    kvHeads: "heads",
    theta: 1e4,
    eps: 1e-5,
    qkNorm: "full",
    moe: { experts: "num_experts", normalizeTopK: "norm_topk_prob", auxCoeff: 0.01 },
  },
};

// Long contexts are for use, not for a first training run: attention memory grows with the square.
const FIRST_SEQ = 4096;

export function importHf(config: unknown, name: string): { readonly job: JobInput; readonly notes: readonly string[] } {
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
  const headDim = read.count("head_dim", family.headDim === "quotient" ? hidden / heads : family.headDim);
  if (!Number.isInteger(headDim))
    reasons.push(`head_dim is not given and hidden_size ${hidden} is not a multiple of num_attention_heads ${heads}`);
  const positions = read.count("max_position_embeddings", FIRST_SEQ);
  const seq = Math.min(positions, FIRST_SEQ);
  const ffn = read.count("intermediate_size");
  const vocab = read.count("vocab_size");
  const theta = ropeTheta(config, family, read, reasons);
  const moe = family.moe && {
    experts: read.count(family.moe.experts),
    top_k: read.count("num_experts_per_tok"),
    ffn,
    router: {
      score: "softmax" as const,
      normalize_top_k: typeof family.moe.normalizeTopK === "string" ? read.flag(family.moe.normalizeTopK) : family.moe.normalizeTopK,
      ...balance(read.real("router_aux_loss_coef", family.moe.auxCoeff)),
    },
  };
  const model = {
    layers: read.count("num_hidden_layers"),
    hidden,
    ffn,
    heads,
    kv_heads: read.count("num_key_value_heads", family.kvHeads === "heads" ? heads : family.kvHeads),
    head_dim: headDim,
    vocab,
    seq,
    norm: { type: "rmsnorm" as const, eps: read.real("rms_norm_eps", family.eps) },
    rope: { theta },
    activation: "swiglu" as const,
    tie_embeddings: read.flag("tie_word_embeddings"),
    qk_norm: family.qkNorm,
    moe,
  };
  const initStd = read.real("initializer_range", 0.02);
  reasons.push(...unsupported(config, family, seq));
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
export function importHfText(config: unknown, name: string): string {
  const { job, notes } = importHf(config, name);
  const document = new Document(job);
  document.commentBefore = [
    ` ${name}: the model is that of the Hugging Face config; parallel, train, data and cluster are a start, to be set.`,
    ...notes.map((note) => ` ${note}`),
  ].join("\n");
  return document.toString({ lineWidth: 140 });
}

type Reader = {
  readonly count: (key: string, otherwise?: number) => number;
  readonly real: (key: string, otherwise: number) => number;
  readonly flag: (key: string) => boolean;
};

/** Reads keys; what is missing or of another type is noted as a reason, and reading goes on. null counts as not given, as in transformers. */
function reader(config: Config, reasons: string[]): Reader {
  const refuse = (key: string, wanted: string): number => {
    reasons.push(config[key] == null ? `${key} is missing` : `${key} is ${JSON.stringify(config[key])}; expected ${wanted}`);
    return 1;
  };
  return {
    count: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      const given = config[key] != null;
      if (typeof value === "number" && (given ? Number.isSafeInteger(value) && value > 0 : true)) return value;
      return refuse(key, "a whole number of 1 or more");
    },
    real: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : refuse(key, "a number of 0 or more");
    },
    flag: (key) => {
      const value = config[key] ?? false;
      return typeof value === "boolean" ? value : refuse(key, "true or false") === 0;
    },
  };
}

/** transformers 5 writes rope_parameters; before it, rope_theta and (for stretched contexts) rope_scaling. */
function ropeTheta(config: Config, family: Family, read: Reader, reasons: string[]): number {
  const inner = isRecord(config.rope_parameters) ? config.rope_parameters : isRecord(config.rope_scaling) ? config.rope_scaling : {};
  const kind = inner.rope_type ?? inner.type ?? "default";
  if (kind !== "default") reasons.push(`rope of type ${JSON.stringify(kind)} is not supported: positions are rotated unscaled`);
  const part = inner.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  if (part !== 1) reasons.push(`partial_rotary_factor ${JSON.stringify(part)} is not supported: the whole head is rotated`);
  return inner.rope_theta == null ? read.real("rope_theta", family.theta) : reader(inner, reasons).real("rope_theta", family.theta);
}

const balance = (coefficient: number) =>
  coefficient > 0 ? ({ balance: "aux_loss", aux_coeff: coefficient } as const) : ({ balance: "none", aux_coeff: 0 } as const);

/** Keys that change what the model computes. */
function unsupported(config: Config, family: Family, seq: number): readonly string[] {
  const off = (value: unknown): boolean => value == null || value === false || value === 0;
  const reasons: string[] = [];
  if ((config.hidden_act ?? "silu") !== "silu")
    reasons.push(`hidden_act ${JSON.stringify(config.hidden_act)} is not supported: the feed-forward part is silu(gate) x up`);
  for (const [key, why] of Object.entries(mustBeOff)) {
    if (!off(config[key])) reasons.push(`${key} ${JSON.stringify(config[key])} is not supported: ${why}`);
  }
  const window = config.sliding_window === undefined ? family.window : config.sliding_window;
  if (config.use_sliding_window !== false && !off(window) && !(typeof window === "number" && window >= seq)) {
    reasons.push(`sliding_window ${JSON.stringify(window)} is shorter than a sequence of ${seq}: attention here sees all earlier tokens`);
  }
  return reasons;
}

const mustBeOff: Readonly<Record<string, string>> = {
  attention_bias: "linear layers have no bias",
  mlp_bias: "linear layers have no bias",
  clip_qkv: "queries, keys and values are not clipped",
  attention_dropout: "nothing is dropped",
  router_jitter_noise: "the router's input is not perturbed",
  quantization_config: "weights are trained unquantized",
};

type Model = JobInput["model"] & { readonly ffn: number; readonly kv_heads: number; readonly head_dim: number };

/** bf16 parameters, f32 gradients, master weights and two moments. */
function bytesToTrain({ layers, hidden, heads, kv_heads, head_dim, vocab, ffn, moe }: Model): number {
  const attention = 2 * hidden * head_dim * (heads + kv_heads);
  return 18 * (layers * (attention + 3 * hidden * ffn * (moe?.experts ?? 1)) + 2 * vocab * hidden);
}

/** The smallest GPU with twice this memory: activations need room as well; else the largest there is. */
function roomiest(bytes: number): Device {
  const gpus = Object.entries(devices).filter(([name]) => name !== "cpu");
  const bySize = gpus.sort(([, a], [, b]) => a.memory - b.memory).map(([name, { memory }]) => ({ name: name as Device, memory }));
  return (bySize.find(({ memory }) => memory > 2 * bytes) ?? bySize.at(-1)!).name;
}

function notesOf(config: Config, model: Model, positions: number): readonly string[] {
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
