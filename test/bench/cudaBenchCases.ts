/** What the bench of CUDA kernels measures: ops at sizes of real jobs, as a plan would use them, and what each costs at least. */

import { bytesOf, type Dtype } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { ops } from "../../src/ops/index.ts";
import { expandLike } from "../../src/ops/op.ts";
import { unscaled } from "../../src/ops/rope.ts";
import { dimSize } from "../../src/ops/signature.ts";

type Sizes = Readonly<Record<string, number>>;

export interface BenchBuffer {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  /** `in` is filled; `out` arrives poisoned; `kept` is filled and updated. */
  readonly role: "in" | "out" | "kept";
}
export interface BenchKernel {
  readonly use: KernelSpec;
  readonly made: GeneratedKernel;
  /** The buffer of each operand that has another name. */
  readonly as: Readonly<Record<string, string>>;
}
export interface BenchCase {
  readonly name: string;
  /** What the other side must know to fill the buffers, to check and to compare: an op, or what several make together. */
  readonly kind: string;
  readonly d: Sizes;
  /** Of a half precision product, what its operands are. */
  readonly dtype: Dtype;
  readonly flops: number;
  /** Of device memory, were each input read once and each output written once. */
  readonly bytes: number;
  readonly buffers: readonly BenchBuffer[];
  readonly kernels: readonly BenchKernel[];
  /** Rows of each expert. */
  readonly counts: readonly number[];
}

interface Step {
  readonly op: OpName;
  /** Sizes and attributes; `#0` is the size of a `...` operand. */
  readonly d: Sizes;
  /** Types of the operands, in the order of the signature. */
  readonly types: string;
  readonly as?: Readonly<Record<string, string>>;
  /** Rows of each expert; their sum is the bound. */
  readonly counts?: readonly number[];
  readonly bound?: number;
  readonly makesRows?: boolean;
}
interface CaseDraft {
  readonly name: string;
  readonly kind?: string;
  readonly steps: readonly Step[];
  /** Buffers whose shape alone is read, or whose bytes `bytes` counts. */
  readonly unread?: readonly string[];
  readonly bytes?: number;
}

const one = (
  name: string,
  op: OpName,
  d: Sizes,
  types: string,
  more: Omit<CaseDraft, "name" | "steps"> & Partial<Step> = {},
): CaseDraft => {
  const { unread, bytes, kind, ...step } = more;
  return {
    name,
    steps: [{ op, d, types, ...step }],
    ...(unread ? { unread } : {}),
    ...(bytes ? { bytes } : {}),
    ...(kind ? { kind } : {}),
  };
};

// -- products

const products = { "": "bf16 bf16 bf16", _dgrad: "bf16 bf16 bf16", _wgrad: "bf16 bf16 f32" };
const gemm = (size: number, suffix: keyof typeof products): CaseDraft =>
  one(`gemm${suffix} ${size}x${size}x${size}`, `gemm${suffix}`, { B: 1, S: size, K: size, N: size }, products[suffix]);

/** Forward, dgrad and wgrad of a product of S rows. */
const dense = (name: string, S: number, N: number, K: number): CaseDraft[] =>
  (["", "_dgrad", "_wgrad"] as const).map((suffix) =>
    one(`gemm${suffix} ${S}x${N}x${K}, ${name}`, `gemm${suffix}`, { B: 1, S, K, N }, products[suffix]),
  );
/** The same of f32 operands, or of those rounded to TF32. */
const inF32 = (S: number, N: number, K: number, type: "f32" | "tf32" = "f32"): CaseDraft[] =>
  (["", "_dgrad", "_wgrad"] as const).map((suffix) =>
    one(`gemm${suffix} ${type} ${S}x${N}x${K}`, `gemm${suffix}`, { B: 1, S, K, N, ...(type === "tf32" && { tf32: 1 }) }, "f32 f32 f32"),
  );

