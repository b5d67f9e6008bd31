/** The shape of a kernel as the estimate sees it: its family, its work, and the sizes by which measured kernels are looked up. */

import type { KernelFamily } from "../../../schemas/deviceProfile.ts";
import { type Dtype, dtypes } from "../../../schemas/dtypes.ts";
import type { OpName } from "../../../schemas/opNames.ts";
import type { Compute } from "../../../schemas/plan.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import { attentionVariant } from "../../ops/attentionVariants.ts";
import type { Mesh } from "../../passes/mesh.ts";
import type { BufferTable } from "../bufferTable.ts";
import { costOf, readsInOrder } from "../cost.ts";

/** What the time of a kernel depends on. */
export interface KernelShape {
  readonly op: string;
  readonly family: KernelFamily;
  readonly flops: number;
  readonly bytes: number;
  /** The type of the operands of arithmetic: the widest, whose peak is the lowest. */
  readonly dtype: Dtype;
  /** Products: m, n, k, experts. Attention: queries, keys, heads, group, width, value_width. Others: bytes. */
  readonly sizes: Readonly<Record<string, number>>;
}

/** How the estimate sees a product: its sizes in terms of the dims of its op, m x k times k x n, and how its experts share them. */
interface ProductForm {
  /** `rows`: the number of rows of all experts. */
  readonly sizes: (d: Readonly<Record<string, number>>, rows: number) => readonly [m: number, n: number, k: number];
  readonly family: "product" | "product_wgrad" | "grouped" | "grouped_wgrad";
}

const tokens = (d: Readonly<Record<string, number>>): number => sizeOf(d, "B") * sizeOf(d, "S");
const sizeOf = (d: Readonly<Record<string, number>>, dim: string): number => d[dim] ?? 1;

