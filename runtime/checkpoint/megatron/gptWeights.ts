/**
 * The weights of a GPT model in a checkpoint of Megatron Core, under rankc's names, with linear layers as [out, in], as they are there and
 * in Hugging Face's form. Layers are stacked under one key, or each has its own; query, key and value are one tensor, by groups; gate and up
 * are one tensor, all of gate first, or two keys.
 */
import { hasExperts } from "../../../schemas/experts.ts";
import type { Job } from "../../../schemas/job.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import type { Ranges } from "../../shards.ts";
import type { NamedWeights } from "../hfExport.ts";
import { parametersOf, sizesOf } from "../hfLayout.ts";
import type { Distcp } from "./distcp.ts";

type Model = Job["model"];

/** A tensor of one layer in the checkpoint: its key, and its index in a stack of layers. */
interface Source {
  readonly key: string;
  readonly layer: number | undefined;
}

/** Rows of a tensor of one layer, after the index of an expert if there is one. */
interface Rows {
  readonly source: Source;
  /** Row ranges; undefined: all. */
  readonly rows?: readonly (readonly [number, number])[];
  /** The tensor has experts as its first dim. */
  readonly experts?: boolean;
  /** Each expert has a tensor of its own, by number; `source` is the first. */
  readonly apart?: readonly Source[];
  /** [out, in] there. */
  readonly transposed: boolean;
}

type Find = (where: Where, ...names: string[]) => Source | undefined;

/** A layer: of the decoder, of multi-token prediction, or none. */
type Where = { readonly kind: "decoder" | "mtp"; readonly index: number } | undefined;

/** Weights and states that a model does not have in Hugging Face's form. */
const ignored = /^(optimizer|rng_state|rerun_state_machine_state|common_state|opt_param_scheduler)\b|_extra_state|\.qb_beta$/;

/**
 * Returns the weights of a checkpoint for a model. Throws a Trouble that lists weights that are missing, and weights of the checkpoint that
 * the model does not have.
 */
export function gptWeights(dist: Distcp, model: Model): NamedWeights {
  const used = new Set<string>();
  const find: Find = (where, ...names) => {
    for (const name of names)
      for (const source of placesOf(where, name))
        if (dist.tensors.has(source.key)) {
          used.add(source.key);
          return source;
        }
    return undefined;
  };
  const found = new Map<string, Rows>();
  const missing: string[] = [];
  for (const { name, optional, shape } of parametersOf(model)) {
    const rows = rowsOf(name, model, find);
    if (rows) found.set(name, expectShape(dist, name, sizesOf(shape), rows));
    else if (!optional) missing.push(name);
  }
  // a tied output layer repeats the embedding
  if (model.tie_embeddings) used.add("output_layer.weight");
  const surplus = [...dist.tensors.keys()].filter((key) => !used.has(key) && !ignored.test(key));
  if (missing.length + surplus.length > 0) {
    const lines = [
      ...missing.map((name) => `no weights for ${name}`),
      ...surplus.map((key) => `${key} is there, and the model has no such part`),
    ];
    const more = lines.length > 10 ? `\n  and ${lines.length - 10} more` : "";
    throw new Trouble(
      `${dist.folder} does not fit the model in ${lines.length} place${lines.length === 1 ? "" : "s"}${lines
        .slice(0, 10)
        .map((line) => `\n  ${line}`)
        .join("")}${more}`,
      "describe the model of the checkpoint with --config",
    );
  }
  return {
    has: (name) => found.has(name),
    isTransposed: true,
    slices(name) {
      const rows = found.get(name);
      if (!rows) throw new Error(`rankc: ${dist.folder} has no ${name}`);
      return (ranges) => readRows(dist, rows, ranges);
    },
  };
}

function placesOf(where: Where, name: string): Source[] {
  if (!where) return [{ key: name, layer: undefined }];
  const { kind, index } = where;
  if (kind === "mtp")
    return [`mtp.layers.${index}.transformer_layer.${name}`, `mtp.layers.${index}.${name}`].map((key) => ({ key, layer: undefined }));
  return [
    { key: `decoder.layers.${index}.${name}`, layer: undefined },
    { key: `decoder.layers.${name}`, layer: index },
  ];
}

