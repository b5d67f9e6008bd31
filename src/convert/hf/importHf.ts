/**
 * Converts a Hugging Face config.json to a job. `model` is the architecture of the config; the other sections are defaults for one rank.
 * A config with features that rankc lacks is rejected with all reasons, because a similar model would give other numbers.
 */
import { Document } from "yaml";
import type { z } from "zod";
import { completeJob, JobText } from "../../../schemas/job.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { type Config, isRecord, type Reader, reader, shown } from "./configReader.ts";
import { aliases, type Experts, type Family, families, mustBe, mustBeOff } from "./families.ts";
import { bytesToTrain, notesOf, roomiest } from "./notes.ts";

type JobInput = z.input<typeof JobText>;
type Model = JobInput["model"];
type Rope = NonNullable<Model["rope"]>;

/** The longest layer pattern that is built. The limit of model.layers, which the schema reports, is far below it. */
const MOST_LAYERS = 65536;

/** The coefficient at the end of DeepSeek-V3's training; configs do not contain it. */
const MTP_COEFF = 0.1;

// A first training run uses a shorter context: attention memory grows with its square.
const FIRST_SEQ = 4096;

// With more experts, several logits of a token are equal in bf16 (rule E423).
const MANY_EXPERTS = 32;

/** Settings of the import. */
export interface ImportSettings {
  /** Include multi-token prediction, which transformers omits. */
  readonly mtp?: boolean;
}

/** Converts a config to a job. Throws a Trouble that lists all unsupported features. */
export function importHf(
  config: unknown,
  name: string,
  { mtp = false }: ImportSettings = {},
): { readonly job: JobInput; readonly notes: readonly string[] } {
  if (!isRecord(config)) throw new Trouble("the config is not a JSON object", "name the config.json of a Hugging Face model");
  const type = typeOf(config);
  if (type === undefined) throw unknownType(config);
  const family = families[type]!;
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
    ...(mtp && { mtp: { layers: read.count("num_nextn_predict_layers"), coeff: MTP_COEFF } }),
  };
  if (mla && model.kv_heads !== heads)
    reasons.push(`num_key_value_heads ${model.kv_heads} is not supported: each of the ${heads} heads has its own keys and values`);
  const initStd = read.real("initializer_range", 0.02);
  const window = windowOf(config, family);
  if (config.quantization_config != null && !isRecord(config.quantization_config))
    reasons.push(`quantization_config is ${shown(config.quantization_config)}; expected an object`);
  reasons.push(...unsupported(config, type, family), ...shortWindow(window, seq), ...(family.never ?? []));
  if (reasons.length > 0) {
    throw new Trouble(
      `this ${config.model_type} config cannot be imported:${reasons.map((reason) => `\n  ${reason}`).join("")}`,
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
      init: { std: initStd },
      optimizer: { type: "adamw", lr: 3e-4, min_lr: 3e-5, warmup_steps: 100, decay_steps: 1000, schedule: "cosine" },
    },
    data: { path: "corpus.txt", tokenizer: "bytes" },
    cluster: { nodes: 1, gpus_per_node: 1 },
  };
  const { data, error } = JobText.safeParse(job);
  if (error) {
    // the size exceeds the limits of the schema
    const lines = error.issues.map(({ path, message }) => `\n  ${path.join(".")}: ${message}`);
    throw new Trouble(`this ${type} config makes no valid job:${lines.join("")}`, "import a smaller model");
  }
  const complete = completeJob(data).model;
  return {
    job: { ...job, cluster: { ...job.cluster, device: roomiest(bytesToTrain(complete)) } },
    notes: notesOf(config, complete, { experts: family.moe, positions, window }),
  };
}

/** Returns the key in `families` for a config; undefined if rankc does not support the model. */
function typeOf({ model_type: type }: Config): string | undefined {
  if (typeof type !== "string") return undefined;
  const own = (Object.hasOwn(aliases, type) ? aliases[type] : undefined) ?? type;
  return Object.hasOwn(families, own) ? own : undefined;
}

/** Keys of the text model's config in multimodal configs. */
const TEXT_MODELS = ["text_config", "language_config", "llm_config"];