const forward: ProductForm = { family: "product", sizes: (d) => [tokens(d), sizeOf(d, "N"), sizeOf(d, "K")] };
const dgrad: ProductForm = { family: "product", sizes: (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N")] };
const grouped: ProductForm = { family: "grouped", sizes: (d, rows) => [rows, sizeOf(d, "N"), sizeOf(d, "K")] };
const groupedDgrad: ProductForm = { family: "grouped", sizes: (d, rows) => [rows, sizeOf(d, "K"), sizeOf(d, "N")] };
const products: Readonly<Partial<Record<OpName, ProductForm>>> = {
  gemm: forward,
  gemm_swiglu: forward,
  gemm_dgrad: dgrad,
  gemm_dgrad_swiglu: dgrad,
  gemm_dgrad_pair: { family: "product", sizes: (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F")] },
  gemm_dgrad_triple: { family: "product", sizes: (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F") + sizeOf(d, "D")] },
  gemm_wgrad: { family: "product_wgrad", sizes: (d) => [sizeOf(d, "K"), sizeOf(d, "N"), tokens(d)] },
  gemm_pair: { family: "product", sizes: (d) => [tokens(d), 2 * sizeOf(d, "N"), sizeOf(d, "K")] },
  gemm_wgrad_pair: { family: "product_wgrad", sizes: (d) => [sizeOf(d, "K"), 2 * sizeOf(d, "N"), tokens(d)] },
  grouped_gemm: grouped,
  grouped_gemm_swiglu: grouped,
  grouped_dgrad: groupedDgrad,
  grouped_dgrad_swiglu: groupedDgrad,
  grouped_dgrad_pair: { family: "grouped", sizes: (d, rows) => [rows, sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F")] },
  grouped_wgrad: { family: "grouped_wgrad", sizes: (d, rows) => [sizeOf(d, "K"), sizeOf(d, "N"), rows] },
  grouped_wgrad_pair: { family: "grouped_wgrad", sizes: (d, rows) => [sizeOf(d, "K"), 2 * sizeOf(d, "N"), rows] },
};

/** Ops that move rows, or elements, from and to places that other values say, and gradients of norms, which also add over rows. */
const scattered: ReadonlySet<OpName> = new Set([
  ...([
    "permute",
    "unpermute",
    "unpermute_add",
    "take_rows",
    "invert_rows",
    "split_rows",
    "merge_rows",
    "pack",
    "pack_grad",
    "embed",
    "embed_grad",
  ] as const),
  ...(["arrange", "quantile", "quantile_update", "top_k_mask", "top_k_mask_biased"] as const),
  ...(["rmsnorm_grad", "rmsnorm_grad_add", "rmsnorm_grad_add_pair", "rmsnorm_grad_add_triple", "layernorm_grad"] as const),
  ...(["head_norm_grad", "head_layernorm_grad"] as const),
]);
/** Ops that update parameters. */
const optimizers: ReadonlySet<OpName> = new Set([
  ...(["adam", "adam_cast", "adam_scheduled", "adamw", "adamw_cast", "adamw_scheduled"] as const),
  ...(["sgd", "sgd_cast", "sgd_scheduled", "sgd_scheduled_cast"] as const),
  ...(["sgd_momentum", "sgd_momentum_cast", "sgd_momentum_scheduled", "sgd_momentum_scheduled_cast"] as const),
  ...(["muon", "muon_momentum", "muon_scheduled", "orthogonalize", "orthogonalize_experts"] as const),
]);

/** Returns the instruction of the first microbatch of a step: its kernel may write what later ones add to. */
export function asFirst(i: Compute): Compute {
  if (i.first_kernel === undefined) return i;
  const { accumulates: _, first_kernel: kernel, ...rest } = i;
  return { ...rest, kernel };
}

/**
 * Returns the shape of a kernel on one rank, with the expected number of rows. A product that adds to a result has " adds" behind its op, one of
 * operands in f32 " f32", and one whose weights have a dim that 8 does not divide " unaligned".
 */
export function kernelShape(i: Compute, mesh: Mesh, buffers: BufferTable): KernelShape {
  const { flops, bytes } = costOf(i, mesh, buffers);
  const d: Record<string, number> = { ...i.attrs };
  for (const [dim, [size, subAxes]] of Object.entries(i.dims)) d[dim] = size / shardCount(mesh, subAxes);
  const attention = attentionVariant(i.op);
  // attention also reads logarithms of sums in f32, and multiplies nothing by them
  const product = products[i.op];
  const operands = readsInOrder(i);
  // and products with a formula behind them read more than their two operands
  const dtype = attention ? firstOf(i, buffers) : widestOf(product ? operands.slice(0, 2) : operands, buffers);
  const op = product ? productName(i, d, dtype) : i.op;
  const base = { op, flops, bytes, dtype };
  if (product) {
    const rows = flops / flopsWith(product, d, 1);
    const [m, n, k] = product.sizes(d, rows);
    const experts = sizeOf(d, "E");
    // rows of one expert
    const sizes = {
      product: { m, n, k, experts: 1 },
      product_wgrad: { m, n, k, experts: 1 },
      grouped: { m: m / experts, n, k, experts },
      grouped_wgrad: { m, n, k: k / experts, experts },
    }[product.family];
    const family = dtype === "f32" ? "product_f32" : product.family;
    return { ...base, family, sizes };
  }
  if (attention) {
    const group = sizeOf(d, "M");
    const sizes = {
      ...{ queries: sizeOf(d, "S"), keys: sizeOf(d, "U"), heads: sizeOf(d, "B") * sizeOf(d, "G") * group, group },
      ...{ width: sizeOf(d, "C"), value_width: sizeOf(d, "W") },
    };
    return { ...base, family: attention.grad ? "attention_grad" : "attention", sizes };
  }
  const family = optimizers.has(i.op) ? "optimizer" : scattered.has(i.op) ? "rows" : "streaming";
  return { ...base, family, sizes: { bytes: Math.max(1, bytes) } };
}

/** Returns the floating-point operations of a product whose experts have `rows` rows in total. */
function flopsWith({ sizes }: ProductForm, d: Readonly<Record<string, number>>, rows: number): number {
  const [m, n, k] = sizes(d, rows);
  return 2 * m * n * k;
}

/** Elements of the dims of weights that a tensor map needs to be divided by: 16 bytes of bf16. Products of others have kernels that copy by elements. */
const ALIGNMENT = 8;

/** Returns the op of a product with what else decides which kernel it has. */
function productName({ op, accumulates = [] }: Compute, d: Readonly<Record<string, number>>, dtype: Dtype): string {
  const isAligned = ["K", "N", "F", "D"].every((dim) => sizeOf(d, dim) % ALIGNMENT === 0 || d[dim] === undefined);
  return `${op}${dtype === "f32" ? " f32" : ""}${isAligned ? "" : " unaligned"}${accumulates.length > 0 ? " adds" : ""}`;
}

/** Returns the type of the first operand; f32 if an instruction reads none. */
function firstOf(i: Compute, buffers: BufferTable): Dtype {
  const [first] = readsInOrder(i);
  return first === undefined ? "f32" : buffers.get(first).dtype;
}

/** Returns the widest float type of operands; f32 if there is none. */
function widestOf(operands: readonly string[], buffers: BufferTable): Dtype {
  const floats = operands.map((id) => buffers.get(id).dtype).filter((dtype) => dtypes[dtype].kind === "float");
  return floats.sort((a, b) => dtypes[b].bytes - dtypes[a].bytes)[0] ?? "f32";
}
