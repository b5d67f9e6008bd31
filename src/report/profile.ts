/**
 * Profiles of a step: time per instruction with equal layers merged, and a trace for Perfetto. Rates use the work in the plan: flops by the
 * formula of the op, and bytes with each operand read or written once.
 */

import { deviceOf } from "../../schemas/devices.ts";
import type { Compute, Plan, Program } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import type { Timing } from "../../schemas/timing.ts";
import { buffersOf } from "../analysis/bufferTable.ts";
import { costOf } from "../analysis/cost.ts";
import { layerOf } from "../analysis/layerNames.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { countText, table } from "../units.ts";
import { type TraceSlice, traceText } from "./trace.ts";

/** The time and rates of an instruction. */
export interface ProfileRow {
  readonly id: string;
  readonly op: string;
  readonly calls: number;
  readonly milliseconds: number;
  /** The share of the total time of all instructions. */
  readonly share: number;
  readonly tflops: number;
  readonly gigabytes_per_second: number;
  /** The fraction of the device's peak: the larger of arithmetic and bandwidth. */
  readonly of_peak: number;
}

/** Returns the rows by descending time. An instruction is called once per microbatch. */
export function profileRows(plan: Plan, timings: readonly Timing[]): ProfileRow[] {
  const device = deviceOf(plan.job.cluster.device);
  const work = plan.programs.map((p) => timedInstructions(plan, p));
  const groups = new Map<string, { op: string; calls: number; us: number; flops: number; bytes: number; least: number }>();
  let launched: Timing | undefined;
  for (const t of timings) {
    const { form, flops, bytes, peak } = work[stageOfRank(plan.mesh, t.rank)]?.get(t.id) ?? {
      form: t.id,
      flops: 0,
      bytes: 0,
      peak: Number.POSITIVE_INFINITY,
    };
    const g = groups.get(form) ?? { op: t.op, calls: 0, us: 0, flops: 0, bytes: 0, least: 0 };
    // launches of one instruction are consecutive
    const again = launched?.id === t.id && launched.rank === t.rank && launched.stream === t.stream && t.begin_us >= launched.end_us;
    launched = t;
    g.us += t.end_us - t.begin_us;
    if (!again) {
      g.calls++;
      g.flops += flops;
      g.bytes += bytes;
      g.least += (1e6 * flops) / peak;
    }
    groups.set(form, g);
  }
  const total = [...groups.values()].reduce((sum, g) => sum + g.us, 0);
  return [...groups]
    .map(([id, { op, calls, us, flops, bytes, least }]) => ({
      id,
      op,
      calls,
      milliseconds: us / 1e3,
      share: us / total,
      tflops: flops / us / 1e6,
      gigabytes_per_second: bytes / us / 1e3,
      of_peak: Math.max(least / us, bytes / us / 1e-6 / device.bandwidth),
    }))
    .sort((a, b) => b.milliseconds - a.milliseconds);
}

/** Returns flops and bytes of each instruction of a stage, on one rank, and the device's peak in FLOP/s on operands of its widest type. */
function timedInstructions(plan: Plan, p: Program): Map<string, { form: string; flops: number; bytes: number; peak: number }> {
  const buffers = buffersOf(p);
  const { peak: peaks } = deviceOf(plan.job.cluster.device);
  const peakOf = (i: Compute): number => {
    const rates = Object.values(i.reads).map((id) => peaks[buffers.get(id).dtype] ?? Number.POSITIVE_INFINITY);
    return Math.min(Number.POSITIVE_INFINITY, ...rates);
  };
  return new Map(
    instructionsOf(p).map((i) => [
      i.id,
      {
        form: anyLayer(i.id, layerOf(i, buffers)),
        ...costOf(i, plan.mesh, buffers),
        peak: i.kind === "compute" ? peakOf(i) : Number.POSITIVE_INFINITY,
      },
    ]),
  );
}

/** Formats the profile as a table: at most `most` rows, and the sum of the others. */
export function printProfile(plan: Plan, timings: readonly Timing[], most = 40): string {
  const rows = profileRows(plan, timings);
  const shown = rows.slice(0, most);
  const rest = rows.slice(most);
  const number = (x: number): string => (x === 0 ? "" : x.toPrecision(3));
  const percent = (x: number): string => `${(100 * x).toFixed(1)} %`;
  // the row of the CPU is a budget for the memory rule, not a measured peak: there is nothing to be a part of
  const hasPeak = deviceOf(plan.job.cluster.device).links !== null;
  const cells = shown.map((r) => [
    r.milliseconds.toFixed(3),
    percent(r.share),
    countText(r.calls),
    number(r.tflops),
    number(r.gigabytes_per_second),
    ...(hasPeak ? [percent(r.of_peak)] : []),
    r.op,
    r.id,
  ]);
  const head = ["ms", "share", "calls", "TFLOP/s", "GB/s", ...(hasPeak ? ["of peak"] : []), "op", "instruction"];
  const others = rest.reduce((sum, r) => sum + r.milliseconds, 0);
  const lines = table([head, ...cells], hasPeak ? [0, 1, 2, 3, 4, 5] : [0, 1, 2, 3, 4]);
  if (rest.length) lines.push(`  ${others.toFixed(3)} ms in ${rest.length} others`);
  const begin = timings.reduce((least, t) => Math.min(least, t.begin_us), Number.POSITIVE_INFINITY);
  const end = timings.reduce((greatest, t) => Math.max(greatest, t.end_us), 0);
  const ranks = new Set(timings.map((t) => t.rank)).size;
  return `where the time of a step went: ${((end - begin) / 1e3).toFixed(3)} ms from first to last, ${ranks} rank${ranks === 1 ? "" : "s"}${hasPeak ? `; peak of ${plan.job.cluster.device}` : ""}\n${lines.join("\n")}\n`;
}

/** Returns the tracks of a rank in a trace of timings: its streams. */
const profileTracks = (timings: readonly Timing[]): string[] => [...new Set(timings.map(({ stream }) => stream))].sort();

/** Returns a timing as a slice of a trace: named by its instruction, of the category of its op. */
export const sliceOfTiming = (timing: Timing): TraceSlice => ({ ...timing, name: timing.id, category: timing.op });

/** Returns a trace in the Chrome trace format: one process per rank, one track per stream. */
export function traceOf(timings: readonly Timing[]): string {
  const streams = profileTracks(timings);
  const ranks = [...new Set(timings.map((t) => t.rank))].sort((a, b) => a - b);
  const slices = (rank: number): TraceSlice[] => timings.flatMap((t) => (t.rank === rank ? [sliceOfTiming(t)] : []));
  return [
    ...traceText(
      ranks.map((rank) => ({ rank, name: `rank ${rank}`, slices: () => slices(rank) })),
      streams,
    ),
  ].join("");
}