/** Forward, dgrad and wgrad of one product of rows with their experts' weights. */
function grouped(model: string, rows: number, N: number, K: number, E: number, uneven: number): CaseDraft[] {
  const counts = unevenCounts(rows, E, uneven);
  const ofRows = [
    ["grouped_gemm", products[""]],
    ["grouped_dgrad", products._dgrad],
    ["grouped_wgrad", products._wgrad],
  ] as const;
  return ofRows.map(([op, types]) =>
    one(
      `grouped ${model}${op === "grouped_gemm" ? "" : op.replace("grouped_", " ")} ${rows}x${N}x${K}, ${E} experts`,
      op,
      { B: 1, S: rows, K, N, E },
      types,
      {
        counts,
      },
    ),
  );
}

/** Counts that fall off exponentially, so far that the fullest expert has `uneven` times the mean, in an order of no meaning. */
function unevenCounts(rows: number, E: number, uneven: number): number[] {
  const shares = (fall: number): number[] => {
    const raw = Array.from({ length: E }, (_, e) => Math.exp(-fall * e));
    const sum = raw.reduce((a, b) => a + b);
    return raw.map((x) => x / sum);
  };
  let [low, high] = [0, 20];
  for (let i = 0; i < 60; i++) {
    const fall = (low + high) / 2;
    if (shares(fall)[0]! * E < uneven) low = fall;
    else high = fall;
  }
  const counts = shares(low).map((x) => Math.floor(x * rows));
  counts[E - 1]! += rows - counts.reduce((a, b) => a + b);
  // 5 has no factor with any power of two in common
  return counts.map((_, e) => counts[(e * 5 + 3) % E]!);
}

// -- the table

const heads = (C: number, W: number) => ({ C, W, scale: 1 / Math.sqrt(C), chunk: 0, ranks: 1 });
const [T, D] = [65536, 4096];
const attentionSizes = { B: 4, S: 4096, U: 4096, G: 8, M: 4, ...heads(128, 128) };
// the first of eight ranks: with all keys, and with its own alone
const zigzag = { ...attentionSizes, chunk: 2048, ranks: 8 };
const gathered = { ...zigzag, B: 1, U: 32768 };
const attentionTypes = "bf16 bf16 bf16 bf16 f32";
const attentionGradTypes = `${attentionTypes} bf16 bf16 bf16 bf16`;
/** Sequences, query heads, key heads, length, widths: of a small model, of Llama, Qwen3 and Gemma, and of latent attention. */
const attentionShapes = [
  [16, 12, 12, 1024, 64, 64],
  [4, 32, 8, 4096, 64, 64],
  [2, 32, 4, 4096, 128, 128],
  [2, 32, 8, 4096, 128, 128],
  [4, 32, 8, 4096, 128, 128],
  [1, 32, 8, 32768, 128, 128],
  [1, 32, 4, 4096, 128, 128],
  [1, 128, 128, 4096, 192, 128],
  [4, 16, 16, 4096, 192, 128],
  [2, 16, 8, 4096, 256, 256],
] as const;
/** Forward and backward at one shape, of weights some dropped. */
function attentions([B, H, G, S, C, W]: (typeof attentionShapes)[number], drop = 0): CaseDraft[] {
  const d = { B, S, U: S, G, M: H / G, ...heads(C, W) };
  const name = `${B}x${H}${G < H ? `/${G}` : ""}x${S}x${C}${C === W ? "" : `, values of ${W}`}`;
  if (drop > 0) {
    const types = attentionTypes.replace("bf16 bf16 bf16", "bf16 bf16 bf16 i32");
    const gradTypes = attentionGradTypes.replace("bf16 bf16 bf16", "bf16 bf16 bf16 i32");
    return [
      one(`attention_dropout ${name}`, "attention_dropout", { ...d, drop }, types),
      one(`attention_dropout_grad ${name}`, "attention_dropout_grad", { ...d, drop }, gradTypes),
    ];
  }
  return [one(`attention ${name}`, "attention", d, attentionTypes), one(`attention_grad ${name}`, "attention_grad", d, attentionGradTypes)];
}
const router = { B: 1, S: T, E: 128 };
/** The groups of DeepSeek-V3. */
const inGroups = { groups: 8, group_top_k: 4, group_scores: 2 };
const rowsSizes = { B: 1, S: 16384, D: 4096, E: 64 };
const rowsBound = 8 * 16384;
const logits = { B: 1, S: 8192, V: 32000 };
const words = { B: 1, S: T, V: 32000, D };
const adam = { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: 0.1 };

