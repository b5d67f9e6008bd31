/**
 * Where the numbers of each parameter lie in Hugging Face checkpoints, declared once as blocks. Hugging Face keeps a linear layer as
 * [out, in], we keep [in, out].
 */

import { isGated } from "../../schemas/activations.ts";
import { evenBy, hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import { depthsOf } from "../../schemas/mtp.ts";

type Model = Job["model"];
type Moe = NonNullable<Model["moe"]>;

/** A dim: its size in Hugging Face checkpoints, the job key that sets it, and its size in our parameters if they have more elements. */
export type Dim = { readonly size: number; readonly key: string; readonly padded?: number };

/** A matrix [rows, cols] that starts at `there` in the checkpoint's tensor and lies transposed, [cols, rows], at `here` in ours. */
type Block = { readonly there: number; readonly here: number; readonly rows: number; readonly cols: number };
/** A tensor of a Hugging Face checkpoint with the blocks of it that a parameter uses. */
export type TensorSlice = { readonly tensor: string; readonly shape: readonly Dim[]; readonly blocks: readonly Block[] };

/** The tensors that make up one parameter. */
export type HfParameter = {
  readonly name: string;
  readonly shape: readonly Dim[];
  /** The layout in checkpoints of rankc. */
  readonly own: readonly TensorSlice[];
  /** The layouts of Hugging Face, the newest first. */
  readonly theirs: readonly (readonly TensorSlice[])[];
  /** The job key to report if the tensor is missing. */
  readonly missing: string;
  /** Zeros where it is not there: what a router has learnt about loads, which few checkpoints hold, and no gradient has. */
  readonly optional?: true;
};

/** Dims that most parameters have. */
interface Dims {
  readonly V: Dim;
  readonly D: Dim;
  readonly E: Dim;
}
const dimsOf = (model: Model): Dims => ({
  V: { size: model.vocab, key: "model.vocab", padded: paddedVocab(model) },
  D: { size: model.hidden, key: "model.hidden" },
  E: { size: model.moe?.experts ?? 0, key: "model.moe.experts" },
});

/** Lists every parameter of the model with all its layouts in checkpoints. */
export function parametersOf(model: Model): readonly HfParameter[] {
  const { V, D } = dimsOf(model);
  return [
    plain("embed", "that this is the whole checkpoint of a causal language model", "model.embed_tokens.weight", V, D),
    ...(model.positions === "learned"
      ? [own("position_table", "model.positions", [{ size: model.max_positions, key: "model.max_positions" }, D], [])]
      : []),
    ...Array.from({ length: model.layers }, (_, i) =>
      layer(model, `layers.${i}`, `model.layers.${i}`, "model.layers", hasExperts(model, i)),
    ).flat(),
    ...Array.from({ length: depthsOf(model) }, (_, k) => depth(model, k)).flat(),
    ...norm(model, "norm", "that this is the whole checkpoint of a causal language model", "model.norm", D),
    ...(model.tie_embeddings ? [] : [linear("head", "model.tie_embeddings", ["lm_head.weight"], D, V)]),
  ];
}

const plain = (name: string, missing: string, tensor: string, ...shape: Dim[]): HfParameter =>
  own(name, missing, shape, [[{ tensor, shape, blocks: asIs(shape) }]]);
/** The gain of a norm, and the bias of a layer norm. */
const norm = (model: Model, name: string, missing: string, tensor: string, dim: Dim): readonly HfParameter[] => [
  plain(name, missing, `${tensor}.weight`, dim),
  ...(model.norm.type === "layernorm" ? [plain(`${name}_bias`, "model.norm.type", `${tensor}.bias`, dim)] : []),
];
const linear = (name: string, missing: string, tensors: readonly string[], input: Dim, output: Dim): HfParameter => {
  const blocks = [{ there: 0, here: 0, rows: output.size, cols: input.size }];
  return own(
    name,
    missing,
    [input, output],
    tensors.map((tensor) => [{ tensor, shape: [output, input], blocks }]),
  );
};

function layer(model: Model, ours: string, theirs: string, at: string, sparse: boolean): readonly HfParameter[] {
  const { D } = dimsOf(model);
  return [
    ...norm(model, `${ours}.norm1`, at, `${theirs}.input_layernorm`, D),
    ...(model.mla ? latent(model, ours, `${theirs}.self_attn`, model.mla) : grouped(model, ours, `${theirs}.self_attn`)),
    ...(model.out_bias ? [plain(`${ours}.bo`, "model.out_bias", `${theirs}.self_attn.o_proj.bias`, D)] : []),
    ...norm(model, `${ours}.norm2`, at, `${theirs}.post_attention_layernorm`, D),
    ...(model.moe && sparse
      ? [...experts(model, ours, theirs, model.moe), ...beside(model, ours, `${theirs}.mlp`, model.moe)]
      : denseForward(model, ours, `${theirs}.mlp`)),
  ];
}

/** Multi-token prediction follows the layers; its copies of the embedding and the head are not read. */
function depth(model: Model, k: number): readonly HfParameter[] {
  const { D } = dimsOf(model);
  const [ours, theirs] = [`mtp.${k}`, `model.layers.${model.layers + k}`];
  const at = "model.mtp";
  return [
    ...norm(model, `${ours}.enorm`, at, `${theirs}.enorm`, D),
    ...norm(model, `${ours}.hnorm`, at, `${theirs}.hnorm`, D),
    linear(`${ours}.proj`, at, [`${theirs}.eh_proj.weight`], { size: 2 * D.size, key: "2 x model.hidden" }, D),
    ...layer(model, ours, theirs, at, hasExperts(model, model.layers - 1)),
    ...norm(model, `${ours}.norm`, at, `${theirs}.shared_head.norm`, D),
  ];
}

function grouped(model: Model, ours: string, theirs: string): readonly HfParameter[] {
  const { D } = dimsOf(model);
  const at = "model.layers";
  const Q = { size: model.heads * model.head_dim, key: "model.heads x model.head_dim" };
  const K = { size: model.kv_heads * model.head_dim, key: "model.kv_heads x model.head_dim" };
  const head = { size: model.head_dim, key: "model.head_dim (or model.qk_norm)" };
  const [normedQ, normedK] = model.qk_norm === "head" ? [head, head] : [Q, K];
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
          ...norm(model, `${ours}.q_norm`, "model.qk_norm", `${theirs}.q_norm`, normedQ),
          ...norm(model, `${ours}.k_norm`, "model.qk_norm", `${theirs}.k_norm`, normedK),
        ]),
  ];
}