const attention = "self_attention.";
/** Weights that are read as they are, by rankc's name within a layer: their keys, and whether they are linear. */
const plain: Readonly<Record<string, { readonly names: readonly string[]; readonly linear?: true }>> = {
  norm1: { names: [`${attention}linear_qkv.layer_norm_weight`, "input_layernorm.weight"] },
  norm2: { names: ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"] },
  wo: { names: [`${attention}linear_proj.weight`], linear: true },
  bo: { names: [`${attention}linear_proj.bias`] },
  k_norm: { names: [`${attention}k_layernorm.weight`] },
  kv_norm: { names: [`${attention}linear_kv_up_proj.layer_norm_weight`, `${attention}kv_layernorm.weight`] },
  wq_a: { names: [`${attention}linear_q_down_proj.weight`], linear: true },
  wq_b: { names: [`${attention}linear_q_up_proj.weight`], linear: true },
  wkv_a: { names: [`${attention}linear_kv_down_proj.weight`], linear: true },
  wkv_b: { names: [`${attention}linear_kv_up_proj.weight`], linear: true },
  q_norm: { names: [`${attention}linear_q_up_proj.layer_norm_weight`, `${attention}q_layernorm.weight`] },
  router: { names: ["mlp.router.weight"], linear: true },
  router_bias: { names: ["mlp.router.expert_bias"] },
  "shared.gate": { names: ["mlp.shared_experts.gate_weight"], linear: true },
  "shared.w2": { names: ["mlp.shared_experts.linear_fc2.weight"], linear: true },
  "latent.down": { names: ["mlp.fc1_latent_proj.weight"], linear: true },
  "latent.up": { names: ["mlp.fc2_latent_proj.weight"], linear: true },
  enorm: { names: ["enorm.weight"] },
  hnorm: { names: ["hnorm.weight"] },
  proj: { names: ["eh_proj.weight"], linear: true },
  norm: { names: ["final_layernorm.weight"] },
};

/** Returns where the rows of a weight lie; undefined if the checkpoint lacks it. */
function rowsOf(name: string, model: Model, find: Find): Rows | undefined {
  const outside: Readonly<Record<string, readonly [string, boolean]>> = {
    embed: ["embedding.word_embeddings.weight", false],
    norm: ["decoder.final_layernorm.weight", false],
    head: ["output_layer.weight", true],
  };
  const [key, transposed] = outside[name] ?? [];
  if (key !== undefined) {
    const source = find(undefined, key);
    // rows beyond the tokenizer were never trained
    const rows = name === "norm" ? {} : { rows: [[0, model.vocab] as const] };
    return source && { source, transposed: transposed ?? false, ...rows };
  }
  const [, kind, index, leaf = ""] = /^(layers|mtp)\.(\d+)\.(.+)$/.exec(name) ?? [];
  const where: Where = { kind: kind === "mtp" ? "mtp" : "decoder", index: Number(index) };
  const qkv = /^([wb])([qkv])$/.exec(leaf);
  if (qkv) return qkvRows(where, model, find, qkv[1] === "w" ? "weight" : "bias", qkv[2] as "q" | "k" | "v");
  const sparse = hasExperts(model, kind === "mtp" ? model.layers - 1 : Number(index));
  const matrix = /^(shared\.)?w([13])$/.exec(leaf);
  if (matrix)
    return gatedRows(where, find, matrix[1] ? "mlp.shared_experts." : sparse ? "mlp.experts.experts." : "mlp.", matrix[2] === "1" ? 0 : 1);
  if (leaf === "w2" && sparse) return expertRows(where, find, "linear_fc2.weight");
  if (leaf === "w2") return whole(find(where, "mlp.linear_fc2.weight"), true);
  const known = plain[leaf];
  return known && whole(find(where, ...known.names), known.linear ?? false);
}

const whole = (source: Source | undefined, transposed: boolean): Rows | undefined => source && { source, transposed };

/** Rows of all experts: in one tensor, or in a tensor for each. */
function expertRows(where: Where, find: Find, leaf: string): Rows | undefined {
  const stacked = find(where, `mlp.experts.experts.${leaf}`);
  if (stacked) return { source: stacked, transposed: true, experts: true };
  const apart: Source[] = [];
  for (let e = 0; ; e++) {
    const source = find(where, `mlp.experts.experts.${e}.${leaf}`);
    if (!source) break;
    apart.push(source);
  }
  const [first] = apart;
  return first && { source: first, transposed: true, apart };
}

/** Rows of q, k or v in the fused tensor: by group the heads of the queries, the key, the value. */
function qkvRows(where: Where, model: Model, find: Find, leaf: "weight" | "bias", part: "q" | "k" | "v"): Rows | undefined {
  const { heads, kv_heads: groups, head_dim: d } = model;
  if (model.mla) return part === "q" ? whole(find(where, `${attention}linear_q_proj.weight`), true) : undefined;
  const source = find(where, `${attention}linear_qkv.${leaf}`);
  if (!source) return undefined;
  const each = heads / groups;
  const [from, to] = { q: [0, each], k: [each, each + 1], v: [each + 1, each + 2] }[part] as [number, number];
  const rows = Array.from({ length: groups }, (_, g) => [(g * (each + 2) + from) * d, (g * (each + 2) + to) * d] as const);
  return { source, transposed: leaf === "weight", rows };
}

/** Rows of gate (0) or up (1). */
function gatedRows(where: Where, find: Find, at: string, half: 0 | 1): Rows | undefined {
  const fused = at.includes(".experts.")
    ? expertRows(where, find, "linear_fc1.weight")
    : whole(find(where, `${at}linear_fc1.weight`), true);
  if (fused) return { ...fused, rows: [[half, half + 1]] };
  const own = `linear_fc1.weight_${half === 0 ? "w" : "v"}`;
  return at.includes(".experts.") ? expertRows(where, find, own) : whole(find(where, `${at}${own}`), true);
}

/** Resolves halves to rows, and throws a Trouble if the tensor of the checkpoint has another shape than the model's. */
function expectShape(dist: Distcp, name: string, sizes: readonly number[], rows: Rows): Rows {
  const all = dist.tensors.get(rows.source.key) ?? [];
  const own = rows.source.layer === undefined ? all : all.slice(1);
  const local = rows.experts ? own.slice(1) : own;
  const isHalf = rows.rows?.length === 1 && rows.rows[0]?.[1] !== undefined && rows.rows[0][1] <= 2 && (local[0] ?? 0) > 2;
  const half = (local[0] ?? 0) / 2;
  const resolved = isHalf ? { ...rows, rows: rows.rows.map(([from]) => [from * half, (from + 1) * half] as const) } : rows;
  const count = resolved.rows?.reduce((n, [from, to]) => n + to - from, 0) ?? local[0] ?? 0;
  const last = Math.max(0, ...(resolved.rows ?? []).map(([, to]) => to));
  const [out, input] = [count, local[1]];
  const experts = rows.apart?.length ?? own[0] ?? 0;
  const found = [
    ...(rows.experts || rows.apart ? [experts] : []),
    ...(input === undefined ? [out] : rows.transposed ? [input, out] : [out, input]),
  ];
  if (`${found}` !== `${sizes}` || last > (local[0] ?? 0))
    throw new Trouble(
      `${dist.folder}: ${rows.source.key} has shape [${all.join(", ")}], which is not that of ${name}, [${sizes.join(", ")}]`,
      "describe the model of the checkpoint with --config",
    );
  return resolved;
}

/** Reads ranges of a weight: whole, or one index of its first dim. */
function readRows(dist: Distcp, at: Rows, ranges: Ranges): Float32Array {
  const { source, rows, experts, apart } = at;
  if (apart) {
    const { apart: _, ...one } = at;
    const own = (ranges[0] ?? []).flatMap(([from, to]) => apart.slice(from, to));
    const parts = own.map((expert) => readRows(dist, { ...one, source: expert }, ranges.slice(1)));
    return joined(parts);
  }
  const all = dist.tensors.get(source.key) ?? [];
  const lead: [number, number][][] = [];
  if (source.layer !== undefined) lead.push([[source.layer, source.layer + 1]]);
  const [first] = ranges;
  const expert = experts ? first : undefined;
  if (expert) lead.push(expert.map(([from, to]) => [from, to]));
  const local = all.slice(lead.length);
  const wanted = [...lead, rows ? [...rows] : [[0, local[0] ?? 0] as const], ...local.slice(1).map((n) => [[0, n] as const])];
  return dist.read(source.key, wanted);
}

function joined(parts: readonly Float32Array[]): Float32Array {
  const [first] = parts;
  if (first && parts.length === 1) return first;
  const out = new Float32Array(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
