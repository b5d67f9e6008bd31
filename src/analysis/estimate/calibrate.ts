/** Makes a device profile from the timings of a run: kernels by op and sizes, collectives inside a node by ranks and bytes. */
import { type CollectiveRates, type DeviceProfile, type KernelFamily, kernelFamilies } from "../../../schemas/deviceProfile.ts";
import type { CollectiveKind, Plan } from "../../../schemas/plan.ts";
import { instructionsOf } from "../../../schemas/program.ts";
import { stageOfRank } from "../../../schemas/sharding.ts";
import type { Timing } from "../../../schemas/timing.ts";
import { largest } from "../../units.ts";
import { buffersOf } from "../bufferTable.ts";
import { programOf } from "../stages.ts";
import { hardwareOf } from "./hardware.ts";
import { asFirst, type KernelShape, kernelShape } from "./kernelShape.ts";
import { lawSeconds } from "./kernelTime.ts";
import { sentShare } from "./linkTime.ts";
import { clockOf } from "./powerClock.ts";
import { topologyOf } from "./topology.ts";

/** What a calibration says about itself. */
export interface CalibrationSource {
  readonly name: string;
  readonly device: string;
  readonly stack: string;
  /** The machine and the command. */
  readonly from: string;
  /** As 2026-11-30. */
  readonly date: string;
}

/** The timed steps of a plan. */
export interface CalibrationRun {
  readonly plan: Plan;
  /** Of each step the timings of local ranks, in the order of their beginning. */
  readonly steps: readonly (readonly Timing[])[];
}

/** Times of equal kernels, or of equal collectives. */
interface Samples<Of> {
  readonly of: Of;
  readonly us: number[];
}
interface MeasuredCollective {
  readonly how: CollectiveKind;
  readonly ranks: number;
  readonly bytes: number;
}

/**
 * Returns a profile with the measured kernels and links of runs, and the laws of `base`, whose shares of peak and bandwidth are scaled to what was
 * measured. Links that were not measured are those of `base`.
 */
export function calibrated(base: DeviceProfile, runs: readonly CalibrationRun[], source: CalibrationSource): DeviceProfile {
  const { kernels, collectives } = samplesOf(base, runs);
  const { from, date, ...named } = source;
  const profile: DeviceProfile = { ...base, ...named };
  const hardware = hardwareOf(profile);
  const ratios = new Map<KernelFamily, WeightedRatio[]>();
  const measured = kernels.map(({ of, us }) => {
    const time = median(us);
    const law = lawSeconds(of, base.kernels.families[of.family], hardware);
    const known = ratios.get(of.family) ?? [];
    ratios.set(of.family, known);
    known.push({ ratio: (1e-6 * time) / law, weight: law });
    return { op: of.op, sizes: { ...of.sizes }, us: Number(time.toPrecision(4)) };
  });
  const families = { ...base.kernels.families };
  for (const family of kernelFamilies) {
    const ratio = weightedMedian(ratios.get(family) ?? []);
    const law = families[family];
    const scaled = (share: number): number => Number(Math.min(2, Math.max(1e-6, share / ratio)).toPrecision(4));
    families[family] = { ...law, peak_share: scaled(law.peak_share), bandwidth_share: scaled(law.bandwidth_share) };
  }
  const tables = merged(base.links.host.tables, tablesOf(collectives));
  const names = runs.length === 1 ? (runs[0]?.plan.job.name ?? "") : `${runs.length} jobs`;
  return {
    ...profile,
    sources: [
      { what: `${measured.length} kernels and ${collectives.length} collectives of ${names}`, from, date },
      { what: "laws of other shapes, and links that were not measured", from: `the profile ${base.name}` },
    ],
    kernels: { ...base.kernels, clock: 1, event_us: eventsOf(runs, base.kernels.launch_us), families, measured },
    links: { ...base.links, host: { ...base.links.host, tables } },
  };
}

const median = (numbers: readonly number[]): number => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)] ?? 1;

