/** Faults of keys and values: what the schema of jobs reports, as findings with their places and the likely intent. */
import leven from "leven";
import type { z } from "zod";
import { jobSchema } from "../../schemas/jobSchema.ts";
import { allowFault } from "../rules/allow.ts";
import { type Finding, SHOWN } from "./diagnostic.ts";
import { isObject, type Path, type Source, valueAt } from "./source.ts";

/** A finding with the likely intent: the correct key name, or a value of the correct type. */
export interface ShapeFault {
  readonly finding: Finding;
  readonly meant?: Meant;
}

/** The likely intent. `instead`: the misspelt key. `isCertain`: nobody would mean something else, so that `check --fix` applies it. */
interface Meant {
  readonly path: string;
  readonly value: unknown;
  readonly instead?: Path;
  readonly isCertain?: boolean;
}

/** The faults of keys and values in valid YAML. */
export const shapeFaults = {
  unknown: {
    code: "S010",
    title: "unknown key",
    why: "An unknown key would be ignored, and the default of the intended key would be used.",
    bad: "model: {hiden: 16}",
  },
  missing: { code: "S011", title: "a key is missing", why: "The key has no default.", bad: "train: {steps: null}" },
  type: {
    code: "S012",
    title: "a value of the wrong type",
    why: "rankc does not guess, because a wrong guess would train another model.",
    bad: "model: {layers: two}",
  },
  choice: {
    code: "S013",
    title: "not one of the choices",
    why: "rankc supports only the listed choices.",
    bad: "model: {activation: relu}",
  },
  range: {
    code: "S014",
    title: "a number out of range",
    why: "The value is not a valid size or count for this key.",
    bad: "model: {heads: 0}",
  },
  float: {
    code: "S015",
    title: "a number that float32 cannot hold",
    why: "Training computes in float32, whose largest number is 3.4e38. A larger number, or its product with a count, is infinite, and weights become NaN.",
    bad: "train: {optimizer: {lr: 1.0e39}}",
  },
  allow: allowFault,
} as const;

type Issue = z.core.$ZodIssue;
type Fault = (typeof shapeFaults)[keyof typeof shapeFaults];

/** Returns the faults of the issues that the schema reports of a source, one for each key. */
export function shapeFaultsIn(found: readonly Issue[], source: Source): ShapeFault[] {
  const issues = found.flatMap(ofItsKind).flatMap(oneByOne);
  const all = issues.flatMap((issue, i) => shapeFaultsOf(issue, source, i < SHOWN));
  // a misspelt key is one finding, not an unknown key and a missing key
  const renamed = all.flatMap(({ meant }) => (meant?.instead ? [meant.path] : []));
  return all.filter(({ finding }) => finding.code !== shapeFaults.missing.code || !renamed.includes(finding.path));
}

/** For a union type, returns the issues of the variant that the value matches; if none matches, the union error. */
function ofItsKind(issue: Issue): Issue[] {
  if (issue.code !== "invalid_union") return [issue];
  const within = (errors: readonly Issue[]) => errors.every((e) => e.path.length > 0 || e.code === "unrecognized_keys");
  const isSize = (errors: readonly Issue[]) => errors.every((e) => e.code === "too_small" || e.code === "too_big");
  const [own, ...others] = issue.errors.filter((errors) => within(errors) || isSize(errors));
  if (!own || others.length) return [issue];
  return own.flatMap((e) => ofItsKind({ ...e, path: [...issue.path, ...e.path] }));
}

/** Splits an issue with several unknown keys into one issue per key. */
const oneByOne = (issue: Issue): Issue[] =>
  issue.code === "unrecognized_keys" ? issue.keys.map((key) => ({ ...issue, keys: [key] })) : [issue];