function latent(model: Model, ours: string, theirs: string, mla: NonNullable<Model["mla"]>): readonly HfParameter[] {
  const { D } = dimsOf(model);
  const at = "model.mla";
  const { heads } = model;
  const Q = { size: heads * (mla.nope_dim + mla.rope_dim), key: "model.heads x (model.mla.nope_dim + rope_dim)" };
  const K = { size: mla.kv_rank, key: "model.mla.kv_rank" };
  const KR = { size: mla.kv_rank + mla.rope_dim, key: "model.mla.kv_rank + rope_dim" };
  const KV = { size: heads * (mla.nope_dim + mla.v_dim), key: "model.heads x (model.mla.nope_dim + v_dim)" };
  const O = { size: heads * mla.v_dim, key: "model.heads x model.mla.v_dim" };
  const rank = { size: mla.q_rank ?? 0, key: "model.mla.q_rank" };
  const normed = (...of: [name: string, missing: string, tensor: string, dim: Dim]) => (mla.norm ? norm(model, ...of) : []);
  return [
    ...(mla.q_rank === null
      ? [linear(`${ours}.wq`, "model.mla.q_rank", [`${theirs}.q_proj.weight`], D, Q)]
      : [
          linear(`${ours}.wq_a`, "model.mla.q_rank", [`${theirs}.q_a_proj.weight`], D, rank),
          ...normed(`${ours}.q_norm`, "model.mla.q_rank", `${theirs}.q_a_layernorm`, rank),
          linear(`${ours}.wq_b`, "model.mla.q_rank", [`${theirs}.q_b_proj.weight`], rank, Q),
        ]),
    linear(`${ours}.wkv_a`, at, [`${theirs}.kv_a_proj_with_mqa.weight`], D, KR),
    ...normed(`${ours}.kv_norm`, at, `${theirs}.kv_a_layernorm`, K),
    linear(`${ours}.wkv_b`, at, [`${theirs}.kv_b_proj.weight`], K, KV),
    linear(`${ours}.wo`, at, [`${theirs}.o_proj.weight`], O, D),
  ];
}

/** The dense feed-forward part of a layer, with its biases. */
function denseForward(model: Model, ours: string, theirs: string): readonly HfParameter[] {
  const F = { size: model.ffn, key: "model.ffn" };
  const { D } = dimsOf(model);
  const bias = (name: string, leaf: string, dim: Dim) => plain(`${ours}.${name}`, "model.mlp_bias", `${theirs}.${leaf}.bias`, dim);
  const into = isGated(model.activation) ? [bias("b1", "gate_proj", F), bias("b3", "up_proj", F)] : [bias("b1", "up_proj", F)];
  return [
    ...forward(model, ours, [theirs], model.moe ? "model.moe.layers" : "model.moe", F),
    ...(model.mlp_bias ? [...into, bias("b2", "down_proj", D)] : []),
  ];
}