/** The ratio of a kernel's measured to its computed time, and how much it counts: long kernels say more about shares of peaks. */
interface WeightedRatio {
  readonly ratio: number;
  readonly weight: number;
}

/** Returns the ratio at half of the weight; 1 without ratios. */
function weightedMedian(ratios: readonly WeightedRatio[]): number {
  const sorted = [...ratios].sort((a, b) => a.ratio - b.ratio);
  let left = sorted.reduce((sum, { weight }) => sum + weight, 0) / 2;
  for (const { ratio, weight } of sorted) {
    left -= weight;
    if (left <= 0) return ratio;
  }
  return 1;
}

/** Returns what the events around an instruction take beside the gap between two kernels of a graph, in µs: the median over steps of one rank. */
function eventsOf(runs: readonly CalibrationRun[], launch_us: number): number {
  const gaps = runs.flatMap(({ plan, steps }) =>
    steps.flatMap((timings) => {
      const [first] = timings;
      // ranks, and streams, run beside each other
      if (first === undefined || plan.mesh.world > 1 || timings.some(({ stream }) => stream !== first.stream)) return [];
      const begin = timings.reduce((least, t) => Math.min(least, t.begin_us), first.begin_us);
      const busy = timings.reduce((sum, t) => sum + t.end_us - t.begin_us, 0);
      return [(largest(timings, (t) => t.end_us) - begin - busy) / timings.length];
    }),
  );
  return gaps.length === 0 ? 0 : Number(Math.max(0, median(gaps) - launch_us).toPrecision(2));
}

/** Groups the times of kernels by op and sizes, and those of collectives inside a node by kind, ranks and bytes. */
function samplesOf(base: DeviceProfile, runs: readonly CalibrationRun[]) {
  const kernels = new Map<string, Samples<KernelShape>>();
  const collectives = new Map<string, Samples<MeasuredCollective>>();
  const put = <Of>(all: Map<string, Samples<Of>>, key: string, of: Of, us: number): void => {
    const known = all.get(key);
    if (known) known.us.push(us);
    else all.set(key, { of, us: [us] });
  };
  for (const { plan, steps } of runs) {
    const stages = new Map<number, ReturnType<typeof stageShapes>>();
    for (const timings of steps) {
      const seen = new Set<string>();
      const found = wholeTimes(timings).map(({ rank, id, us }) => {
        const stage = stageOfRank(plan.mesh, rank);
        const shapes = stages.get(stage) ?? stageShapes(plan, stage);
        stages.set(stage, shapes);
        const isFirst = !seen.has(`${rank} ${id}`);
        seen.add(`${rank} ${id}`);
        return { rank, us, kernel: (isFirst ? shapes.firsts : shapes.kernels).get(id), collective: shapes.collectives.get(id) };
      });
      const clockOf = clocksOf(base, found);
      for (const { rank, us, kernel, collective } of found) {
        if (kernel) put(kernels, JSON.stringify([kernel.op, kernel.sizes]), kernel, us * atFullClock(base, kernel, clockOf(rank)));
        if (collective) put(collectives, JSON.stringify(collective), collective, us);
      }
    }
  }
  return { kernels: [...kernels.values()], collectives: [...collectives.values()] };
}

/** Returns a function from a rank to the clock that the power limit left in a step, by the law of `base`. */
function clocksOf(
  base: DeviceProfile,
  timed: readonly { readonly rank: number; readonly us: number; readonly kernel: KernelShape | undefined }[],
): (rank: number) => number {
  const work = new Map<number, { flops: number; bytes: number; us: number }>();
  for (const { rank, us, kernel } of timed) {
    if (!kernel) continue;
    const load = work.get(rank) ?? { flops: 0, bytes: 0, us: 0 };
    work.set(rank, { flops: load.flops + kernel.flops, bytes: load.bytes + kernel.bytes, us: load.us + us });
  }
  const hardware = hardwareOf(base);
  return (rank) => {
    const load = work.get(rank);
    return load ? clockOf(base.kernels, hardware, load, 1e-6 * load.us) : 1;
  };
}