/** Returns the finding of an issue. `detailed`: with its place and a suggestion, which needs a search of all keys. */
function shapeFaultsOf(issue: Issue, source: Source, detailed: boolean): ShapeFault[] {
  const path = issue.path.map((p) => (typeof p === "number" ? p : String(p)));
  const dotted = path.join(".");
  const schema = schemaAt(path);
  const meaning = typeof schema?.description === "string" ? `${dotted}: ${schema.description}. ` : "";
  const find: Find = (fault, where, part, found, fix, meant) => {
    const at = detailed ? source.at(where, part) : undefined;
    const finding: Finding = {
      code: fault.code,
      level: "error",
      title: fault.title,
      path: where.join("."),
      found,
      why: fault === shapeFaults.unknown ? fault.why : meaning + fault.why,
      fix,
      ...(meant && (meant.instead ? { renamed: { from: meant.instead, to: meant.path } } : { set: { [meant.path]: meant.value } })),
      ...(meant?.isCertain && { isSafe: true }),
      ...(at && { at }),
    };
    return { finding, ...(meant && { meant }) };
  };

  if (issue.code === "unrecognized_keys") {
    return issue.keys.map((key) => {
      const here = [...path, key];
      const likely = detailed ? likelyKey(key, path, schema) : undefined;
      return find(
        shapeFaults.unknown,
        here,
        "key",
        `${path.length ? `${dotted} has` : "a job has"} no key "${key}"`,
        likely ? `did you mean ${likely.path}?` : `leave it out; the keys here are ${keysOf(schema).join(", ")}`,
        likely ? { path: likely.path, value: valueAt(source.value, here), instead: here, isCertain: likely.isCertain } : undefined,
      );
    });
  }
  return [valueFaultOf(issue, path, schema, valueAt(source.value, path), detailed, find)];
}

type Find = (fault: Fault, where: Path, part: "key" | "value", found: string, fix: string, meant?: ShapeFault["meant"]) => ShapeFault;

/** Returns the fault of one value: it is missing, not a choice, out of range, or of another type. */
function valueFaultOf(issue: Issue, path: Path, schema: Schema | undefined, value: unknown, detailed: boolean, find: Find): ShapeFault {
  const dotted = path.join(".");
  const name = dotted || "the job";
  if (value === undefined || (value === null && schema?.default === undefined && !nullable(schema)))
    return find(
      shapeFaults.missing,
      path,
      "key",
      value === null ? `${name} is empty` : `${name} is not written`,
      `write ${dotted}: ${expected(schema)}`,
    );
  const choices = choicesOf(schema);
  const close = detailed && choices && typeof value === "string" ? closest(value, choices) : undefined;
  // a key may take a number or a word: a text that is near none of the words is of the wrong type
  const isChoice = close !== undefined || !isNumeric(schema);
  if (choices && isChoice && (typeof value === "string" || issue.code === "invalid_value")) {
    const only = close ?? (choices.length === 1 ? choices[0] : undefined);
    return find(
      shapeFaults.choice,
      path,
      "value",
      `${dotted} is ${show(value)}`,
      (choices.length > 1 || isNumeric(schema)) && only
        ? `did you mean ${only}? The choices are ${expected(schema)}`
        : `write ${expected(schema)}`,
      only === undefined ? undefined : { path: dotted, value: only, isCertain: typeof value === "string" && plain(value) === plain(only) },
    );
  }
  if ((issue.code === "too_small" || issue.code === "too_big") && typeof value === "number") {
    const { fault, limit } = limitOf(issue);
    return find(fault, path, "value", `${dotted} is ${value}`, `write ${expected(schema)}${limit}`);
  }
  const number = typeof value === "string" ? Number(value.replaceAll("_", "")) : Number.NaN;
  const truth = schema?.type === "boolean" && typeof value === "string" ? truths[value.toLowerCase()] : undefined;
  const meant = truth ?? (value !== "" && schema && variantsOf(schema).some((variant) => isNumberOf(variant, number)) ? number : undefined);
  return find(
    shapeFaults.type,
    path,
    "value",
    `${name} is ${value === null ? "empty" : show(value)}`,
    meant === undefined
      ? `${value === null ? "leave it out, or " : ""}write ${expected(schema)}`
      : `write ${truth === undefined ? `the number ${meant}, without quotes or separators` : meant}`,
    meant === undefined ? undefined : { path: dotted, value: meant, isCertain: true },
  );
}