const ROPE = { ...unscaled, theta: 500000, sign: 1, first: 0, width: 128, interleaved: 0, chunk: 0, ranks: 1 };
const normedHeads = { B: 16, S: 4096, H: 32, C: 128, eps: 1e-6, ...ROPE };
const drafts: readonly CaseDraft[] = [
  gemm(8192, ""),
  gemm(4096, ""),
  gemm(8192, "_dgrad"),
  gemm(8192, "_wgrad"),
  // two sequences of 4096: Llama-8B's queries, keys and values; its gate and up; Qwen3-30B's head
  ...dense("q, k, v", 8192, 6144, 4096),
  ...dense("gate+up", 8192, 28672, 4096),
  ...dense("head", 8192, 151936, 2048),
  ...grouped("Mixtral gate+up", 16384, 28672, 4096, 8, 2.09),
  ...grouped("Mixtral down", 16384, 4096, 14336, 8, 2.09),
  ...grouped("DSv3 EP8 gate+up", 32768, 4096, 7168, 32, 3.1),
  ...grouped("DSv3 EP8 down", 32768, 7168, 2048, 32, 3.1),
  ...grouped("Qwen3-30B gate+up", 131072, 1536, 2048, 128, 5.93),
  ...grouped("Qwen3-30B down", 131072, 2048, 768, 128, 5.93),
  // half of the rows have 4 of 128 experts, as a router with random weights does it
  ...grouped("Qwen3-30B gate, uneven", 65536, 768, 2048, 128, 20),
  ...inF32(4096, 4096, 4096),
  // gate of llama-125m
  ...inF32(16384, 2048, 768),
  ...inF32(4096, 4096, 4096, "tf32"),
  // the product after the activation of Llama-8B, gate of Qwen3-30B
  ...inF32(8192, 4096, 14336, "tf32"),
  ...inF32(16384, 768, 2048, "tf32"),
  ...attentionShapes.flatMap((shape) => attentions(shape)),
  ...attentions([2, 32, 8, 4096, 128, 128], 0.1),
  ...attentions([16, 12, 12, 1024, 64, 64], 0.1),
  one("attention zigzag 1x32/8x4096x128 of 32768 keys", "attention", gathered, attentionTypes),
  one("attention_grad zigzag 1x32/8x4096x128 of 32768 keys", "attention_grad", gathered, attentionGradTypes),
  one("attention_part zigzag 4x32/8x4096x128", "attention_part", zigzag, attentionTypes),
  one("attention_part_grad zigzag 4x32/8x4096x128", "attention_part_grad", zigzag, attentionGradTypes),
  one("attention_merge 65536x32x128", "attention_merge", { B: 1, S: T, H: 32, W: 128 }, "f32 f32 bf16 f32 f32 f32"),
  one("rmsnorm 65536x4096", "rmsnorm", { B: 1, S: T, D, eps: 1e-5 }, "bf16 bf16 bf16"),
  one("rmsnorm_grad 65536x4096", "rmsnorm_grad", { B: 1, S: T, D, eps: 1e-5 }, "bf16 bf16 bf16 bf16 f32"),
  one("rmsnorm_sum 65536x4096", "rmsnorm_sum", { B: 1, S: T, D, eps: 1e-5 }, "bf16 bf16 bf16 bf16 bf16"),
  one("rmsnorm_grad_add_pair 65536x4096", "rmsnorm_grad_add_pair", { B: 1, S: T, D, eps: 1e-5 }, "bf16 bf16 bf16 bf16 bf16 bf16 f32"),
  one("adamw f32 2^28", "adamw", { "#0": 2 ** 28, ...adam }, "f32 f32 f32 f32 f32 f32 f32"),
  one("cast f32 to bf16 2^29", "cast", { "#0": 2 ** 29 }, "f32 bf16"),
  one("swiglu 65536x4096", "swiglu", { B: 1, S: T, F: D }, "bf16 bf16 bf16"),
  one("swiglu_grad 65536x4096", "swiglu_grad", { B: 1, S: T, F: D }, "bf16 bf16 bf16 bf16 bf16"),
  one("rope 65536x32x128", "rope", { B: 16, S: 4096, H: 32, C: 128, ...ROPE }, "bf16 bf16"),
  one("head_norm_rope 65536x32x128", "head_norm_rope", normedHeads, "bf16 bf16 bf16"),
  one("head_norm_rope_grad 65536x32x128", "head_norm_rope_grad", { ...normedHeads, sign: -1 }, "bf16 bf16 bf16 bf16 f32"),
  one("softmax 65536x128", "softmax", router, "bf16 f32"),
  one("choose 65536x128, 8", "top_k_mask", { ...router, k: 8 }, "bf16 f32"),
  one(
    "choose 65536x256, 8 of 4 of 8 groups, biased",
    "top_k_mask_biased",
    { B: 1, S: T, E: 256, k: 8, sign: 1, ...inGroups },
    "f32 f32 f32",
  ),
  one("weigh 65536x128, 8", "combine_weights", { ...router, normalize: 1, scale: 1 }, "f32 f32 f32"),
  {
    name: "router 65536x128, 8 (softmax, choose, weigh)",
    kind: "router",
    steps: [
      { op: "softmax", d: router, types: "bf16 f32", as: { y: "p" } },
      { op: "top_k_mask", d: { ...router, k: 8 }, types: "bf16 f32" },
      { op: "combine_weights", d: { ...router, normalize: 1, scale: 1 }, types: "f32 f32 f32" },
    ],
    // the probabilities and the map are kept: the router's gradient needs them
    bytes: T * 128 * (2 + 4 + 4 + 4),
  },
  one("permute 16384x4096, 8 of 64 (makes rows)", "permute", rowsSizes, "bf16 f32 bf16", { bound: rowsBound, makesRows: true }),
  one("unpermute 16384x4096, 8 of 64", "unpermute", rowsSizes, "bf16 f32 bf16", { bound: rowsBound, unread: ["c"] }),
  one("row_max 8192x32000", "row_max", logits, "bf16 f32"),
  one("softmax_terms 8192x32000", "softmax_terms", logits, "bf16 f32 i32 f32 f32"),
  one("softmax_terms_grad 8192x32000", "softmax_terms_grad", logits, "bf16 f32 i32 f32 f32 bf16"),
  {
    name: "cross entropy 8192x32000 (row_max, softmax_terms, nll)",
    kind: "cross_entropy",
    steps: [
      { op: "row_max", d: logits, types: "bf16 f32" },
      { op: "softmax_terms", d: logits, types: "bf16 f32 i32 f32 f32" },
      { op: "nll", d: logits, types: "f32 f32 f32 f32" },
    ],
    bytes: 8192 * (32000 * 2 + 8),
  },
  one("softmax_statistics 8192x32000", "softmax_statistics", logits, "bf16 i32 f32 f32 f32"),
  {
    name: "loss and gradient 8192x32000 (softmax_statistics, softmax_terms_grad)",
    kind: "loss_and_gradient",
    steps: [
      { op: "softmax_statistics", d: logits, types: "bf16 i32 f32 f32 f32" },
      { op: "softmax_terms_grad", d: logits, types: "bf16 f32 i32 f32 f32 bf16" },
    ],
    bytes: 8192 * (32000 * 6 + 24),
  },
  one("embed 65536x4096, 32000 words", "embed", words, "i32 bf16 bf16", { unread: ["table"], bytes: T * (D * 4 + 4) }),
  one("embed_grad 65536x4096, 32000 words", "embed_grad", words, "i32 bf16 bf16 f32", { unread: ["table"] }),
  // the r-th word 1/r times as often as the first, which is a fifteenth of the tokens
  one("embed_grad 65536x4096, 32000 words by rank", "embed_grad", words, "i32 bf16 bf16 f32", { unread: ["table"] }),
  one("take_rows 131072x4096 of 8 ranks", "take_rows", { I: rowsBound * D, N: rowsBound, O: rowsBound * D, width: D }, "bf16 i32 bf16"),
];

