/**
 * Checkpoints: Hugging Face tensors to our parameters and back. Where the numbers lie is declared once, as blocks (`parametersOf`);
 * reading walks a block one way, writing the other. Hugging Face keeps a linear layer as [out, in], we keep [in, out].
 * Opening reads headers alone and reports everything that does not fit the job at once.
 */
import { evenBy, hasExperts, type Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { expectPrefix, expectUnscaled, openTensors, type Tensors } from "./checkpointFiles.ts";
import { expectFinite } from "./finite.ts";
import { expectAllowed, keyOfTensor, type Mismatch, surplusMismatches } from "./mismatch.ts";
import type { TensorEntry } from "./safetensors.ts";

type Model = Job["model"];
type Moe = NonNullable<Model["moe"]>;

/** An open Hugging Face checkpoint that matches a model. */
export type HfCheckpoint = {
  /** Reads the parameter of this name; `shape` is its whole shape. */
  readonly read: (name: string, shape: readonly number[]) => Float32Array;
  /** Tensors of the file that no parameter of the job reads. */
  readonly unused: readonly string[];
  /** Messages about unused tensors. */
  readonly notes: readonly string[];
  readonly close: () => void;
};

/**
 * `file`: a .safetensors file, an index.json over several, or a folder that holds either under its usual name. `allowed`: the job keys or
 * names of tensors (--allow-mismatch) whose differences the person means. Throws a Trouble that lists all others.
 */
export function checkpointFor(model: Model, file: string, allowed: readonly string[] = []): HfCheckpoint {
  const tensors = openTensors(file);
  try {
    return fitted(model, file, tensors, allowed);
  } catch (error) {
    tensors.close();
    throw error;
  }
}

function fitted(model: Model, file: string, tensors: Tensors, allowed: readonly string[]): HfCheckpoint {
  expectPrefix(file, tensors);
  expectUnscaled(file, tensors);
  const found = new Map<string, { parameter: Parameter; parts: readonly TensorSlice[] }>();
  const used = new Set<string>();
  const problems = new Set<string>();
  for (const parameter of parametersOf(model)) {
    // The first tensor of a layout identifies it; if no layout matches, the error names the first tensor of the first layout.
    const there = parameter.layouts.find((parts) => tensors.where.has(parts[0]!.tensor));
    if (!there && parameter.optional) {
      found.set(parameter.name, { parameter, parts: [] });
      continue;
    }
    const parts = there ?? parameter.layouts[PREFERRED] ?? parameter.layouts[0]!;
    found.set(parameter.name, { parameter, parts });
    for (const part of parts) {
      used.add(part.tensor);
      const problem = misfit(part, parameter, tensors, there !== undefined);
      if (problem !== undefined) problems.add(problem);
    }
  }
  const surplus = surplusOf(tensors, used, model);
  const notes = expectAllowed(
    file,
    [...[...problems].map((text) => ({ text })), ...surplus.mismatches],
    allowed,
    "make the model section of the job describe this checkpoint, or name another checkpoint",
  );
  return {
    read: (name, shape) => {
      const known = found.get(name);
      if (known === undefined) throw new Error(`the model has no parameter ${name}`);
      const size = known.parameter.shape;
      if (`${sizesOf(size)}` !== `${shape}`) throw new Error(`${name} has shape ${list(sizesOf(size))}, asked for ${list(shape)}`);
      const out = new Float32Array(product(size));
      for (const { tensor, blocks } of known.parts) {
        const source = tensors.where.get(tensor)!;
        const data = expectFinite(source.read(tensor), `${source.path}: ${tensor}`, "name a checkpoint whose weights are finite");
        for (const block of blocks) transpose(block.rows, block.cols, data, block.there, out, block.here);
      }
      return out;
    },
    unused: [...tensors.where.keys()].filter((name) => !used.has(name)),
    notes: [...surplus.notes, ...notes],
    close: tensors.close,
  };
}

/**
 * These values under the names that transformers 5 has for them while a model runs, experts fused; parameters, gradients and moments
 * alike. State, which has no gradient, is left out where it is not given. Sorted by name.
 */
export function toHuggingFace(
  model: Model,
  named: { get(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined },
): readonly TensorEntry[] {
  const entries = new Map<string, TensorEntry>();
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

/** A dim: its size, and the job key that sets it. */
type Dim = { readonly size: number; readonly key: string };

/** A matrix [rows, cols] that starts at `there` in the checkpoint's tensor and lies transposed, [cols, rows], at `here` in ours. */
type Block = { readonly there: number; readonly here: number; readonly rows: number; readonly cols: number };
type TensorSlice = { readonly tensor: string; readonly shape: readonly Dim[]; readonly blocks: readonly Block[] };

type Parameter = {
  readonly name: string;
  readonly shape: readonly Dim[];
  /** rankc's layout first, then those of Hugging Face from the newest. */
  readonly layouts: readonly (readonly TensorSlice[])[];
  /** The job key to report if the tensor is missing. */
  readonly missing: string;
  /** Zeros where it is not there: what a router has learnt about loads, which few checkpoints hold, and no gradient has. */
  readonly optional?: true;
};
const PREFERRED = 1;

/** Lists every parameter of the model with all its layouts in checkpoints. */
function parametersOf(model: Model): readonly Parameter[] {
  const V = { size: model.vocab, key: "model.vocab" };
  const D = { size: model.hidden, key: "model.hidden" };
  const E = { size: model.moe?.experts ?? 0, key: "model.moe.experts" };

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

  const layer = (ours: string, theirs: string, at: string, sparse: boolean): readonly Parameter[] => {
    return [
      plain(`${ours}.norm1`, at, `${theirs}.input_layernorm.weight`, D),
      ...(model.mla ? latent(ours, `${theirs}.self_attn`, model.mla) : grouped(ours, `${theirs}.self_attn`)),
      ...(model.out_bias ? [plain(`${ours}.bo`, "model.out_bias", `${theirs}.self_attn.o_proj.bias`, D)] : []),
      plain(`${ours}.norm2`, at, `${theirs}.post_attention_layernorm.weight`, D),
      ...(model.moe && sparse
        ? [...experts(ours, theirs, model.moe), ...beside(ours, `${theirs}.mlp`, model.moe)]
        : forward(ours, [`${theirs}.mlp`], model.moe ? "model.moe.layers" : "model.moe", { size: model.ffn, key: "model.ffn" })),
    ];
  };

  /** Multi-token prediction follows the layers; what it shares with the model, embedding and head, is there again, and not read. */
  const depth = (k: number): readonly Parameter[] => {
    const [ours, theirs] = [`mtp.${k}`, `model.layers.${model.layers + k}`];
    const at = "model.mtp";
    return [
      plain(`${ours}.enorm`, at, `${theirs}.enorm.weight`, D),
      plain(`${ours}.hnorm`, at, `${theirs}.hnorm.weight`, D),
      linear(`${ours}.proj`, at, [`${theirs}.eh_proj.weight`], { size: 2 * D.size, key: "2 x model.hidden" }, D),
      ...layer(ours, theirs, at, hasExperts(model, model.layers - 1)),
      plain(`${ours}.norm`, at, `${theirs}.shared_head.norm.weight`, D),
    ];
  };

  const grouped = (ours: string, theirs: string): readonly Parameter[] => {
    const at = "model.layers";
    const Q = { size: model.heads * model.head_dim, key: "model.heads x model.head_dim" };
    const K = { size: model.kv_heads * model.head_dim, key: "model.kv_heads x model.head_dim" };
    const normed = model.qk_norm === "head" ? [headDim(model), headDim(model)] : [Q, K];
    const bias = (name: string, dim: Dim) => plain(`${ours}.b${name}`, "model.qkv_bias", `${theirs}.${name}_proj.bias`, dim);
    return [
      linear(`${ours}.wq`, at, [`${theirs}.q_proj.weight`], D, Q),
      linear(`${ours}.wk`, at, [`${theirs}.k_proj.weight`], D, K),
      linear(`${ours}.wv`, at, [`${theirs}.v_proj.weight`], D, K),
      linear(`${ours}.wo`, at, [`${theirs}.o_proj.weight`], Q, D),
      ...(model.qkv_bias ? [bias("q", Q), bias("k", K), bias("v", K)] : []),
      ...(model.qk_norm === "none"
        ? []
        : [
            plain(`${ours}.q_norm`, "model.qk_norm", `${theirs}.q_norm.weight`, normed[0]!),
            plain(`${ours}.k_norm`, "model.qk_norm", `${theirs}.k_norm.weight`, normed[1]!),
          ]),
    ];
  };

  const latent = (ours: string, theirs: string, mla: NonNullable<Model["mla"]>): readonly Parameter[] => {
    const at = "model.mla";
    const { heads } = model;
    const Q = { size: heads * (mla.nope_dim + mla.rope_dim), key: "model.heads x (model.mla.nope_dim + rope_dim)" };
    const K = { size: mla.kv_rank, key: "model.mla.kv_rank" };
    const KR = { size: mla.kv_rank + mla.rope_dim, key: "model.mla.kv_rank + rope_dim" };
    const KV = { size: heads * (mla.nope_dim + mla.v_dim), key: "model.heads x (model.mla.nope_dim + v_dim)" };
    const O = { size: heads * mla.v_dim, key: "model.heads x model.mla.v_dim" };
    const rank = { size: mla.q_rank ?? 0, key: "model.mla.q_rank" };
    return [
      ...(mla.q_rank === null
        ? [linear(`${ours}.wq`, "model.mla.q_rank", [`${theirs}.q_proj.weight`], D, Q)]
        : [
            linear(`${ours}.wq_a`, "model.mla.q_rank", [`${theirs}.q_a_proj.weight`], D, rank),
            plain(`${ours}.q_norm`, "model.mla.q_rank", `${theirs}.q_a_layernorm.weight`, rank),
            linear(`${ours}.wq_b`, "model.mla.q_rank", [`${theirs}.q_b_proj.weight`], rank, Q),
          ]),
      linear(`${ours}.wkv_a`, at, [`${theirs}.kv_a_proj_with_mqa.weight`], D, KR),
      plain(`${ours}.kv_norm`, at, `${theirs}.kv_a_layernorm.weight`, K),
      linear(`${ours}.wkv_b`, at, [`${theirs}.kv_b_proj.weight`], K, KV),
      linear(`${ours}.wo`, at, [`${theirs}.o_proj.weight`], O, D),
    ];
  };

  /** The three matrices of a feed-forward part; where it is found, the most usual place first. */
  const forward = (ours: string, theirs: readonly string[], missing: string, F: Dim): readonly Parameter[] => {
    const matrix = (name: string, leaf: string, input: Dim, output: Dim) =>
      linear(
        `${ours}.${name}`,
        missing,
        theirs.map((place) => `${place}.${leaf}.weight`),
        input,
        output,
      );
    return [matrix("w1", "gate_proj", D, F), matrix("w3", "up_proj", D, F), matrix("w2", "down_proj", F, D)];
  };

  /** What stands beside the experts: what the router has learnt about loads, what every token goes through, and the experts' width. */
  const beside = (ours: string, theirs: string, { router, shared, latent }: Moe): readonly Parameter[] => {
    const places = ["shared_experts", "shared_expert"].map((name) => `${theirs}.${name}`);
    const F = { size: shared?.ffn ?? 0, key: "model.moe.shared.ffn" };
    const L = { size: latent ?? 0, key: "model.moe.latent" };
    const one = { size: 1, key: "one product" };
    const bias = plain(`${ours}.router_bias`, "model.moe.router.expert_bias", `${theirs}.gate.e_score_correction_bias`, E);
    const beta = own(`${ours}.router_beta`, "model.moe.router.balance", [E], []);
    return [
      ...(router.expert_bias ? [{ ...bias, optional: true as const }] : []),
      ...(evenBy(router) === "quantile" ? [{ ...beta, optional: true as const }] : []),
      ...(shared ? forward(`${ours}.shared`, shared.gate ? places.reverse() : places, "model.moe.shared", F) : []),
      ...(shared?.gate ? [linear(`${ours}.shared.gate`, "model.moe.shared.gate", [`${theirs}.shared_expert_gate.weight`], D, one)] : []),
      ...(latent === null
        ? []
        : [own(`${ours}.latent.down`, "model.moe.latent", [D, L], []), own(`${ours}.latent.up`, "model.moe.latent", [L, D], [])]),
    ];
  };

  const experts = (ours: string, theirs: string, moe: Moe): readonly Parameter[] => {
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
      stack("w1", W, F, "gate_up_proj", 0, ["mlp.experts.*.gate_proj", "block_sparse_moe.experts.*.w1"]),
      stack("w3", W, F, "gate_up_proj", 1, ["mlp.experts.*.up_proj", "block_sparse_moe.experts.*.w3"]),
      stack("w2", F, W, "down_proj", null, ["mlp.experts.*.down_proj", "block_sparse_moe.experts.*.w2"]),
    ];
  };

  return [
    plain("embed", "that this is the whole checkpoint of a causal language model", "model.embed_tokens.weight", V, D),
    ...Array.from({ length: model.layers }, (_, i) =>
      layer(`layers.${i}`, `model.layers.${i}`, "model.layers", hasExperts(model, i)),
    ).flat(),
    ...Array.from({ length: depthsOf(model) }, (_, k) => depth(k)).flat(),
    plain("norm", "that this is the whole checkpoint of a causal language model", "model.norm.weight", D),
    ...(model.tie_embeddings ? [] : [linear("head", "model.tie_embeddings", ["lm_head.weight"], D, V)]),
  ];
}

const headDim = (model: Model): Dim => ({ size: model.head_dim, key: "model.head_dim (or model.qk_norm)" });

/** A parameter that its own name also finds, as it is: what the runtime writes. */
function own(name: string, missing: string, shape: readonly Dim[], layouts: readonly (readonly TensorSlice[])[]): Parameter {
  return { name, shape, missing, layouts: [[{ tensor: name, shape, blocks: asIs(shape) }], ...layouts] };
}

const asIs = (shape: readonly Dim[]): readonly Block[] => [{ there: 0, here: 0, rows: 1, cols: product(shape) }];

/** Transposes: to[c, r] = from[r, c]. */
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

function misfit(part: TensorSlice, { name, missing }: Parameter, { where }: Tensors, layoutFound: boolean): string | undefined {
  const source = where.get(part.tensor);
  const expected = list(sizesOf(part.shape));
  if (source === undefined) {
    const layer = /^model\.layers\.\d+\./.exec(part.tensor)?.[0];
    const wholeLayer = layer !== undefined && ![...where.keys()].some((name) => name.startsWith(layer));
    // the layout was identified by its first expert; this expert is missing
    const doubt = layoutFound ? "model.moe.experts" : wholeLayer ? (name.startsWith("mtp.") ? "model.mtp" : "model.layers") : missing;
    return `${part.tensor} is missing; expected ${expected} (check ${doubt})`;
  }
  const found = source.info(part.tensor).shape;
  if (`${found}` === `${sizesOf(part.shape)}`) return;
  const wrong = part.shape.flatMap(({ size, key }, i) => (found[i] === size ? [] : [`${key} = ${size}, here ${found[i]}`]));
  const why = found.length === part.shape.length ? wrong.join("; ") : `${found.length} dims where ${part.shape.length} were expected`;
  return `${part.tensor} has shape ${list(found)}; expected ${expected} (${why})`;
}

/** Classifies tensors that no parameter of the job reads: mismatches of the model, and notes. */
function surplusOf({ where }: Tensors, used: ReadonlySet<string>, model: Model): { mismatches: Mismatch[]; notes: string[] } {
  const names = [...where.keys()];
  const layers = model.layers + depthsOf(model);
  const numberOf = (name: string): number => Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
  const ahead = new Set(names.filter((name) => /\.(enorm|hnorm|eh_proj|shared_head)\./.test(name)).map(numberOf));
  const isAhead = (name: string): boolean =>
    (numberOf(name) >= layers && ahead.has(numberOf(name))) || Number(/^mtp\.(\d+)\./.exec(name)?.[1] ?? -1) >= depthsOf(model);
  const unused = names.filter(isAhead);
  // some old checkpoints have RoPE frequencies, which follow from the job
  const surplus = names.filter((name) => !used.has(name) && !isAhead(name) && !name.endsWith("rotary_emb.inv_freq"));
  const mismatches = surplus.flatMap((name): Mismatch[] => {
    const original = originalOf(name, model);
    if (original === undefined || same(where, name, original)) return [];
    const key = keyOfTensor(name, model);
    return [{ key, text: `${name} differs from ${original}, and the job has one of both (check ${key})` }];
  });
  const others = surplus.filter((name) => originalOf(name, model) === undefined);
  return {
    mismatches: [...mismatches, ...surplusMismatches(others, model)],
    notes: unused.length === 0 ? [] : [`tensors of multi-token prediction layers that the job has not are not used: ${unused.length}`],
  };
}

/** The tensor that one of the job's model repeats: the head of a tied model, and what multi-token prediction shares with the model. */
function originalOf(name: string, { layers, tie_embeddings }: Model): string | undefined {
  const [embed, head] = ["model.embed_tokens.weight", "lm_head.weight"];
  if (name === head && tie_embeddings) return embed;
  const [, n, leaf] = /^model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight$/.exec(name) ?? [];
  if (leaf === undefined || Number(n) < layers) return undefined;
  return leaf === "embed_tokens" || tie_embeddings ? embed : head;
}

function same(where: Tensors["where"], a: string, b: string): boolean {
  const [one, other] = [where.get(a), where.get(b)];
  if (!one || !other || `${one.info(a).shape}` !== `${other.info(b).shape}`) return false;
  const values = other.read(b);
  return one.read(a).every((value, i) => value === values[i]);
}

const sizesOf = (shape: readonly Dim[]): number[] => shape.map(({ size }) => size);
const product = (shape: readonly Dim[]): number => shape.reduce((n, { size }) => n * size, 1);
const list = (shape: readonly number[]): string => `[${shape.join(", ")}]`;