/** Words for true and false in YAML 1.1, which are texts in YAML 1.2. */
const truths: Readonly<Record<string, boolean>> = { true: true, yes: true, on: true, false: false, no: false, off: false };

/** Returns a word without case, dashes and underscores. */
const plain = (word: string): string => word.toLowerCase().replaceAll(/[-_]/g, "");

/** The float32 bounds, which are not printed as bounds of a size. */
function limitOf(issue: Issue): { fault: Fault; limit: string } {
  const bound = issue.code === "too_big" ? issue.maximum : issue.code === "too_small" ? issue.minimum : 0;
  if (Math.abs(Number(bound)) < 1e30) return { fault: shapeFaults.range, limit: "" };
  return {
    fault: shapeFaults.float,
    limit: `, ${issue.code === "too_big" ? "at most" : "at least"} ${Number(Number(bound).toPrecision(4))}`,
  };
}

/** The subset of JSON Schema that jobSchema() uses. */
interface Schema {
  readonly type?: string;
  readonly description?: string;
  readonly default?: unknown;
  readonly const?: unknown;
  readonly enum?: readonly unknown[];
  readonly minimum?: number;
  readonly maximum?: number;
  readonly maxItems?: number;
  readonly maxLength?: number;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly items?: Schema | readonly Schema[];
  readonly anyOf?: readonly Schema[];
}

/** The schema, made for the first message: a job without shape faults needs none. */
let rootSchema: Schema | undefined;
function rootOfSchema(): Schema {
  rootSchema ??= jobSchema() as Schema;
  return rootSchema;
}

/** Returns the schema of a section without its null variant. */
const inside = (schema: Schema): Schema => schema.anyOf?.find((s) => s.properties) ?? schema;
const nullable = (schema: Schema | undefined): boolean => schema?.anyOf?.some((s) => s.type === "null") ?? false;

function schemaAt(path: Path): Schema | undefined {
  let here: Schema | undefined = rootOfSchema();
  for (const key of path) {
    const properties: Schema["properties"] = here && inside(here).properties;
    const items: Schema["items"] = here?.items ?? here?.anyOf?.find((s) => s.items)?.items;
    if (typeof key === "number") here = (Array.isArray(items) ? items[key] : items) as Schema | undefined;
    else here = properties && Object.hasOwn(properties, key) ? properties[key] : undefined;
  }
  return here;
}