// -- kernel specs as a plan has them

export const benchCases = (only: RegExp): BenchCase[] =>
  drafts.filter((d) => only.test(d.name)).map((draft) => caseOf(draft, drafts.indexOf(draft)));

function caseOf(draft: CaseDraft, index: number): BenchCase {
  const buffers = new Map<string, BenchBuffer>();
  const kernels = draft.steps.map((step, i) => kernelOf(step, `bench${index}_${i}`, buffers));
  const uses = kernels.map((k) => k.use);
  const first = draft.steps[0]!;
  const counts = first.counts ?? [];
  const unread = new Set(draft.unread);
  const bytes = [...buffers.values()].reduce(
    (n, b) => n + (unread.has(b.name) ? 0 : b.shape.reduce((x, y) => x * y, 1) * bytesOf[b.dtype] * (b.role === "kept" ? 2 : 1)),
    0,
  );
  const rows = uses[0]!.bound;
  return {
    name: draft.name,
    kind: draft.kind ?? first.op,
    d: Object.assign({}, ...draft.steps.map((s) => s.d), { bound: rows, offsets: offsetsAt(rows) }),
    dtype: uses[0]!.dtype[ops[first.op].inputs[0]!.name]!,
    flops: draft.steps.reduce((n, s) => n + (ops[s.op].flops?.({ ...s.d, R: rows }) ?? 0), 0),
    bytes: draft.bytes ?? bytes,
    buffers: [...buffers.values()],
    kernels,
    counts,
  };
}