function unknownType(config: Config): Trouble {
  const title = config.model_type == null ? "the config has no model_type" : `model_type ${shown(config.model_type)} cannot be imported`;
  for (const key of TEXT_MODELS) {
    const inner = config[key];
    if (isRecord(inner) && typeOf(inner) !== undefined)
      return new Trouble(
        `${title}; its ${key}, of type ${shown(inner.model_type)}, can`,
        `write the value of ${key} to a file of its own and import that`,
      );
  }
  const names = [...Object.entries(families).flatMap(([name, { never }]) => (never === undefined ? [name] : [])), ...Object.keys(aliases)];
  return new Trouble(title, `models of these types can: ${names.sort().join(", ")}`);
}

/** Returns the text of a job file, with notes as comments. Throws like `importHf`. */
export function importHfText(config: unknown, name: string, settings: ImportSettings = {}): string {
  const { job, notes } = importHf(config, name, settings);
  const document = new Document(job);
  document.commentBefore = [
    // a carriage return ends a YAML comment
    ` ${name.replace(/\p{Cc}/gu, " ")}: the model is that of the Hugging Face config; parallel, train, data and cluster are a start, to be set.`,
    ...notes.map((note) => ` ${note}`),
  ].join("\n");
  return document.toString({ lineWidth: 140 });
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

/** Reads RoPE: transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling. */
function ropeOf(config: Config, family: Family, read: Reader, reasons: string[]): Rope {
  for (const key of ["rope_parameters", "rope_scaling"])
    if (config[key] != null && !isRecord(config[key])) reasons.push(`${key} is ${shown(config[key])}; expected an object`);
  const inner = isRecord(config.rope_parameters) ? config.rope_parameters : isRecord(config.rope_scaling) ? config.rope_scaling : {};
  const part = inner.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  if (part !== 1) reasons.push(`partial_rotary_factor ${shown(part)} is not supported: the whole head is rotated`);
  const own = reader(inner, reasons);
  const theta = inner.rope_theta == null ? read.real("rope_theta", family.theta) : own.real("rope_theta", family.theta);
  const woven = family.latent?.interleaved ?? false;
  const interleaved = typeof woven === "string" ? read.flag(woven, true) : woven;
  const scaling = scalingOf(inner, config, own, reasons);
  return { theta, ...(interleaved && { interleaved }), ...(scaling && { scaling }) };
}

function scalingOf(inner: Config, config: Config, own: Reader, reasons: string[]): Rope["scaling"] {
  const type = inner.rope_type ?? inner.type ?? "default";
  // the outer key has precedence, as in transformers
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
      // null and 0 mean not set
      const given = (key: string) => (inner[key] ? own.real(key, 0) : null);
      return {
        ...{ type: "yarn" as const, factor: own.real("factor", above / seq), original_seq: seq },
        ...{ beta_fast: given("beta_fast") ?? 32, beta_slow: given("beta_slow") ?? 1 },
        ...{ mscale: given("mscale"), mscale_all_dim: given("mscale_all_dim") },
        attention_factor: inner.attention_factor == null ? null : own.real("attention_factor", 1),
      };
    }
    default:
      reasons.push(`rope of type ${shown(type)} is not supported: wavelengths are stretched by linear, llama3 or yarn`);
      return null;
  }
}

function expertsOf(config: Config, of: Experts, read: Reader, reasons: string[], layers: number): NonNullable<Model["moe"]> {
  const { normalize, shared } = of;
  const experts = read.countOf(of.count);
  const width = read.count(of.ffn);
  const topK = read.count("num_experts_per_tok");
  const beside = shared === null ? 0 : shared.gate ? read.count(shared.ffn) : width * read.count(shared.widths, shared.otherwise);
  const pattern = layersOf(config, of, read, reasons, layers);
  const router = {
    score: of.score,
    normalize_top_k: typeof normalize === "boolean" ? normalize : read.flag(normalize.key, normalize.otherwise),
    ...(of.scaling === null ? {} : { scaling: read.real("routed_scaling_factor", of.scaling) }),
    ...((of.exact || experts >= MANY_EXPERTS) && { precision: "fp32" as const }),
    ...groupsOf(config, of, read, reasons),
    ...(of.expertBias && { expert_bias: true }),
    ...balanceOf(of, read),
  };
  return {
    ...{ experts, top_k: topK, ffn: width },
    ...(beside > 0 && { shared: { ffn: beside, gate: shared!.gate } }),
    layers: pattern,
    router,
  };
}

