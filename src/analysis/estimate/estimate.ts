/** The estimate of a plan: seconds of a step, what they are made of, and how much of that was measured. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import type { Plan } from "../../../schemas/plan.ts";
import { modelFlops } from "../modelFlops.ts";
import { hardwareOf } from "./hardware.ts";
import { type TimeSource, timeSources } from "./kernelTime.ts";
import { type SimulatedStage, type Simulation, simulate } from "./simulate.ts";
import type { Assumptions, CommunicationClass } from "./timedBlocks.ts";
import { sumOfParts, type TimeParts } from "./timeParts.ts";

/** Options of an estimate. */
export interface EstimateOptions {
  readonly profile: DeviceProfile;
  /** Rows of the busiest rank of an expert group over the mean; default 1. */
  readonly imbalance?: number;
  /** What the software of the profile does and the plan does not say; default: nothing. */
  readonly assumed?: Assumptions;
}

/** Communication of a rank over some axes in a step, in seconds. */
export interface AxisTime {
  readonly axes: string;
  /** Of all collectives, and of the transfers that a rank receives. */
  readonly total: number;
  /** Where the compute stream waits for them. */
  readonly exposed: number;
}

/** Communication of a rank of one class in a step. */
export interface ClassTime extends CommunicationClass {
  /** Bytes that a rank sends; of transfers, that it receives. */
  readonly bytes: number;
  /** Seconds of all of it: `exposed`, and those of `under`. */
  readonly total: number;
  /** Seconds in which the compute stream waits for it. */
  readonly exposed: number;
  /** The other seconds, by what the compute stream does in them: the op of its kernel, or what else it waits for; the longest first. */
  readonly under: Readonly<Record<string, number>>;
}

/** The time of a step on one stage. The parts add up to the seconds of the step. */
export interface StageTime {
  readonly stage: number;
  readonly parts: TimeParts;
  readonly communication: readonly AxisTime[];
  readonly classes: readonly ClassTime[];
}

/** The estimate of a step. */
export interface Estimate {
  readonly profile: Pick<DeviceProfile, "name" | "device" | "stack">;
  readonly seconds: number;
  /** The seconds that are likely, from what was measured and what is a law. */
  readonly range: readonly [number, number];
  readonly tokens_per_second: number;
  /** FLOP/s of a rank that the model needs, without recomputation, and its share of the peak in the job's precision. */
  readonly model_flops_per_second: number;
  readonly of_peak: number;
  /** The share of a step in which a stage waits for others: the mean over the stages. */
  readonly bubble: number;
  readonly stages: readonly StageTime[];
  /** The stage that waits least: it decides how long a step takes. */
  readonly busiest: number;
  /** The shares of the kernels' time of the busiest stage by source. */
  readonly sources: Readonly<Record<TimeSource, number>>;
  readonly simulation: Simulation;
}

/** Estimates a step of a plan on the device of a profile. Takes less than a second for thousands of ranks. */
export function estimate(plan: Plan, { profile, imbalance = 1, assumed = {} }: EstimateOptions): Estimate {
  return estimateOf(plan, simulate(plan, { profile, imbalance, assumed }), profile);
}

/** Returns the estimate of a simulated step. */
export function estimateOf(plan: Pick<Plan, "job" | "mesh">, simulation: Simulation, profile: DeviceProfile): Estimate {
  const { seconds, stages: simulated } = simulation;
  const stages = simulated.map((stage) => ({
    stage: stage.stage,
    parts: stage.parts,
    communication: communicationOf(stage),
    classes: classesOf(stage),
  }));
  const busiest = stages.reduce((least, s) => (s.parts.bubble < least.parts.bubble ? s : least));
  const { model, train } = plan.job;
  const perRank = (modelFlops(model) * train.global_batch) / plan.mesh.world / seconds;
  const { peak } = hardwareOf(profile);
  const sources = sourcesOf(simulated.find(({ stage }) => stage === busiest.stage) ?? simulated[0]);
  return {
    profile: { name: profile.name, device: profile.device, stack: profile.stack },
    seconds,
    range: rangeOf(seconds, busiest, sources),
    tokens_per_second: (train.global_batch * model.seq) / seconds,
    model_flops_per_second: perRank,
    of_peak: perRank / peak[({ fp32: "f32", bf16: "bf16", fp16: "f16" } as const)[train.precision]],
    bubble: stages.reduce((sum, { parts }) => sum + parts.bubble, 0) / (stages.length * seconds),
    stages,
    busiest: busiest.stage,
    sources,
    simulation,
  };
}

