/**
 * Attention on Hopper's own tensor-core instructions (sm_90a, 16-bit floats): how many warpgroups of queries a block has, and the tensor
 * maps by which boxes of 64 columns are copied.
 */
import { cudaArchs } from "../../../schemas/devices.ts";
import { type Float16, float16Types } from "../../../schemas/dtypes.ts";
import type { TensorMap } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { type AttentionSizes, isReordered } from "../attentionSizes.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { shareOf } from "./attentionOrder.ts";
import { causalMaskText, randomText, scales, startTexts } from "./attentionText.ts";
import { source } from "./text.ts";

/** A device with fewer multiprocessors runs the rest of the blocks later. */
const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;
/** Bytes of shared memory that a block may have. */
const SHARED = cudaArchs.sm_90a.sharedPerBlock * 1024;

/**
 * Per thread, scores take 64 registers, weights 32 and outputs W/2: with values of at most 64 three warpgroups of queries have
 * room for them (160 registers each; at 64 itself with blocks of 112 keys), else two (240; beyond 128 with blocks of 80). More rows make more of each
 * block of keys.
 * Keys that lie in blocks elsewhere are copied in blocks that divide those.
 */
export function forwardHopper(spec: KernelSpec, d: AttentionSizes, half: Float16): GeneratedKernel | undefined {
  const { B, S, U, G, M, C, W, chunk } = d;
  const boxes = Math.ceil(C / 64);
  const valueBoxes = Math.ceil(W / 64);
  // no box is wider than the rows of any operand, and outputs leave through the queries' place
  // three warpgroups that draw random words are slower than warps with more registers (measured, heads of 64)
  if (G * Math.min(C, W) < 64 || valueBoxes > boxes || (d.drops && W <= 64)) return undefined;
  const groupsOf = (keys: number) => (W < 64 || (W === 64 && keys < 128) ? 3 : 2);
  const sharedOf = (keys: number) => 128 * (64 * boxes * groupsOf(keys) + 2 * (boxes + valueBoxes) * keys) + 80;
  const keys = (isReordered(d, U) ? [128, 64].filter((n) => chunk % n === 0) : [W === 64 ? 112 : 128, 80]).find(
    (n) => sharedOf(n) <= SHARED && (W <= 128 || n <= 80),
  );
  if (!keys) return undefined;
  const groups = groupsOf(keys);
  const rows = 64 * groups;
  const { give, take } = groups === 3 ? { give: 32, take: 160 } : { give: 24, take: 240 };
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
      give,
      take,
      share: shareOf(d, { rows, keys, multiprocessors: MULTIPROCESSORS }),
    },
    hopper: render("cuda/hopper.cuh", {}),
    sight: causalMaskText(d),
    random: randomText(d),
    scores: product(keys, 0, half),
    values: weigh(W, half),
  });
  const tiles = Math.ceil(S / rows) * B * G * M;
  const launch = {
    entry: spec.name,
    grid: [Math.min(tiles, MULTIPROCESSORS), 1, 1] as [number, number, number],
    threads: 128 + 128 * groups,
    shared: sharedOf(keys),
    args: [boxesOf("q", d, half, rows), boxesOf("k", d, half, keys), boxesOf("v", d, half, keys), "o", "lse", ...args],
  };
  return { source: source(spec, body), launches: [launch] };
}

/**
 * Whether the gradient of such heads has a launch of its own here: in registers there is room for gradients of 64 keys, 192 and 128 wide, or where
 * weights are dropped 256 in all.
 */
export const isGradOfHopper = (d: AttentionSizes): boolean =>
  [64, 128, 192].includes(d.C) &&
  (d.W === 64 || d.W === 128) &&
  (!d.drops || d.C + d.W <= 256) &&
  (!isReordered(d, d.U) || d.chunk % 128 === 0);

/** Rows of queries in a step: of narrow heads as many as make a warpgroup's gradients of queries 64 by 64. */
export const rowsOfGrad = ({ C }: AttentionSizes): number => (C === 64 ? 128 : 64);

/**
 * The main launch of that gradient: what differs from the plain tensor cores'. Per thread, gradients of keys and values take (C + W) / 2 registers;
 * beside 192 and 128 there is room for the scores of 32 queries at a time, and for gradients of queries 64 and 32 columns after each other.
 */
export function gradHopper(
  d: AttentionSizes,
  half: Float16,
  fillIn: (
    parts: Record<"hopper" | "scores" | "queries" | "rest" | "weighQueries" | "weighDy", string> & {
      sub: number;
      buffers: number;
      tileBuffers: number;
    },
  ) => string,
) {
  const { C, W } = d;
  const [rows, keys] = [rowsOfGrad(d), 128];
  const sub = C + W > 256 ? 32 : 64;
  const boxes = (C + W) / 64;
  const columns = (rows * C) / 128 - 64;
  const grads = 2 * keys * rows;
  // keys and values; two stages of queries and dy; two numbers of each query row, per stage; barriers, ticket
  const others = boxes * keys * 128 + 2 * boxes * rows * 128 + 16 * rows + 96;
  const tile = 4 * rows * C;
  // gradients of scores, and of queries: two of each where there is room
  const buffers = others + 2 * grads + tile <= SHARED ? 2 : 1;
  const tileBuffers = others + buffers * grads + 2 * tile <= SHARED ? 2 : 1;
  const products = {
    scores: product(sub, 0, half),
    queries: product(64, 1, half),
    rest: columns > 0 ? product(columns, 1, half) : "",
    weighQueries: weigh(C, half),
    weighDy: weigh(W, half),
  };
  return {
    body: fillIn({ hopper: render("cuda/hopper.cuh", {}), ...products, sub, buffers, tileBuffers }),
    threads: 384,
    shared: others + buffers * grads + tileBuffers * tile,
    args: [boxesOf("q", d, half, rows), boxesOf("k", d, half, keys), boxesOf("v", d, half, keys), boxesOf("dy", d, half, rows)],
  };
}

/** Boxes of 64 columns and `high` rows of one sequence. */
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

/** 64 rows and n columns from two operands in shared memory; `transposed`: both lie with what is summed over down their rows. */
const product = (n: number, transposed: 0 | 1, half: Float16): string =>
  render("cuda/wgmma.cuh", {
    ...{ n, ...sums(n), ...float16Types[half], transposedA: transposed, transposedB: transposed },
    ...{ aAt: n / 2, bAt: n / 2 + 1, addAt: n / 2 + 2 },
  });
/** The same with the left operand in registers, and the other lying with n along its rows. */
const weigh = (n: number, half: Float16): string =>
  render("cuda/wgmma_weigh.cuh", {
    ...{ n, ...sums(n), ...float16Types[half], bAt: n / 2 + 4, addAt: n / 2 + 5 },
    left: `{${[0, 1, 2, 3].map((i) => `%${n / 2 + i}`).join(", ")}}`,
  });

/** A warpgroup's sums of 64 rows and n columns, as an instruction names them. */
function sums(n: number) {
  const count = n / 2;
  const lines = (form: (i: number) => string) =>
    Array.from({ length: count / 8 }, (_, l) => {
      const line = Array.from({ length: 8 }, (_, i) => form(8 * l + i)).join(", ");
      return 8 * l + 8 === count ? line : `${line},`;
    });
  return { count, names: lines((i) => `%${i}`), places: lines((i) => `"+f"(sums[${i}])`) };
}
