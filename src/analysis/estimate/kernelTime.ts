/**
 * The time of a kernel by a device profile: the law of its family, corrected by measured kernels of its op. The correction is the ratio of
 * measured to computed time, interpolated over the logarithms of sizes; far from all measured shapes it is 1, the law alone.
 */

import type { DeviceProfile, KernelLaw } from "../../../schemas/deviceProfile.ts";
import { type Hardware, hardwareOf } from "./hardware.ts";
import type { KernelShape } from "./kernelShape.ts";
import { settledClock } from "./powerClock.ts";

/** Where a time comes from: a kernel of this shape was measured; kernels of near shapes were; neither, so a law says it. */
export const timeSources = ["measured", "interpolated", "law"] as const;
/** The name of a source of a time. */
export type TimeSource = (typeof timeSources)[number];

/** A time in seconds and its source. */
export interface SourcedTime {
  readonly seconds: number;
  readonly source: TimeSource;
}

/** The edges of a tile of a product. */
const TILE = { m: 128, n: 256 } as const;
/** Rows that an expert's last tile leaves empty, on average. */
const HALF_TILE = TILE.m / 2;

/** Returns the tiles of a product over the tiles that its last wave has room for. */
function fillOf({ m = 1, n = 1, experts = 1 }: KernelShape["sizes"], multiprocessors: number): number {
  const tiles = Math.ceil(m / TILE.m) * Math.ceil(n / TILE.n) * experts;
  return tiles / (multiprocessors * Math.ceil(tiles / multiprocessors));
}

/** Returns the seconds of a kernel by the law of its family. */
export function lawSeconds(shape: KernelShape, law: KernelLaw, hardware: Hardware): number {
  const { sizes, flops, bytes, dtype } = shape;
  const memory = bytes / (law.bandwidth_share * hardware.bandwidth);
  const peak = hardware.peak[dtype === "i32" ? "f32" : dtype];
  const depth = sizes.k ?? Math.min(sizes.queries ?? Number.POSITIVE_INFINITY, sizes.keys ?? Number.POSITIVE_INFINITY);
  const isProduct = sizes.m !== undefined;
  const padding = isProduct && (sizes.experts ?? 1) > 1 && shape.family === "grouped" ? ((sizes.m ?? 1) + HALF_TILE) / (sizes.m ?? 1) : 1;
  const fill = isProduct ? fillOf(sizes, hardware.multiprocessors) ** law.fill_power : 1;
  const arithmetic = flops === 0 ? 0 : ((flops / (law.peak_share * peak)) * (1 + law.depth_half / depth) * padding) / fill;
  const both = (arithmetic ** law.power + memory ** law.power) ** (1 / law.power);
  return 1e-6 * law.overhead_us + both;
}

/** The distance, in natural logarithms of sizes, at which a measured ratio counts as much as the law; of attention by `sizeWeights`. */
const REACH = 1;
const ATTENTION_REACH = 2;
/** Of kernels that copy by elements: laws of their families say nothing about them. */
const UNALIGNED_REACH = 8;

const reachOf = ({ op, family }: KernelShape): number =>
  op.includes(" unaligned") ? UNALIGNED_REACH : family.startsWith("attention") ? ATTENTION_REACH : REACH;

/**
 * How the squared logarithm of each size counts in the distance of two kernels; 1 if not listed. Kernels of attention are written for their widths,
 * so a kernel of another width says little; shared keys and more heads say little about time. Chosen by leaving out each of 44 measured kernels of
 * attention of the H200 in turn, all but gradients of heads of 256: mean error 6.0 % (test/results/estimate-2026-11-30.md).
 */
const sizeWeights: Readonly<Record<string, number>> = { queries: 0.5, keys: 0.5, heads: 0.1, group: 0.1, width: 8, value_width: 8 };
/** Shapes at most this far apart count as one shape. */
const SAME = 0.02;

/** A measured kernel of an op: the logarithms of its sizes, and the ratio of measured to computed time. */
interface MeasuredRatio {
  readonly logs: Readonly<Record<string, number>>;
  readonly ratio: number;
}

/** Times of kernels by one profile. */
export class KernelTimes {
  readonly #profile: DeviceProfile;
  readonly #hardware: Hardware;
  readonly #ratios = new Map<string, readonly MeasuredRatio[]>();

  constructor(profile: DeviceProfile) {
    this.#profile = profile;
    this.#hardware = hardwareOf(profile);
  }