/** Describes the valid values of a schema. */
function expected(schema: Schema | undefined): string {
  if (!schema) return "a value";
  if (schema.anyOf) return schema.anyOf.map((s) => (s.type === "null" ? "null" : expected(s))).join(" or ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.enum)
    return schema.enum.length > 1 ? `${schema.enum.slice(0, -1).join(", ")} or ${schema.enum.at(-1)}` : String(schema.enum[0]);
  switch (schema.type) {
    case "integer":
      return `a whole number${range(schema)}`;
    case "number":
      return `a number${range(schema)}`;
    case "boolean":
      return "true or false";
    case "string":
      return schema.maxLength === undefined ? "some text" : `a text of at most ${schema.maxLength} characters`;
    case "array":
      if (Array.isArray(schema.items)) return `a list of ${schema.items.length} numbers`;
      return schema.maxItems === undefined ? "a list" : `a list of at most ${schema.maxItems}`;
    default:
      return `a section with the keys ${Object.keys(inside(schema).properties ?? {}).join(", ")}`;
  }
}

function range({ minimum, maximum }: Schema): string {
  if (maximum !== undefined && maximum < Number.MAX_SAFE_INTEGER) return ` from ${minimum} to ${maximum}`;
  return minimum !== undefined && minimum > Number.MIN_SAFE_INTEGER ? ` of at least ${minimum}` : "";
}

const variantsOf = (schema: Schema): readonly Schema[] => schema.anyOf ?? [schema];
/** Returns whether a value may be a number. */
const isNumeric = (schema: Schema | undefined): boolean =>
  schema !== undefined && variantsOf(schema).some(({ type }) => type === "integer" || type === "number");

function choicesOf(schema: Schema | undefined): string[] | undefined {
  if (schema?.enum) return schema.enum.map(String);
  if (schema?.const !== undefined) return [String(schema.const)];
  const some = schema?.anyOf?.flatMap((s) => choicesOf(s) ?? []) ?? [];
  return some.length ? some : undefined;
}

function show(value: unknown): string {
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (isObject(value)) return "a section";
  if (typeof value !== "string") return String(value);
  return value.length > 60 ? `the text "${value.slice(0, 60)}…"` : `the text "${value}"`;
}

const isNumberOf = ({ type, minimum = -Infinity, maximum = Infinity }: Schema, n: number): boolean =>
  (type === "integer" ? Number.isInteger(n) : type === "number" && Number.isFinite(n)) && n >= minimum && n <= maximum;

/** Names of other tools for keys of a job. */
const foreignKeys: Readonly<Record<string, string>> = {
  tp: "parallel.tensor",
  tensor_parallel: "parallel.tensor",
  tensor_model_parallel_size: "parallel.tensor",
  sp: "parallel.sequence",
  sequence_parallel: "parallel.sequence",
  pp: "parallel.pipeline",
  pipeline_parallel: "parallel.pipeline",
  pipeline_model_parallel_size: "parallel.pipeline",
  ep: "parallel.expert",
  expert_parallel: "parallel.expert",
  expert_model_parallel_size: "parallel.expert",
  etp: "parallel.expert_tensor",
  expert_tensor_parallel_size: "parallel.expert_tensor",
  cp: "parallel.context",
  context_parallel_size: "parallel.context",
  dp: "parallel.data",
  world_size: "parallel.world",
  num_layers: "model.layers",
  num_hidden_layers: "model.layers",
  hidden_size: "model.hidden",
  intermediate_size: "model.ffn",
  ffn_hidden_size: "model.ffn",
  num_attention_heads: "model.heads",
  num_key_value_heads: "model.kv_heads",
  num_query_groups: "model.kv_heads",
  vocab_size: "model.vocab",
  seq_length: "model.seq",
  rope_theta: "model.rope.theta",
  rope_scaling: "model.rope.scaling",
  rotary_scaling_factor: "model.rope.scaling.factor",
  original_max_position_embeddings: "model.rope.scaling.original_seq",
  attention_bias: "model.qkv_bias",
  add_qkv_bias: "model.qkv_bias",
  multi_latent_attention: "model.mla",
  q_lora_rank: "model.mla.q_rank",
  kv_lora_rank: "model.mla.kv_rank",
  qk_nope_head_dim: "model.mla.nope_dim",
  qk_rope_head_dim: "model.mla.rope_dim",
  qk_pos_emb_head_dim: "model.mla.rope_dim",
  v_head_dim: "model.mla.v_dim",
  attention_dropout: "model.dropout.attention",
  hidden_dropout: "model.dropout.hidden",
  mtp_num_layers: "model.mtp.layers",
  num_nextn_predict_layers: "model.mtp.layers",
  mtp_loss_scaling_factor: "model.mtp.coeff",
  moe_input_jitter_eps: "model.moe.router.jitter",
  num_experts: "model.moe.experts",
  topk: "model.moe.top_k",
  micro_batch_size: "train.micro_batch",
  global_batch_size: "train.global_batch",
  train_iters: "train.steps",
  rampup_batch_size: "train.batch_rampup",
  calculate_per_token_loss: "train.loss_weighting",
  lr_decay_style: "train.optimizer.schedule",
  lr_decay_iters: "train.optimizer.decay_steps",
  lr_warmup_iters: "train.optimizer.warmup_steps",
  lr_warmup_init: "train.optimizer.warmup_init",
  lr_wsd_decay_iters: "train.optimizer.wsd_decay_steps",
  lr_wsd_decay_style: "train.optimizer.wsd_decay",
  weight_decay_incr_style: "train.optimizer.weight_decay_schedule",
  start_weight_decay: "train.optimizer.weight_decay_start",
  end_weight_decay: "train.optimizer.weight_decay_end",
  sgd_momentum: "train.optimizer.momentum",
  adam_eps: "train.optimizer.eps",
  adam_beta1: "train.optimizer.betas",
  adam_beta2: "train.optimizer.betas",
  fp16: "train.precision",
  bf16: "train.precision",
  initial_loss_scale: "train.loss_scale.initial",
  min_loss_scale: "train.loss_scale.min",
  loss_scale_window: "train.loss_scale.growth_interval",
  learning_rate: "train.optimizer.lr",
  clip_grad: "train.optimizer.clip",
};

const keysOf = (schema: Schema | undefined): string[] => Object.keys((schema && inside(schema).properties) ?? {});

/** Returns the keys of a section of a job, in the order of the schema. */
export const keysAt = (section: Path): string[] => keysOf(schemaAt(section));

/** Returns whether a key can only mean one other key of its section: it differs in case and dashes, or by a letter or two from this key alone. */
function isSlip(key: string, sibling: string, keys: readonly string[]): boolean {
  if (plain(key) === plain(sibling)) return true;
  const most = key.length < 4 ? 0 : key.length < 6 ? 1 : 2;
  return keys.every((other) => leven(key.toLowerCase(), other) <= most === (other === sibling));
}

/** Returns the likely key: a sibling with a similar spelling, a key of the same name elsewhere in the job, or an alias of another tool. */
function likelyKey(key: string, path: Path, schema: Schema | undefined): { path: string; isCertain: boolean } | undefined {
  const word = key.toLowerCase().replaceAll("-", "_");
  const keys = keysOf(schema);
  const sibling = closest(word, keys);
  if (sibling) return { path: [...path, sibling].join("."), isCertain: isSlip(key, sibling, keys) };
  const alias = Object.hasOwn(foreignKeys, word) ? foreignKeys[word] : undefined;
  if (alias !== undefined) return { path: alias, isCertain: true };
  const every = everyKey(rootOfSchema(), "");
  const last = (k: string) => k.split(".").at(-1)!;
  const name = every.some((k) => last(k) === word) ? word : closest(word, every.map(last));
  const near = name === undefined ? undefined : every.find((k) => last(k) === name);
  return near === undefined ? undefined : { path: near, isCertain: false };
}

function everyKey(schema: Schema, prefix: string): string[] {
  return Object.entries(inside(schema).properties ?? {}).flatMap(([key, s]) => [prefix + key, ...everyKey(s, `${prefix}${key}.`)]);
}

function closest(word: string, words: readonly string[]): string | undefined {
  if (word.length > 40) return undefined; // keys are shorter, and the edit distance has quadratic cost
  const ranked = words.map((w) => ({ w, far: leven(word.toLowerCase(), w) })).sort((a, b) => a.far - b.far);
  const best = ranked[0];
  if (best && best.far <= Math.max(1, Math.floor(best.w.length / 3))) return best.w;
  // `h100` for `h100-80gb`; the first of several
  return word.length > 1 ? words.find((w) => w.startsWith(`${word.toLowerCase()}-`) || w.startsWith(`${word.toLowerCase()}_`)) : undefined;
}