/** The matrices of a feed-forward part; where it is found, the most usual place first. Without a gate there is no w3. */
function forward(model: Model, ours: string, theirs: readonly string[], missing: string, F: Dim): readonly HfParameter[] {
  const { D } = dimsOf(model);
  const matrix = (name: string, leaf: string, input: Dim, output: Dim) =>
    linear(
      `${ours}.${name}`,
      missing,
      theirs.map((place) => `${place}.${leaf}.weight`),
      input,
      output,
    );
  const into = isGated(model.activation)
    ? [matrix("w1", "gate_proj", D, F), matrix("w3", "up_proj", D, F)]
    : [matrix("w1", "up_proj", D, F)];
  return [...into, matrix("w2", "down_proj", F, D)];
}

/** What stands beside the experts: what the router has learnt about loads, what every token goes through, and the experts' width. */
function beside(model: Model, ours: string, theirs: string, { router, shared, latent }: Moe): readonly HfParameter[] {
  const { D, E } = dimsOf(model);
  const places = ["shared_experts", "shared_expert"].map((name) => `${theirs}.${name}`);
  const F = { size: shared?.ffn ?? 0, key: "model.moe.shared.ffn" };
  const L = { size: latent ?? 0, key: "model.moe.latent" };
  const one = { size: 1, key: "one product" };
  const bias = plain(`${ours}.router_bias`, "model.moe.router.expert_bias", `${theirs}.gate.e_score_correction_bias`, E);
  const beta = own(`${ours}.router_beta`, "model.moe.router.balance", [E], []);
  return [
    ...(router.bias ? [own(`${ours}.router.bias`, "model.moe.router.bias", [E], [])] : []),
    ...(router.expert_bias ? [{ ...bias, optional: true as const }] : []),
    ...(evenBy(router) === "quantile" ? [{ ...beta, optional: true as const }] : []),
    ...(shared ? forward(model, `${ours}.shared`, shared.gate ? places.reverse() : places, "model.moe.shared", F) : []),
    ...(shared?.gate ? [linear(`${ours}.shared.gate`, "model.moe.shared.gate", [`${theirs}.shared_expert_gate.weight`], D, one)] : []),
    ...(latent === null
      ? []
      : [own(`${ours}.latent.down`, "model.moe.latent", [D, L], []), own(`${ours}.latent.up`, "model.moe.latent", [L, D], [])]),
  ];
}

function experts(model: Model, ours: string, theirs: string, moe: Moe): readonly HfParameter[] {
  const { D, E } = dimsOf(model);
  const F = { size: moe.ffn, key: "model.moe.ffn" };
  const F2 = { size: 2 * moe.ffn, key: "2 x model.moe.ffn" };
  const each = <T>(one: (e: number) => T): T[] => Array.from({ length: E.size }, (_, e) => one(e));
  // what routed experts take and give
  const W = moe.latent === null ? D : { size: moe.latent, key: "model.moe.latent" };
  const matrix = W.size * F.size;
  /** One of the three matrices of all experts; `half` is its place in the fused tensor of gate (0) and up (1). */
  const stack = (name: string, input: Dim, output: Dim, fused: string, half: 0 | 1 | null, perExpert: readonly string[]): HfParameter => {
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
    ...(isGated(model.activation)
      ? [
          stack("w1", W, F, "gate_up_proj", 0, ["mlp.experts.*.gate_proj", "block_sparse_moe.experts.*.w1"]),
          stack("w3", W, F, "gate_up_proj", 1, ["mlp.experts.*.up_proj", "block_sparse_moe.experts.*.w3"]),
        ]
      : [stack("w1", W, F, "up_proj", null, ["mlp.experts.*.up_proj"])]),
    stack("w2", F, W, "down_proj", null, ["mlp.experts.*.down_proj", "block_sparse_moe.experts.*.w2"]),
    ...(moe.bias
      ? [
          ...["b1", ...(isGated(model.activation) ? ["b3"] : [])].map((name) => own(`${ours}.${name}`, "model.moe.bias", [E, F], [])),
          own(`${ours}.b2`, "model.moe.bias", [E, W], []),
        ]
      : []),
  ];
}

/** A parameter that rankc writes under its own name, as it is. */
function own(name: string, missing: string, shape: readonly Dim[], theirs: readonly (readonly TensorSlice[])[]): HfParameter {
  const ours = shape.map(({ key, size, padded = size }) => ({ key, size: padded }));
  return { name, shape, missing, own: [{ tensor: name, shape: ours, blocks: asIs(ours) }], theirs };
}

const asIs = (shape: readonly Dim[]): readonly Block[] => [{ there: 0, here: 0, rows: 1, cols: product(shape) }];

/** Returns the sizes of a shape in Hugging Face checkpoints. */
export const sizesOf = (shape: readonly Dim[]): number[] => shape.map(({ size }) => size);
/** Returns the sizes of a shape in our parameters. */
export const paddedSizesOf = (shape: readonly Dim[]): number[] => shape.map(({ size, padded = size }) => padded);
/** Returns the number of elements of a shape. */
export const product = (shape: readonly Dim[]): number => shape.reduce((n, { size }) => n * size, 1);
