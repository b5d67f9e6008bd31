/**
 * Checkpoints: Hugging Face tensors to our parameters and back. Where the numbers lie is declared once, as blocks (`parametersOf`);
 * reading walks a block one way, writing the other. Hugging Face keeps a linear layer as [out, in], we keep [in, out].
 * Opening reads headers alone and reports everything that does not fit the job at once.
 */
import { readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { isMoe, type Job } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";
import { type Entry, openSafetensors, type Safetensors } from "./safetensors.ts";

type Model = Job["model"];

export type Checkpoint = {
  /** The parameter of this name; `shape` must be the parameter's whole shape. */
  readonly read: (name: string, shape: readonly number[]) => Float32Array;
  /** Tensors of the file that no parameter of the job comes from. */
  readonly unused: readonly string[];
  readonly close: () => void;
};

/** `file`: a .safetensors file, an index.json over several, or a folder that holds either under its usual name. */
export function checkpointFor(model: Model, file: string): Checkpoint {
  const tensors = openTensors(file);
  const found = new Map<string, { parameter: Parameter; parts: readonly Part[] }>();
  const used = new Set<string>();
  const problems = new Set<string>();
  for (const parameter of parametersOf(model)) {
    // A layout is recognised by its first tensor; where none is there, the first layout says what is missed.
    const there = parameter.layouts.find((parts) => tensors.where.has(parts[0]!.tensor));
    if (!there && parameter.optional) {
      found.set(parameter.name, { parameter, parts: [] });
      continue;
    }
    const parts = there ?? parameter.layouts[PREFERRED] ?? parameter.layouts[0]!;
    found.set(parameter.name, { parameter, parts });
    for (const part of parts) {
      used.add(part.tensor);
      const problem = misfit(part, parameter.missing, tensors, there !== undefined);
      if (problem !== undefined) problems.add(problem);
    }
  }
  if (problems.size > 0) {
    tensors.close();
    throw new Trouble(
      summary(file, [...problems]),
      "make the model section of the job describe this checkpoint, or name another checkpoint",
    );
  }
  return {
    read: (name, shape) => {
      const known = found.get(name);
      if (known === undefined) throw new Error(`the model has no parameter ${name}`);
      const size = known.parameter.shape;
      if (`${sizesOf(size)}` !== `${shape}`) throw new Error(`${name} has shape ${list(sizesOf(size))}, asked for ${list(shape)}`);
      const out = new Float32Array(product(size));
      for (const { tensor, blocks } of known.parts) {
        const data = tensors.where.get(tensor)!.read(tensor);
        for (const block of blocks) transpose(block.rows, block.cols, data, block.there, out, block.here);
      }
      return out;
    },
    unused: [...tensors.where.keys()].filter((name) => !used.has(name)),
    close: tensors.close,
  };
}

/** The tensors transformers 5 would save for these values, experts fused; parameters, gradients and moments alike. Sorted by name. */
export function toHuggingFace(
  model: Model,
  named: ReadonlyMap<string, { readonly shape: readonly number[]; readonly data: Float32Array }>,
): readonly Entry[] {
  const entries = new Map<string, Entry>();
  for (const { name, shape, layouts, optional } of parametersOf(model)) {
    const value = named.get(name);
    if (value === undefined && optional) continue;
    if (value === undefined) throw new Error(`no value for ${name}`);
    if (value.data.length !== product(shape)) throw new Error(`${name} has ${value.data.length} values for shape ${list(sizesOf(shape))}`);
    for (const part of layouts[PREFERRED] ?? layouts[0]!) {
      const entry = entries.get(part.tensor) ?? {
        name: part.tensor,
        dtype: "F32",
        shape: sizesOf(part.shape),
        data: new Float32Array(product(part.shape)),
      };
      entries.set(part.tensor, entry);
      for (const block of part.blocks) transpose(block.cols, block.rows, value.data, block.here, entry.data, block.there);
    }
  }
  return [...entries.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** A dim: its size, and the job key that says so. */
type Dim = { readonly size: number; readonly key: string };

/** A matrix [rows, cols] that starts at `there` in the checkpoint's tensor and lies transposed, [cols, rows], at `here` in ours. */
type Block = { readonly there: number; readonly here: number; readonly rows: number; readonly cols: number };
type Part = { readonly tensor: string; readonly shape: readonly Dim[]; readonly blocks: readonly Block[] };

type Parameter = {
  readonly name: string;
  readonly shape: readonly Dim[];
  /** Our own layout first, then Hugging Face's from the newest. */
  readonly layouts: readonly (readonly Part[])[];
  /** The job key to doubt when the tensor is not there. */
  readonly missing: string;
  /** Zeros where it is not there: what a router has learnt about loads, which few checkpoints hold, and no gradient has. */
  readonly optional?: true;
};
const PREFERRED = 1;

/** Every parameter of the model, with all the ways in which it is found in checkpoints. */
function parametersOf(model: Model): readonly Parameter[] {
  const V = { size: model.vocab, key: "model.vocab" };
  const D = { size: model.hidden, key: "model.hidden" };
  const Q = { size: model.heads * model.head_dim, key: "model.heads x model.head_dim" };
  const K = { size: model.kv_heads * model.head_dim, key: "model.kv_heads x model.head_dim" };

  const plain = (name: string, missing: string, tensor: string, ...shape: Dim[]): Parameter =>
    own(name, missing, shape, [[{ tensor, shape, blocks: asIs(shape) }]]);
  const linear = (name: string, missing: string, tensors: readonly string[], input: Dim, output: Dim): Parameter => {
    const blocks = [{ there: 0, here: 0, rows: output.size, cols: input.size }];
    return own(
      name,
      missing,
      [input, output],
      tensors.map((tensor) => [{ tensor, shape: [output, input], blocks }]),
    );
  };

  const layer = (i: number): readonly Parameter[] => {
    const ours = `layers.${i}`;
    const theirs = `model.layers.${i}`;
    const at = "model.layers";
    const normed = model.qk_norm === "head" ? [headDim(model), headDim(model)] : [Q, K];
    return [
      plain(`${ours}.norm1`, at, `${theirs}.input_layernorm.weight`, D),
      linear(`${ours}.wq`, at, [`${theirs}.self_attn.q_proj.weight`], D, Q),
      linear(`${ours}.wk`, at, [`${theirs}.self_attn.k_proj.weight`], D, K),
      linear(`${ours}.wv`, at, [`${theirs}.self_attn.v_proj.weight`], D, K),
      linear(`${ours}.wo`, at, [`${theirs}.self_attn.o_proj.weight`], Q, D),
      ...(model.qk_norm === "none"
        ? []
        : [
            plain(`${ours}.q_norm`, "model.qk_norm", `${theirs}.self_attn.q_norm.weight`, normed[0]!),
            plain(`${ours}.k_norm`, "model.qk_norm", `${theirs}.self_attn.k_norm.weight`, normed[1]!),
          ]),
      plain(`${ours}.norm2`, at, `${theirs}.post_attention_layernorm.weight`, D),
      ...(isMoe(model, i) ? experts(ours, theirs, model.moe!) : dense(ours, theirs)),
    ];
  };

  const dense = (ours: string, theirs: string): readonly Parameter[] => {
    const F = { size: model.ffn, key: "model.ffn" };
    const missing = "model.moe";
    return [
      linear(`${ours}.w1`, missing, [`${theirs}.mlp.gate_proj.weight`], D, F),
      linear(`${ours}.w3`, missing, [`${theirs}.mlp.up_proj.weight`], D, F),
      linear(`${ours}.w2`, missing, [`${theirs}.mlp.down_proj.weight`], F, D),
    ];
  };

  const shared = (ours: string, theirs: string, { ffn, gate }: NonNullable<NonNullable<Model["moe"]>["shared"]>): readonly Parameter[] => {
    const X = { size: ffn, key: "model.moe.shared.ffn" };
    // DeepSeek's name, then Qwen2-MoE's
    const at = (leaf: string) => ["shared_experts", "shared_expert"].map((name) => `${theirs}.mlp.${name}.${leaf}.weight`);
    const missing = "model.moe.shared";
    return [
      linear(`${ours}.shared.w1`, missing, at("gate_proj"), D, X),
      linear(`${ours}.shared.w3`, missing, at("up_proj"), D, X),
      linear(`${ours}.shared.w2`, missing, at("down_proj"), X, D),
      ...(gate
        ? [linear(`${ours}.shared.gate`, `${missing}.gate`, [`${theirs}.mlp.shared_expert_gate.weight`], D, { size: 1, key: missing })]
        : []),
    ];
  };

  const experts = (ours: string, theirs: string, moe: NonNullable<Model["moe"]>): readonly Parameter[] => {
    const E = { size: moe.experts, key: "model.moe.experts" };
    const F = { size: moe.ffn, key: "model.moe.ffn" };
    const F2 = { size: 2 * moe.ffn, key: "2 x model.moe.ffn" };
    const each = <T>(one: (e: number) => T): T[] => Array.from({ length: E.size }, (_, e) => one(e));
    // what routed experts take and give
    const W = moe.latent === null ? D : { size: moe.latent, key: "model.moe.latent" };
    const matrix = W.size * F.size;
    /** One of the three matrices of all experts; `half` is its place in the fused tensor of gate (0) and up (1). */
    const stack = (name: string, input: Dim, output: Dim, fused: string, half: 0 | 1 | null, perExpert: readonly string[]): Parameter => {
      const [rows, cols] = [output.size, input.size];
      const stride = half === null ? matrix : 2 * matrix;
      const blocks = each((e) => ({ there: e * stride + (half ?? 0) * matrix, here: e * matrix, rows, cols }));
      return own(
        `${ours}.${name}`,
        "model.moe",
        [E, input, output],
        [
          [{ tensor: `${theirs}.mlp.experts.${fused}`, shape: [E, half === null ? output : F2, input], blocks }],
          ...perExpert.map((leaf) =>
            each((e) => ({
              tensor: `${theirs}.${leaf.replace("*", String(e))}.weight`,
              shape: [output, input],
              blocks: [{ there: 0, here: e * matrix, rows, cols }],
            })),
          ),
        ],
      );
    };
    return [
      linear(`${ours}.router`, "model.moe", [`${theirs}.mlp.gate.weight`, `${theirs}.block_sparse_moe.gate.weight`], D, E),
      ...([moe.router.balance].flat().includes("quantile")
        ? [{ ...own(`${ours}.router_beta`, "model.moe", [E], []), optional: true as const }]
        : []),
      ...(moe.router.expert_bias
        ? [{ ...plain(`${ours}.router_bias`, "model.moe", `${theirs}.mlp.gate.e_score_correction_bias`, E), optional: true as const }]
        : []),
      ...(moe.shared === null ? [] : shared(ours, theirs, moe.shared)),
      ...(moe.latent === null
        ? []
        : [own(`${ours}.latent.down`, "model.moe.latent", [D, W], []), own(`${ours}.latent.up`, "model.moe.latent", [W, D], [])]),
      stack("w1", W, F, "gate_up_proj", 0, ["mlp.experts.*.gate_proj", "block_sparse_moe.experts.*.w1"]),
      stack("w3", W, F, "gate_up_proj", 1, ["mlp.experts.*.up_proj", "block_sparse_moe.experts.*.w3"]),
      stack("w2", F, W, "down_proj", null, ["mlp.experts.*.down_proj", "block_sparse_moe.experts.*.w2"]),
    ];
  };

  return [
    plain("embed", "that this is the whole checkpoint of a causal language model", "model.embed_tokens.weight", V, D),
    ...Array.from({ length: model.layers }, (_, i) => layer(i)).flat(),
    plain("norm", "that this is the whole checkpoint of a causal language model", "model.norm.weight", D),
    ...(model.tie_embeddings ? [] : [linear("head", "model.tie_embeddings", ["lm_head.weight"], D, V)]),
  ];
}

const headDim = (model: Model): Dim => ({ size: model.head_dim, key: "model.head_dim (or model.qk_norm)" });

/** A parameter that its own name also finds, as it is: what the runtime writes. */
function own(name: string, missing: string, shape: readonly Dim[], layouts: readonly (readonly Part[])[]): Parameter {
  return { name, shape, missing, layouts: [[{ tensor: name, shape, blocks: asIs(shape) }], ...layouts] };
}

const asIs = (shape: readonly Dim[]): readonly Block[] => [{ there: 0, here: 0, rows: 1, cols: product(shape) }];

/** to[c, r] = from[r, c]; with one row it copies. */
function transpose(rows: number, cols: number, from: Float32Array, fromAt: number, to: Float32Array, toAt: number): void {
  if (rows === 1) {
    to.set(from.subarray(fromAt, fromAt + cols), toAt);
    return;
  }
  for (let r = 0; r < rows; r++) {
    const line = fromAt + r * cols;
    for (let c = 0; c < cols; c++) to[toAt + c * rows + r] = from[line + c]!;
  }
}

function misfit(part: Part, missing: string, { where }: Tensors, layoutFound: boolean): string | undefined {
  const source = where.get(part.tensor);
  const expected = list(sizesOf(part.shape));
  if (source === undefined) {
    const layer = /^model\.layers\.\d+\./.exec(part.tensor)?.[0];
    const wholeLayer = layer !== undefined && ![...where.keys()].some((name) => name.startsWith(layer));
    // where a layout was found, its first expert is there and this one is not
    const doubt = layoutFound ? "model.moe.experts" : wholeLayer ? "model.layers" : missing;
    return `${part.tensor} is missing; expected ${expected} (check ${doubt})`;
  }
  const found = source.info(part.tensor).shape;
  if (`${found}` === `${sizesOf(part.shape)}`) return;
  const wrong = part.shape.flatMap(({ size, key }, i) => (found[i] === size ? [] : [`${key} = ${size}, here ${found[i]}`]));
  const why = found.length === part.shape.length ? wrong.join("; ") : `${found.length} dims where ${part.shape.length} were expected`;
  return `${part.tensor} has shape ${list(found)}; expected ${expected} (${why})`;
}

function summary(file: string, problems: readonly string[]): string {
  const more = problems.length > 10 ? [`and ${problems.length - 10} more`] : [];
  const lines = [...problems.slice(0, 10), ...more].map((line) => `\n  ${line}`);
  return `${file}: does not fit the job in ${problems.length} place${problems.length === 1 ? "" : "s"}${lines.join("")}`;
}

/** Which open file holds each tensor. */
type Tensors = { readonly where: ReadonlyMap<string, Safetensors>; readonly close: () => void };

const INDEX = "model.safetensors.index.json";

function openTensors(path: string): Tensors {
  const inside = (name: string): string => join(path, name);
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory()) {
    const file = [INDEX, "model.safetensors"].map(inside).find((name) => statSync(name, { throwIfNoEntry: false }) !== undefined);
    if (file === undefined)
      throw new Trouble(`${path}: holds neither ${INDEX} nor model.safetensors`, "name the folder or the file of a safetensors checkpoint");
    return openTensors(file);
  }
  if (path.endsWith(".json")) return openIndex(path);
  const one = openSafetensors(path);
  return { where: new Map(one.names.map((name) => [name, one])), close: one.close };
}

function openIndex(path: string): Tensors {
  const shards = new Map<string, Safetensors>();
  const close = () => {
    for (const shard of shards.values()) shard.close();
  };
  try {
    const where = new Map<string, Safetensors>();
    for (const [tensor, file] of weightMap(path)) {
      if (!shards.has(file)) shards.set(file, openSafetensors(join(dirname(path), file)));
      const shard = shards.get(file)!;
      shard.info(tensor);
      where.set(tensor, shard);
    }
    return { where, close };
  } catch (error) {
    close();
    throw error;
  }
}

function weightMap(path: string): readonly (readonly [string, string])[] {
  let index: unknown;
  try {
    index = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new Trouble(
      `${path}: cannot be read as a checkpoint index (${error instanceof SyntaxError ? "not JSON" : (error as NodeJS.ErrnoException).code})`,
      "name a checkpoint",
    );
  }
  const map = (index as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map !== "object" || map === null)
    throw new Trouble(`${path}: has no weight_map, which names the file of each tensor`, "download it again");
  const entries = Object.entries(map);
  for (const [tensor, file] of entries) {
    // shards lie beside their index; a path that leaves the folder is not followed
    if (typeof file !== "string" || !/^[^/\\]+\.safetensors$/.test(file)) {
      throw new Trouble(
        `${path}: tensor ${tensor} is said to be in ${JSON.stringify(file)}, which is no safetensors file beside it`,
        "download it again",
      );
    }
  }
  return entries;
}

const sizesOf = (shape: readonly Dim[]): number[] => shape.map(({ size }) => size);
const product = (shape: readonly Dim[]): number => shape.reduce((n, { size }) => n * size, 1);
const list = (shape: readonly number[]): string => `[${shape.join(", ")}]`;
