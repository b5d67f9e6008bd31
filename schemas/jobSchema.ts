/** The JSON Schema of a job file, for editors (draft-07): the schema `JobText`, with `extends`. */
import { z } from "zod";
import { autoKeys } from "./job/autoKeys.ts";
import { keyExamples } from "./job/keyExamples.ts";
import { valueTexts } from "./job/valueTexts.ts";
import { JobText } from "./job.ts";

/** A JSON Schema, as far as this file changes it. */
type Schema = Record<string, unknown>;
const isSchema = (value: unknown): value is Schema => typeof value === "object" && value !== null && !Array.isArray(value);

/** Returns the JSON Schema of a job file. Keys that a job must have are required where the file extends no other. */
export function jobSchema(): Schema {
  const { properties, required, ...rest } = z.toJSONSchema(JobText, { target: "draft-07", io: "input" });
  const schema: Schema = { title: "rankc job", ...rest, properties: { extends: extendsSchema, ...properties }, required };
  const needed = takeRequired(schema);
  describeDefaults(schema);
  addSnippets(schema);
  describeValues(schema, "");
  for (const path of Object.values(autoKeys)) allowAuto(schema, path.split("."));
  return { ...schema, if: { required: ["extends"] }, else: needed };
}

const extendsSchema: Schema = {
  type: "string",
  minLength: 1,
  description: "a file whose keys this job has where it does not write them, relative to this file; it may extend another one",
};

/** Adds the default of each key to the text that editors show, and removes `default: null`, at which the completion of yaml-language-server stops. */
function describeDefaults(schema: Schema): void {
  const { default: standard, description } = schema;
  if (standard === null) delete schema.default;
  const isShown = standard !== undefined && !isSchema(standard);
  if (isShown && typeof description === "string")
    schema.markdownDescription = `${description}\n\nDefault: \`${typeof standard === "string" ? standard : JSON.stringify(standard)}\``;
  const { properties, items, anyOf } = schema;
  for (const inner of [properties && Object.values(properties), items, anyOf].flat()) if (isSchema(inner)) describeDefaults(inner);
}

/** Adds what each named value of a key means, and usual values of others. */
function describeValues(schema: Schema, path: string): void {
  const texts = valueTexts[path];
  if (Array.isArray(schema.enum) && texts) schema.enumDescriptions = schema.enum.map((value) => texts[String(value)] ?? "");
  const { properties, items, anyOf } = schema;
  for (const inner of [items, anyOf].flat()) if (isSchema(inner)) describeValues(inner, path);
  if (isSchema(properties)) for (const [key, inner] of Object.entries(properties)) addExamples(inner, path === "" ? key : `${path}.${key}`);
  if (!isSchema(properties)) return;
  for (const [key, inner] of Object.entries(properties)) if (isSchema(inner)) describeValues(inner, path === "" ? key : `${path}.${key}`);
}

function addExamples(schema: unknown, path: string): void {
  const examples = keyExamples[path];
  if (isSchema(schema) && examples) schema.examples = examples;
}

/** Lets a key also be `auto`. */
function allowAuto(schema: Schema, [key = "", ...rest]: readonly string[]): void {
  const { properties } = schema;
  if (!isSchema(properties)) return;
  const inner = properties[key];
  if (!isSchema(inner)) return;
  if (rest.length > 0) {
    allowAuto(inner, rest);
    return;
  }
  const { title, description, markdownDescription, default: standard, defaultSnippets, examples, ...values } = inner;
  const auto = { const: "auto", description: "rankc chooses the value of the fastest plan that fits" };
  const texts = { title, description, markdownDescription, default: standard, defaultSnippets, examples };
  properties[key] = { ...Object.fromEntries(Object.entries(texts).filter(([, text]) => text !== undefined)), anyOf: [values, auto] };
}

/** A part of a snippet that a person fills in, with its usual value. */
const place = (n: number, usual: string): string => `$\{${n}:${usual}}`;

/** Whole sections that editors offer. */
const snippets: Readonly<Record<string, Schema>> = {
  "": {
    label: "job",
    description: "a dense model on 8 GPUs",
    body: {
      name: place(1, "first"),
      model: {
        layers: place(2, "32"),
        hidden: place(3, "4096"),
        ffn: 14336,
        heads: place(4, "32"),
        kv_heads: 8,
        vocab: 128256,
        seq: place(5, "8192"),
      },
      parallel: { world: place(6, "8"), distributed_optimizer: true },
      train: {
        global_batch: 512,
        steps: place(7, "100000"),
        optimizer: { lr: place(8, "0.0003"), warmup_steps: 2000, schedule: "cosine" },
      },
      data: { path: place(9, "corpus.txt") },
      cluster: { device: "h100-80gb" },
    },
  },
  "model.moe": {
    label: "mixture of experts",
    description: "8 experts, 2 for each token, balanced by a loss",
    body: { experts: place(1, "8"), top_k: place(2, "2"), ffn: place(3, "14336"), router: { aux_coeff: 0.01 } },
  },
  "model.mla": {
    label: "latent attention of DeepSeek-V3",
    body: { q_rank: 1536, kv_rank: 512, nope_dim: 128, rope_dim: 64, v_dim: 128 },
  },
  "train.optimizer": {
    label: "adamw with a cosine schedule",
    body: { lr: place(1, "0.0003"), min_lr: place(2, "0.00003"), warmup_steps: place(3, "2000"), schedule: "cosine" },
  },
  "train.recompute": { label: "recompute norms", body: { mode: "selective", modules: ["layernorm"] } },
};

function addSnippets(schema: Schema): void {
  for (const [path, snippet] of Object.entries(snippets)) {
    let here: unknown = schema;
    for (const key of path === "" ? [] : path.split("."))
      here = isSchema(here) && isSchema(here.properties) ? here.properties[key] : undefined;
    if (isSchema(here)) here.defaultSnippets = [snippet];
  }
}

/** Removes `required` from a schema and from the maps below it, and returns what they required; undefined if nothing. Items of lists keep theirs, because a list is replaced as a whole. */
function takeRequired(schema: Schema): Schema | undefined {
  const { required } = schema;
  delete schema.required;
  const variants = Array.isArray(schema.anyOf) ? schema.anyOf.filter(isSchema) : [];
  const within = isSchema(schema.properties) ? Object.entries(schema.properties) : [];
  const properties = within.flatMap(([key, inner]) => {
    const needed = isSchema(inner) ? takeRequired(inner) : undefined;
    return needed ? [[key, needed] as const] : [];
  });
  const own = {
    ...(required !== undefined && { required }),
    ...(properties.length > 0 && { properties: Object.fromEntries(properties) }),
  };
  const [needed] = [own, ...variants.map((variant) => takeRequired(variant) ?? {})].filter((s) => Object.keys(s).length > 0);
  return needed;
}
