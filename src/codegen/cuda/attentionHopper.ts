/**
 * Attention with Hopper's warpgroup products (sm_90a, 16-bit floats): the number of warpgroups of queries per thread block, and the tensor maps that
 * copy boxes of 64 columns.
 */
import { cudaArchs } from "../../../schemas/devices.ts";
import { type Dtype, type Float16, float16Types } from "../../../schemas/dtypes.ts";
import type { TensorMap } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { type AttentionSizes, isReordered } from "../attentionSizes.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { shareOf } from "./attentionOrder.ts";
import { causalMaskText, randomText, scales, startTexts } from "./attentionText.ts";
import { dividedGrid } from "./dividedGrid.ts";
import { source } from "./text.ts";
import { leftInRegisters, sumOperands } from "./wgmmaText.ts";

/** The grid is sized for this number; a device with fewer multiprocessors runs the remaining thread blocks later. */
const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;
/** Shared memory of a thread block in bytes. */
const SHARED = cudaArchs.sm_90a.sharedPerBlock * 1024;

/**
 * Returns the forward kernel, or nothing if the sizes do not fit. Per thread, scores take 64 registers, weights 32 and outputs W/2. Up to W = 64 three
 * warpgroups of queries fit (160 registers each; at W = 64 with blocks of 112 keys, or four with 112 registers and blocks of 64 keys), otherwise two (240
 * registers; beyond W = 128 with blocks of 80 keys). More rows reuse each block of keys more often. In zigzag order the blocks of keys must divide
 * the zigzag blocks.
 */
export function forwardHopper(spec: KernelSpec, d: AttentionSizes, half: Float16): GeneratedKernel | undefined {
  const { B, S, G, M, C, W } = d;
  const boxes = Math.ceil(C / 64);
  const valueBoxes = Math.ceil(W / 64);
  // a box must not be wider than a row of an operand; outputs are staged in the memory of queries
  if (G * Math.min(C, W) < 64 || valueBoxes > boxes) return undefined;
  const tiling = forwardTiling(d, boxes, valueBoxes);
  if (!tiling) return undefined;
  const { keys, groups, queryStages, shared } = tiling;
  const rows = 64 * groups;
  const { args, ...texts } = startTexts(d);
  const body = render("cuda/attention_wgmma.cu", {
    ...{
      name: spec.name,
      ...d,
      ...scales(d),
      ...texts,
      ...float16Types[half],
      groups,
      keys,
      queryStages,
      ...registers[groups],
      share: shareOf(d, { rows, keys, multiprocessors: MULTIPROCESSORS }),
    },
    hopper: render("cuda/hopper.cuh", {}),
    causalMask: causalMaskText(d),
    random: randomText(d),
    scores: product(keys, 0, half),
    values: weigh(W, half),
  });
  const tiles = Math.ceil(S / rows) * B * G * M;
  const blocks = Math.min(tiles, MULTIPROCESSORS);
  const launch = {
    entry: spec.name,
    grid: [spec.sharesDevice ? dividedGrid(blocks, tiles, MULTIPROCESSORS) : blocks, 1, 1] as [number, number, number],
    threads: 128 + 128 * groups,
    shared,
    args: [boxesOf("q", d, half, rows), boxesOf("k", d, half, keys), boxesOf("v", d, half, keys), "o", "lse", ...args],
  };
  return { source: source(spec, body), launches: [launch] };
}

/** By the number of warpgroups of queries, the registers per thread that the warpgroup of copies keeps, and those of the others. */
const registers = { 2: { give: 24, take: 240 }, 3: { give: 32, take: 160 }, 4: { give: 24, take: 112 } } as const;

/** Keys of a step; warpgroups of queries of a thread block, 64 rows each; stages of queries; bytes of shared memory. */
interface ForwardTiling {
  readonly keys: number;
  readonly groups: 2 | 3 | 4;
  readonly queryStages: 1 | 2;
  readonly shared: number;
}

/** The longest sequences whose heads of 64 are faster with four warpgroups and blocks of 64 keys: fewer scores beyond the causal mask (test/results/cuda-attention-2026-12-01.md). */
const SHORT = 1024;

