/**
 * The order of key blocks in the gradient of attention, chosen by a simulation of the launch: causal blocks have unequal lengths, and a block that
 * adds to the gradients of queries waits for the blocks before it. The choice depends on the sizes alone; all orders give equal sums up to rounding.
 */
import { needsNoText } from "../../../templates/fill.ts";
import { positionOf } from "../../ops/positions.ts";
import type { AttentionSizes } from "../attentionSizes.ts";

/**
 * `wave`: concurrent key blocks of a head; `alternating`: every second wave starts with its first block; `split`: thread blocks that share the query
 * heads of a key head (templates/cuda/attention_order.cuh).
 */
export interface Order {
  readonly wave: number;
  readonly alternating: boolean;
  readonly split: number;
}

/** Rows of queries and keys of a step; multiprocessors, with one thread block each; whether the kernel can split query heads. */
export interface Tiling {
  readonly rows: number;
  readonly keys: number;
  readonly multiprocessors: number;
  readonly splits: boolean;
}

/** In steps: the delay between the additions of two blocks, and the work of a block outside its steps. */
const [HANDOVER, OUTSIDE] = [0.3, 1];
/**
 * The average increase of a step's length because the first block of a wave reads queries and their sums from memory instead of the cache. Fitted to
 * an H200: heads of 192 without sharing take 1.5 times as long in waves of one, 1.05 times in waves of two, and no longer from four on.
 */
const fetching = (wave: number): number => 0.4 / wave ** 2 + 0.2 / wave;
/** The increase of a step's length per block of an alternating wave: its blocks all end at the rows of the last head (fitted to waves of 8 and 16). */
const MEETING = 0.006;
/** The most steps that are simulated; longer launches are simulated with fewer query heads. */
const MOST_STEPS = 2 ** 22;

/** Operations a second of a multiprocessor in a step, and bytes a second of memory (an H200); seconds of one more launch. */
const [RATE, MEMORY, LAUNCH] = [4e12, 4e12, 5e-6];

/**
 * Returns the fastest order by simulation. Candidates: descending or alternating waves about as wide as the device; with few key heads also query heads
 * in two parts, each with separate f32 gradients of keys and values that one more launch adds.
 */
export function orderOf(d: AttentionSizes, tiling: Tiling): Order {
  const { multiprocessors, keys } = tiling;
  const keyBlocks = Math.ceil(d.U / keys);
  const candidates = [1, 2]
    .filter((split) => split === 1 || (tiling.splits && d.M % split === 0 && d.B * d.G * keyBlocks < 4 * multiprocessors))
    .flatMap((split): Order[] => {
      const groups = d.B * d.G * split;
      const wave = (n: number) => Math.min(keyBlocks, Math.max(1, Math.floor(n)));
      return [
        { split, wave: wave(multiprocessors / groups), alternating: true },
        ...[Math.ceil(multiprocessors / groups), 4, 8, 16, 32].map((n) => ({ split, wave: wave(n), alternating: false })),
      ];
    });
  const [one] = candidates;
  // scratch depends on the split alone, and the simulation takes a tenth of a check
  if (one && needsNoText() && candidates.every(({ split }) => split === one.split)) return one;
  const first = firstQueryBlocks(d, tiling);
  const times = candidates.map((order) => stepsOf(order, d, first, tiling) + stepsOfSum(order, d, tiling));
  return candidates[times.indexOf(Math.min(...times))] ?? { wave: 1, alternating: false, split: 1 };
}

/** Returns the time of the launch that adds the parts, in steps. */
function stepsOfSum({ split }: Order, { B, G, U, C, W }: AttentionSizes, { rows, keys }: Tiling): number {
  const step = (2 * rows * keys * (3 * C + 2 * W)) / RATE;
  return split === 1 ? 0 : (LAUNCH + (2 * split * B * G * U * (C + W) * 4) / MEMORY) / step;
}

/** Returns per key block the first query block that attends to it: for queries at the end of the sequence, or for the shard of the first rank. */
function firstQueryBlocks({ S, U, chunk, ranks, part }: AttentionSizes, { rows, keys }: Tiling): Int32Array {
  const positions = (count: number, start: number) =>
    Int32Array.from({ length: count }, (_, i) => positionOf(start + i, chunk, ranks)).sort();
  const queries = positions(S, chunk > 0 || part ? 0 : Math.max(0, U - S));
  const keyPositions = positions(U, 0);
  let query = 0;
  return Int32Array.from({ length: Math.ceil(U / keys) }, (_, block) => {
    while (query < S && (queries[query] ?? 0) < (keyPositions[block * keys] ?? 0)) query++;
    return query < S ? Math.floor(query / rows) : Math.ceil(S / rows);
  });
}

