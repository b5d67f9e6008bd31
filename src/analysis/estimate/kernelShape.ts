/** The shape of a kernel as the estimate sees it: its family, its work, and the sizes by which measured kernels are looked up. */

import type { KernelFamily } from "../../../schemas/deviceProfile.ts";
import { type Dtype, dtypes } from "../../../schemas/dtypes.ts";
import type { Compute } from "../../../schemas/plan.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import type { Mesh } from "../../passes/mesh.ts";
import type { BufferTable } from "../bufferTable.ts";
import { costOf } from "../cost.ts";

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

/** Sizes of a product in terms of the dims of its op: m x k times k x n; `rows` is the number of rows of all experts. */
type ProductSizes = (d: Readonly<Record<string, number>>, rows: number) => readonly [m: number, n: number, k: number];

const tokens = (d: Readonly<Record<string, number>>): number => sizeOf(d, "B") * sizeOf(d, "S");
const sizeOf = (d: Readonly<Record<string, number>>, dim: string): number => d[dim] ?? 1;

const forward: ProductSizes = (d) => [tokens(d), sizeOf(d, "N"), sizeOf(d, "K")];
const inputGrad: ProductSizes = (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N")];
const groupedForward: ProductSizes = (d, rows) => [rows, sizeOf(d, "N"), sizeOf(d, "K")];
const groupedInputGrad: ProductSizes = (d, rows) => [rows, sizeOf(d, "K"), sizeOf(d, "N")];
const products: Readonly<Record<string, ProductSizes>> = {
  gemm: forward,
  gemm_swiglu: forward,
  gemm_dgrad: inputGrad,
  gemm_dgrad_swiglu: inputGrad,
  gemm_dgrad_pair: (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F")],
  gemm_dgrad_triple: (d) => [tokens(d), sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F") + sizeOf(d, "D")],
  gemm_wgrad: (d) => [sizeOf(d, "K"), sizeOf(d, "N"), tokens(d)],
  grouped_gemm: groupedForward,
  grouped_gemm_swiglu: groupedForward,
  grouped_dgrad: groupedInputGrad,
  grouped_dgrad_swiglu: groupedInputGrad,
  grouped_dgrad_pair: (d, rows) => [rows, sizeOf(d, "K"), sizeOf(d, "N") + sizeOf(d, "F")],
  grouped_wgrad: (d, rows) => [sizeOf(d, "K"), sizeOf(d, "N"), rows],
};

/** Ops that move rows, or elements, from and to places that other values say. */
const scattered =
  /^(permute|unpermute|take_rows|invert_rows|split_rows|merge_rows|pack|embed|embed_grad|arrange|quantile|top_k_mask|.*norm_grad|rmsnorm_grad_add)/;
const optimizers = /^(adam|adamw|sgd|muon|orthogonalize)/;

/** Returns the shape of a kernel on one rank, with the expected number of rows. An op that adds to a result has " adds" behind its name. */
export function kernelShape(i: Compute, mesh: Mesh, buffers: BufferTable): KernelShape {
  const { flops, bytes } = costOf(i, mesh, buffers);
  const op = products[i.op] && (i.accumulates ?? []).length > 0 ? `${i.op} adds` : i.op;
  const d: Record<string, number> = { ...i.attrs };
  for (const [dim, [size, subAxes]] of Object.entries(i.dims)) d[dim] = size / shardCount(mesh, subAxes);
  const isAttention = i.op.startsWith("attention") && flops > 0;
  // attention also reads logarithms of sums in f32, and multiplies nothing by them
  const dtype = isAttention ? firstOf(i, buffers) : widestOf(i, buffers);
  const base = { op, flops, bytes, dtype };
  const product = products[i.op];
  if (product) {
    const rows = flops / (2 * sizeOf(d, "K") * (sizeOf(d, "N") + (d.F ?? 0)));
    const [m, n, k] = product(d, rows);
    const isGrouped = i.op.startsWith("grouped");
    const experts = isGrouped ? sizeOf(d, "E") : 1;
    const isWgrad = i.op.endsWith("wgrad");
    // rows of one expert
    const sizes = isGrouped ? (isWgrad ? { m, n, k: k / experts, experts } : { m: m / experts, n, k, experts }) : { m, n, k, experts };
    const family =
      dtype === "f32" ? "product_f32" : isGrouped ? (isWgrad ? "grouped_wgrad" : "grouped") : isWgrad ? "product_wgrad" : "product";
    return { ...base, family, sizes };
  }
  if (isAttention) {
    const group = sizeOf(d, "M");
    const sizes = {
      ...{ queries: sizeOf(d, "S"), keys: sizeOf(d, "U"), heads: sizeOf(d, "B") * sizeOf(d, "G") * group, group },
      ...{ width: sizeOf(d, "C"), value_width: sizeOf(d, "W") },
    };
    return { ...base, family: i.op.endsWith("_grad") ? "attention_grad" : "attention", sizes };
  }
  const family = optimizers.test(i.op) ? "optimizer" : scattered.test(i.op) ? "rows" : "streaming";
  return { ...base, family, sizes: { bytes: Math.max(1, bytes) } };
}

/** Returns the type of the first operand; f32 if an instruction reads none. */
function firstOf(i: Compute, buffers: BufferTable): Dtype {
  const [first] = Object.values(i.reads);
  return first === undefined ? "f32" : buffers.get(first).dtype;
}

/** Returns the widest float type that an instruction reads; f32 if it reads none. */
function widestOf(i: Compute, buffers: BufferTable): Dtype {
  const read = Object.values(i.reads).map((id) => buffers.get(id).dtype);
  const floats = read.filter((dtype) => dtypes[dtype].kind === "float");
  return floats.sort((a, b) => dtypes[b].bytes - dtypes[a].bytes)[0] ?? "f32";
}