/** Returns the tiling of the forward kernel, or nothing if its tiles do not fit in shared memory. */
function forwardTiling(d: AttentionSizes, boxes: number, valueBoxes: number): ForwardTiling | undefined {
  const { U, C, W, chunk, drops } = d;
  const isShort = C <= 64 && W === 64 && !drops && U <= SHORT && !isReordered(d, U);
  // with dropout three warpgroups are not faster than two
  const groupsOf = (keys: number) => (isShort ? 4 : !drops && (W < 64 || (W === 64 && keys < 128)) ? 3 : 2);
  const sharedOf = (keys: number, stages: number) =>
    128 * (64 * boxes * groupsOf(keys) * stages + 2 * (boxes + valueBoxes) * keys) + 64 + 16 * stages + (drops ? 4 : 0);
  const keys = (isReordered(d, U) ? [128, 64].filter((n) => chunk % n === 0) : [isShort ? 64 : W === 64 && !drops ? 112 : 128, 80]).find(
    (n) => sharedOf(n, 1) <= SHARED && (W <= 128 || n <= 80),
  );
  if (keys === undefined) return undefined;
  const queryStages = sharedOf(keys, 2) <= SHARED ? 2 : 1;
  return { keys, groups: groupsOf(keys), queryStages, shared: sharedOf(keys, queryStages) };
}

/** Rows of queries and keys of a step of the gradient. */
interface GradTiling {
  readonly rows: number;
  readonly keys: number;
}

/**
 * Returns the tiling of the gradient on Hopper, or nothing if no kernel of Hopper's own computes it. Registers hold the gradients of 128 keys, up to 192
 * wide, and of their values, up to 128 wide (with dropout 256 in total), or of 64 keys and values that are 256 wide. For heads of 64, 128 rows make the
 * tile of gradients of a warpgroup 64 × 64.
 */
export function gradTilingOfHopper(d: AttentionSizes): GradTiling | undefined {
  const { C, W } = d;
  const keys = isWide(d) ? 64 : 128;
  if (isReordered(d, d.U) && d.chunk % keys !== 0) return undefined;
  if (isWide(d)) return { rows: 64, keys };
  const fits = [64, 128, 192].includes(C) && (W === 64 || W === 128) && (!d.drops || C + W <= 256);
  return fits ? { rows: C === 64 ? 128 : 64, keys } : undefined;
}
const isWide = ({ C, W }: AttentionSizes): boolean => C === 256 && W === 256;

/** The text of a kernel of the gradient that all kernels of attention on tensor cores share. */
type GradText = Pick<
  Parameters<typeof render<"cuda/attention_grad_wgmma.cu">>[1],
  | "name"
  | "tiles"
  | "order"
  | "params"
  | "keyStart"
  | "maskArgs"
  | "starts"
  | "queryParams"
  | "half"
  | "suffix"
  | "part"
  | "documents"
  | "drops"
  | "split"
>;

/**
 * Returns the main launch of the gradient, and the source of all of its launches. `items`: blocks of keys, for each key head and part of its query
 * heads; there is a thread block for each. For heads of 64, unless collectives share the device, a thread block takes items until none is left: 9 % faster
 * with 1024 tokens, where an item has 4.5 steps on average. Wider heads are slower so (test/results/cuda-attention-2026-12-01.md).
 */
export function gradHopper(d: AttentionSizes, half: Float16, tiling: GradTiling, text: GradText, items: number, sharesDevice: boolean) {
  const { rows, keys } = tiling;
  const { documents, drops } = text;
  const more = {
    hopper: render("cuda/hopper.cuh", {}),
    common: render("cuda/attention_grad_hopper.cuh", { half: text.half, documents, drops }),
  };
  const persists = d.C === 64 && d.W === 64 && !sharesDevice;
  const whole = { ...text, ...more };
  const { body, shared } = isWide(d) ? gradWide(d, half, tiling, whole) : gradNarrow(d, half, tiling, whole, persists);
  const args = [boxesOf("q", d, half, rows), boxesOf("k", d, half, keys), boxesOf("v", d, half, keys), boxesOf("dy", d, half, rows)];
  // warpgroups of the wide kernel pass weights on as f16
  const dtypes: Readonly<Record<string, Dtype>> = isWide(d) ? { weights: "f16" } : {};
  return { body, threads: 384, shared, args, dtypes, blocks: persists ? Math.min(items, MULTIPROCESSORS) : items };
}
type WholeGradText = GradText & Readonly<Record<"hopper" | "common", string>>;