function groupsOf(config: Config, { groups }: Experts, read: Reader, reasons: string[]) {
  if (groups === null) return {};
  const method = groups.method === undefined ? "group_limited_greedy" : (config[groups.method] ?? "greedy");
  if (method === "greedy") return {};
  if (method !== "group_limited_greedy") reasons.push(`${groups.method} ${shown(method)} is not supported: greedy or group_limited_greedy`);
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
    reasons.push(`${by.after} is ${shown(first)}; expected a whole number of 0 or more`);
    return "all";
  }
  const step = read.count("decoder_sparse_step", 1);
  const denseLayers: unknown = config.mlp_only_layers ?? [];
  if (!Array.isArray(denseLayers) || !denseLayers.every((l) => Number.isSafeInteger(l) && l >= 0)) {
    reasons.push(`mlp_only_layers is ${shown(denseLayers)}; expected a list of layers`);
    return "all";
  }
  if (layers > MOST_LAYERS) return "all"; // refused as a size by the schema
  const dense = new Set(denseLayers);
  const pattern = Array.from({ length: layers }, (_, l) => ((l + 1) % step === 0 && !dense.has(l) ? (1 as const) : (0 as const)));
  return pattern.every((has) => has === 1) ? "all" : pattern;
}

/** The balancing loss. DeepSeek's code multiplies shares of the counts by mean scores as Megatron Core does: aux_loss_alpha is the same number. */
function balanceOf({ aux }: Experts, read: Reader) {
  const coefficient = read.real(aux.key, aux.otherwise);
  const perSequence = aux.perSequence !== null && read.flag(aux.perSequence, true);
  if (coefficient === 0) return { balance: "none", aux_coeff: 0 } as const;
  return { balance: perSequence ? "seq_aux_loss" : "aux_loss", aux_coeff: coefficient } as const;
}

/** Checks keys that change the arithmetic of the model. */
function unsupported(config: Config, type: string, family: Family): readonly string[] {
  const reasons: string[] = [];
  const { hidden_act: act = null } = config;
  if (act !== null && act !== "silu" && act !== "swish")
    reasons.push(`hidden_act ${shown(act)} is not supported: the feed-forward part is silu(gate) x up`);
  const biases = family.bias === null && !isOff(config.attention_bias);
  if (biases) reasons.push(`attention_bias ${shown(config.attention_bias)} is not supported: these layers have no biases`);
  for (const [key, why] of Object.entries(mustBeOff)) {
    if (!isOff(config[key])) reasons.push(`${key} ${shown(config[key])} is not supported: ${why}`);
  }
  for (const [key, { value, why }] of Object.entries(mustBe[type] ?? {})) {
    if (config[key] != null && config[key] !== value) reasons.push(`${key} ${shown(config[key])} is not supported: ${why}`);
  }
  const other = [config.layer_types].flat().find((kind) => kind != null && kind !== "full_attention" && kind !== "sliding_attention");
  if (other !== undefined) reasons.push(`layer_types ${shown(other)} is not supported: every layer has attention over all earlier tokens`);
  return reasons;
}

const isOff = (value: unknown): boolean => value == null || value === false || value === 0;

/** Returns the attention window in tokens; null: no limit. */
function windowOf(config: Config, { window }: Family): unknown {
  const asked = window?.only === undefined ? config.use_sliding_window !== false : config[window.only] === true;
  const width = config.sliding_window === undefined ? (window?.otherwise ?? null) : config.sliding_window;
  return asked && !isOff(width) ? width : null;
}

function shortWindow(window: unknown, seq: number): readonly string[] {
  if (window === null || (typeof window === "number" && window >= seq)) return [];
  return [`sliding_window ${shown(window)} is shorter than a sequence of ${seq}: attention here covers all earlier tokens`];
}