/** Returns the simulated duration of a launch in steps. */
export function stepsOf({ wave, alternating, split }: Order, { B, G, M, S }: AttentionSizes, first: Int32Array, tiling: Tiling): number {
  const queryBlocks = Math.ceil(S / tiling.rows);
  const [groups, waves] = [B * G * split, Math.ceil(first.length / wave)];
  const heads = Math.max(1, Math.min(M / split, Math.floor(MOST_STEPS / (groups * first.length * queryBlocks))));
  const added = new Float64Array(groups * heads * queryBlocks).fill(Number.NEGATIVE_INFINITY);
  const length = 1 + fetching(wave) + (alternating ? MEETING * wave : 0);
  const free = new Earliest(tiling.multiprocessors);
  let end = 0;
  for (let ticket = 0; ticket < waves * groups * wave; ticket++) {
    const rest = ticket % (groups * wave);
    const [place, group] = alternating ? [Math.floor(rest / groups), rest % groups] : [rest % wave, Math.floor(rest / wave)];
    const turn = Math.floor(ticket / (groups * wave));
    const block = turn * wave + (alternating && turn % 2 ? place : wave - 1 - place);
    const begin = first[block];
    if (begin === undefined) continue;
    let now = free.time() + OUTSIDE / 2;
    for (let head = group * heads; head < group * heads + heads; head++)
      for (let at = head * queryBlocks + begin; at < (head + 1) * queryBlocks; at++) {
        now = Math.max(now + length, (added[at] ?? 0) + HANDOVER);
        added[at] = now;
      }
    now += OUTSIDE / 2;
    free.take(now);
    end = Math.max(end, now);
  }
  return end;
}

/** Bytes of keys and values that stay in the L2 cache (50 or 60 MB) of an H100 or H200 along with other data. */
const CACHE = 24e6;

/**
 * Returns the number of heads that run concurrently in the forward pass, whose persistent thread blocks take the query tiles of a share in rounds
 * (templates/cuda/attention_wgmma.cu). Their keys and values must fit in the cache; among such numbers it minimizes the load of the busiest thread
 * block. All heads if those of one key head do not fit.
 */
export function shareOf(d: AttentionSizes, tiling: Omit<Tiling, "splits">): number {
  const { B, G, M, S, U, C, W } = d;
  const [all, blocks] = [B * G * M, Math.ceil(S / tiling.rows)];
  const most = Math.floor(CACHE / (2 * U * (C + W)));
  if (most * M >= all) return all;
  const least = Math.ceil(tiling.multiprocessors / (blocks * M));
  const shares = Array.from({ length: Math.max(0, most - least + 1) }, (_, i) => (least + i) * M).filter((share) => share < all);
  const times = shares.map((share) => longestOfShares(share, d, tiling));
  return shares[times.indexOf(Math.min(...times))] ?? all;
}

/** Returns the load of the busiest thread block of the forward pass with this many heads in a share: blocks of keys, and one for each tile. */
export function longestOfShares(
  share: number,
  { B, G, M, S, U }: AttentionSizes,
  { rows, keys, multiprocessors }: Omit<Tiling, "splits">,
): number {
  const [all, blocks] = [B * G * M, Math.ceil(S / rows)];
  const empty = Math.floor((blocks * rows - S) / 64) * 64;
  const steps = new Float64Array(multiprocessors);
  for (let first = 0; first < all; first += share) {
    const heads = Math.min(share, all - first);
    for (let place = 0; place < heads * blocks; place++) {
      const turn = place % multiprocessors;
      const at = Math.floor(place / multiprocessors) % 2 ? multiprocessors - 1 - turn : turn;
      const end = (blocks - Math.floor(place / heads)) * rows - empty;
      steps[at] = (steps[at] ?? 0) + Math.ceil(Math.min(U, S, end) / keys) + 1;
    }
  }
  return Math.max(...steps);
}

/** The times at which multiprocessors become free: a binary heap with the earliest first. */
class Earliest {
  readonly #times: Float64Array;
  constructor(count: number) {
    this.#times = new Float64Array(count);
  }
  time(): number {
    return this.#times[0] ?? 0;
  }
  /** Sets the time at which the earliest one becomes free again. */
  take(time: number): void {
    const times = this.#times;
    let at = 0;
    for (;;) {
      const left = 2 * at + 1;
      const child = left + 1 < times.length && (times[left + 1] ?? 0) < (times[left] ?? 0) ? left + 1 : left;
      const least = times[child];
      if (least === undefined || least >= time) break;
      times[at] = least;
      at = child;
    }
    times[at] = time;
  }
}