/**
 * Returns the source and the shared memory in bytes. Per thread, gradients of keys and values take (C + W) / 2 registers; with C = 192 and W = 128 the
 * rest holds the scores of 32 queries at a time, and the gradients of queries in two passes of 64 and 32 columns.
 */
function gradNarrow(d: AttentionSizes, half: Float16, { rows, keys }: GradTiling, text: WholeGradText, persists: boolean) {
  const { C, W } = d;
  const sub = C + W > 256 ? 32 : 64;
  const boxes = (C + W) / 64;
  const columns = (rows * C) / 128 - 64;
  const grads = 2 * keys * rows;
  // keys and values; two stages of queries and dy; two statistics per query row and stage; barriers, ticket
  const barriers = persists ? 128 + (d.drops ? 8 : 0) : 96 + (d.drops ? 4 : 0);
  const others = boxes * keys * 128 + 2 * boxes * rows * 128 + 16 * rows + barriers + (d.documents ? 4 * keys : 0);
  const tile = 4 * rows * C;
  // two buffers for gradients of scores, and for gradients of queries, if they fit
  const buffers = others + 2 * grads + tile <= SHARED ? 2 : 1;
  const tileBuffers = others + buffers * grads + 2 * tile <= SHARED ? 2 : 1;
  const products = {
    scores: product(sub, 0, half),
    queries: product(64, 1, half),
    rest: columns > 0 ? product(columns, 1, half) : "",
    weighQueries: weigh(C, half),
    weighDy: weigh(W, half),
  };
  const sharesMore = text.documents || text.drops;
  const items = persists ? render("cuda/attention_grad_items.cuh", { documents: text.documents }) : "";
  const body = render("cuda/attention_grad_wgmma.cu", { ...text, ...products, sub, buffers, tileBuffers, sharesMore, items });
  return { body, shared: others + buffers * grads + tileBuffers * tile };
}

/** Returns the same for heads of 256: 128 registers per thread hold the gradients of keys, or of values. */
function gradWide(d: AttentionSizes, half: Float16, { rows, keys }: GradTiling, text: WholeGradText) {
  const products = { scores: product(64, 0, half), queries: product(64, 1, half), weigh: weigh(d.C, half) };
  // keys, values, two stages of queries, one of dy; gradients of scores, weights; three quarters of the gradients of queries
  const tiles = 2 * d.C * (2 * keys + 3 * rows) + 4 * rows * keys + 3 * rows * d.C;
  // two statistics per query row and stage; 19 barriers, ticket; bits of dropped weights
  const others = 16 * rows + 160 + (d.drops ? 8 * keys : 0) + (d.documents ? 4 * keys : 0);
  return { body: render("cuda/attention_grad_wide.cu", { ...text, ...products }), shared: tiles + others };
}

/** Returns the tensor map of an operand with boxes of 64 columns and `high` rows of one sequence. */
function boxesOf(tensor: "q" | "dy" | "k" | "v", { B, S, U, G, M, C, W }: AttentionSizes, half: Float16, high: number): TensorMap {
  const [heads, length] = tensor === "q" || tensor === "dy" ? [G * M, S] : [G, U];
  const row = heads * (tensor === "q" || tensor === "k" ? C : W);
  return {
    kind: "tensor_map",
    tensor,
    dtype: half,
    sizes: [row, length, B],
    strides: [row * 2, length * row * 2],
    box: [64, high, 1],
    swizzle: "128B",
  };
}

/** Returns a product with 64 rows and n columns of two operands in shared memory; `transposed`: the summed dim is the strided dim of both. */
const product = (n: number, transposed: 0 | 1, half: Float16): string =>
  render("cuda/wgmma.cuh", {
    ...{ name: "product", size: n / 2, n, ...sumOperands(n), ...float16Types[half], transposedA: transposed, transposedB: transposed },
    ...{ aAt: n / 2, bAt: n / 2 + 1, addAt: n / 2 + 2 },
  });
/** Returns the same with the left operand in registers, and n as the contiguous dim of the right operand. */
const weigh = (n: number, half: Float16): string =>
  render("cuda/wgmma_weigh.cuh", {
    ...{ n, ...sumOperands(n), ...float16Types[half], left: leftInRegisters(n), bAt: n / 2 + 4, addAt: n / 2 + 5 },
  });