  /** Returns the clock of a step whose kernels are run so many times each. */
  clockOf(kernels: readonly { readonly shape: KernelShape; readonly times: number }[]): number {
    const sum = (of: (shape: KernelShape) => number): number => kernels.reduce((all, { shape, times }) => all + times * of(shape), 0);
    const load = { flops: sum(({ flops }) => flops), bytes: sum(({ bytes }) => bytes) };
    return settledClock(this.#profile.kernels, this.#hardware, load, (clock) => sum((shape) => this.timeOf(shape, clock).seconds));
  }

  /** Returns the time of a kernel on the device, alone. `powerClock`: the clock that the power limit leaves, as a share of the highest. */
  timeOf(shape: KernelShape, powerClock = 1): SourcedTime {
    const { families } = this.#profile.kernels;
    const clock = this.#profile.kernels.clock * powerClock;
    // power lowers the clock of the arithmetic units, not that of the memory
    const family = families[shape.family];
    const law = lawSeconds(shape, { ...family, peak_share: family.peak_share * clock }, this.#hardware);
    const measured = this.#ratiosOf(shape);
    if (measured.length === 0) return { seconds: law, source: "law" };
    let [weights, sum, nearest, nearestRatio] = [0, 0, Number.POSITIVE_INFINITY, 1];
    for (const { logs, ratio } of measured) {
      let squared = 0;
      for (const [name, log] of Object.entries(logs)) squared += (sizeWeights[name] ?? 1) * (Math.log(shape.sizes[name] ?? 1) - log) ** 2;
      if (squared < nearest) [nearest, nearestRatio] = [squared, ratio];
      // the nearest decide: tables have many kernels far away
      const weight = 1 / (squared + SAME ** 2) ** 2;
      weights += weight;
      sum += weight * Math.log(ratio);
    }
    if (Math.sqrt(nearest) <= SAME) return { seconds: law * nearestRatio, source: "measured" };
    const reach = reachOf(shape);
    const trust = 1 / (1 + nearest / reach ** 2);
    return { seconds: law * Math.exp((trust * sum) / weights), source: Math.sqrt(nearest) <= reach ? "interpolated" : "law" };
  }

  /** Returns the measured kernels that a shape is compared with: those of its op and type. */
  #ratiosOf(shape: KernelShape): readonly MeasuredRatio[] {
    const { op, family } = shape;
    const key = `${op} ${family}`;
    const known = this.#ratios.get(key);
    if (known) return known;
    const { measured, families } = this.#profile.kernels;
    const found = measured
      .filter((m) => m.op === op && Object.keys(shape.sizes).every((name) => m.sizes[name] !== undefined))
      .map(({ sizes, us }) => {
        const computed = lawSeconds({ ...shape, ...workAt(shape, sizes), sizes }, families[family], this.#hardware);
        const logs = Object.fromEntries(Object.keys(shape.sizes).map((name) => [name, Math.log(sizes[name] ?? 1)]));
        return { logs, ratio: (1e-6 * us) / computed };
      });
    this.#ratios.set(key, found);
    return found;
  }
}

/** Returns the work of a kernel of other sizes: flops in proportion to the sizes that they depend on, bytes to those of its operands. */
function workAt({ sizes: own, flops, bytes }: KernelShape, sizes: Readonly<Record<string, number>>): { flops: number; bytes: number } {
  const of = (s: Readonly<Record<string, number>>, name: string): number => s[name] ?? 1;
  const ratio = (f: (s: Readonly<Record<string, number>>) => number): number => f(sizes) / f(own);
  if (own.bytes !== undefined) return { flops, bytes: of(sizes, "bytes") };
  if (own.m !== undefined) {
    const operands = (s: Readonly<Record<string, number>>): number =>
      of(s, "experts") * (of(s, "m") * of(s, "k") + of(s, "k") * of(s, "n") + of(s, "m") * of(s, "n"));
    return { flops: flops * ratio((s) => of(s, "experts") * of(s, "m") * of(s, "n") * of(s, "k")), bytes: bytes * ratio(operands) };
  }
  const scores = (s: Readonly<Record<string, number>>): number =>
    of(s, "heads") * of(s, "queries") * of(s, "keys") * (of(s, "width") + of(s, "value_width"));
  return { flops: flops * ratio(scores), bytes: bytes * ratio((s) => of(s, "heads") * of(s, "queries") * of(s, "width")) };
}