/** Returns the communication of a stage by axes, the longest first. */
function communicationOf({ runs, step, parts }: SimulatedStage): AxisTime[] {
  const total = new Map<string, number>();
  const add = (block: SimulatedStage["step"], times: number): void => {
    for (const { axes, seconds, instruction } of block.instructions)
      if (axes !== undefined && instruction.kind !== "send") total.set(axes, (total.get(axes) ?? 0) + seconds * times);
  };
  for (const [block, times] of countsOf({ runs, step })) add(block, times);
  const axes = [...new Set([...total.keys(), ...parts.exposed.keys()])];
  return axes
    .map((name) => ({ axes: name, total: total.get(name) ?? 0, exposed: parts.exposed.get(name) ?? 0 }))
    .filter((a) => a.total > 0 || a.exposed > 0)
    .sort((a, b) => b.exposed - a.exposed || b.total - a.total);
}

/** Returns the communication of a stage by class, the longest exposed first. */
function classesOf({ runs, step, parts }: SimulatedStage): ClassTime[] {
  const sums = new Map<CommunicationClass, { bytes: number; total: number }>();
  for (const [block, times] of countsOf({ runs, step }))
    for (const { communication, seconds, instruction } of block.instructions) {
      if (!communication || instruction.kind === "send" || instruction.kind === "compute") continue;
      const sum = sums.get(communication) ?? { bytes: 0, total: 0 };
      sums.set(communication, sum);
      sum.bytes += instruction.bytes * times;
      sum.total += seconds * times;
    }
  for (const own of parts.exposedBy.keys()) if (!sums.has(own)) sums.set(own, { bytes: 0, total: 0 });
  return [...sums]
    .map(([own, sum]) => ({
      ...{ ...own, ...sum, exposed: parts.exposedBy.get(own) ?? 0 },
      under: Object.fromEntries([...(parts.hiddenUnder.get(own) ?? [])].sort(([, a], [, b]) => b - a)),
    }))
    .filter(({ total, exposed }) => total > 0 || exposed > 0)
    .sort((a, b) => b.exposed - a.exposed || b.total - a.total);
}

/** Returns how often a stage runs each of its blocks in a step. */
function countsOf({ runs, step }: Pick<SimulatedStage, "runs" | "step">): Map<SimulatedStage["step"], number> {
  const counts = new Map([[step, 1]]);
  for (const { block } of runs) counts.set(block, (counts.get(block) ?? 0) + 1);
  return counts;
}

function sourcesOf(stage: SimulatedStage | undefined): Record<TimeSource, number> {
  const sums = { measured: 0, interpolated: 0, law: 0 };
  if (!stage) return sums;
  for (const [block, times] of countsOf(stage))
    for (const { source, seconds } of block.instructions) if (source !== "link") sums[source] += seconds * times;
  const all = sums.measured + sums.interpolated + sums.law;
  for (const source of timeSources) sums[source] /= all || 1;
  return sums;
}

/** Errors that are assumed until others are seen: of kernels by source, of links, of the waiting for other stages. */
const errors = { measured: 0.02, interpolated: 0.05, law: 0.15, link: 0.25 } as const;

/** Returns the likely range: the errors of the parts of the busiest stage, added as independent ones. */
function rangeOf(seconds: number, { parts }: StageTime, sources: Record<TimeSource, number>): readonly [number, number] {
  const exposed = [...parts.exposed.values()].reduce((a, b) => a + b, 0);
  const kernels = Object.values(parts.kernels).reduce((a, b) => a + b, 0);
  const ofKernels = timeSources.reduce((sum, source) => sum + sources[source] * errors[source], 0);
  const total = sumOfParts(parts) || 1;
  const error = Math.hypot((kernels / total) * ofKernels, (exposed / total) * errors.link);
  return [seconds * (1 - error), seconds * (1 + error)];
}