function kernelOf(step: Step, name: string, buffers: Map<string, BenchBuffer>): BenchKernel {
  const { d, as = {}, counts, makesRows = false } = step;
  const op = ops[step.op];
  const { inputs, outputs } = expandLike(op, { dimSpecs: 1, ragged: 0 });
  const operands = [...inputs, ...outputs];
  const types = step.types.split(" ") as Dtype[];
  const bound = step.bound ?? counts?.reduce((a, b) => a + b) ?? 0;
  const updated = op.inPlace ?? [];
  const shapes = operands.map((o) => [...(o.ragged ? [bound] : []), ...o.dimSpecs.slice(o.ragged).map((s) => dimSize(s, d))]);
  const add = (b: BenchBuffer) => {
    if (!buffers.has(b.name)) buffers.set(b.name, b);
  };
  for (const [i, o] of operands.entries())
    add({
      name: as[o.name] ?? o.name,
      dtype: types[i]!,
      shape: shapes[i]!,
      role: updated.includes(o.name) ? "kept" : i < inputs.length ? "in" : "out",
    });
  if (bound) add({ name: "rows", dtype: "i32", shape: [offsetsAt(bound) + d.E! + 1], role: makesRows ? "out" : "in" });
  const use: KernelSpec = {
    ...{ op: step.op, name, bound, makesRows, mayOverflow: false, accumulates: new Set(updated) },
    d: Object.fromEntries(Object.entries(d).filter(([dim]) => !dim.startsWith("#"))),
    size: Object.fromEntries(operands.map((o, i) => [o.name, shapes[i]!.reduce((x, y) => x * y, 1)])),
    dtype: Object.fromEntries(operands.map((o, i) => [o.name, types[i]!])),
  };
  return { use, made: cudaKernels[step.op](use, "sm_90a"), as };
}