/** Returns the time of a kernel at the full clock over that at a lower one, by its law. */
function atFullClock({ kernels, ...base }: DeviceProfile, shape: KernelShape, clock: number): number {
  const law = kernels.families[shape.family];
  const hardware = hardwareOf(base);
  return lawSeconds(shape, law, hardware) / lawSeconds(shape, { ...law, peak_share: law.peak_share * clock }, hardware);
}

/** Adds the launches of one instruction up: they follow one another. Instructions that took no time by the clock are left out. */
function wholeTimes(timings: readonly Timing[]): { readonly rank: number; readonly id: string; readonly us: number }[] {
  const whole: { rank: number; id: string; us: number; stream: string; end: number }[] = [];
  for (const { rank, id, stream, begin_us, end_us } of timings) {
    const last = whole.at(-1);
    if (last?.id === id && last.rank === rank && last.stream === stream && begin_us >= last.end) {
      last.us += end_us - begin_us;
      last.end = end_us;
    } else whole.push({ rank, id, stream, us: end_us - begin_us, end: end_us });
  }
  return whole.filter(({ us }) => us > 0);
}

/** Returns the shapes of a stage's kernels, in the first and in later microbatches of a step, and of its collectives inside a node, by instruction. */
function stageShapes(plan: Plan, stage: number) {
  const program = programOf(plan, stage);
  const buffers = buffersOf(program);
  const groupOf = topologyOf(plan.mesh, stage);
  const firsts = new Map<string, KernelShape>();
  const kernels = new Map<string, KernelShape>();
  const collectives = new Map<string, MeasuredCollective>();
  for (const i of instructionsOf(program)) {
    if (i.kind === "compute") {
      kernels.set(i.id, kernelShape(i, plan.mesh, buffers));
      firsts.set(i.id, kernelShape(asFirst(i), plan.mesh, buffers));
    } else if (i.kind === "collective") {
      const { ranks, nodes } = groupOf(i);
      const bytes = Math.max(buffers.bytesOf(i.from), buffers.bytesOf(i.to));
      if (ranks > 1 && nodes === 1) collectives.set(i.id, { how: i.how, ranks, bytes });
    }
  }
  return { firsts, kernels, collectives };
}

type Tables = DeviceProfile["links"]["host"]["tables"];

/** Returns the measured tables, and of `base` those of other collectives and of groups of other sizes. */
export function merged(base: Tables, measured: Tables): Tables {
  const kinds = Object.keys({ ...base, ...measured }) as CollectiveKind[];
  return Object.fromEntries(
    kinds.map((how) => {
      const rows = measured?.[how] ?? [];
      const others = (base?.[how] ?? []).filter(({ ranks }) => !rows.some((row) => row.ranks === ranks));
      return [how, [...rows, ...others].sort((a, b) => a.ranks - b.ranks)];
    }),
  );
}

/** Returns the tables of the measured collectives: of each the least time, because a rank that arrives early also waits for the others. */
function tablesOf(collectives: readonly Samples<MeasuredCollective>[]): Tables {
  const tables: Partial<Record<CollectiveKind, CollectiveRates[]>> = {};
  const sorted = [...collectives].sort((a, b) => a.of.ranks - b.of.ranks || a.of.bytes - b.of.bytes);
  for (const { of, us } of sorted) {
    const rows = (tables[of.how] ??= []);
    const least = Math.min(...us);
    const rate = (sentShare(of.how, of.ranks) * of.bytes) / least / 1e3;
    const row = rows.find(({ ranks }) => ranks === of.ranks);
    if (!row) rows.push({ ranks: of.ranks, latency_us: least, busbw: [[of.bytes, rate]] });
    else {
      row.latency_us = Math.min(row.latency_us, least);
      row.busbw.push([of.bytes, rate]);
    }
  }
  return tables;
}
