/**
 * The estimate of a job whose plan nobody needs: passes of `compile` without verification and sealing, on one stage of each kind. Stages are of one kind
 * if their chunks have equal layers, their ranks lie alike on nodes, messages to both neighbours cross nodes alike, and they pair the same chunks: then their blocks are equal
 * apart from names and peers.
 */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Job } from "../../schemas/job.ts";
import type { BlockRun, Program } from "../../schemas/plan.ts";
import { groupsOf, instructionsOf } from "../../schemas/program.ts";
import { type Estimate, estimateOf } from "../analysis/estimate/estimate.ts";
import { type StageBlocks, simulateStages } from "../analysis/estimate/simulate.ts";
import { type Assumptions, blockTimer, crosses, type TimingOptions } from "../analysis/estimate/timedBlocks.ts";
import { generateKernels } from "../codegen/generateKernels.ts";
import type { Target } from "../codegen/targets.ts";
import { invariant } from "../ops/op.ts";
import { fuseFor, joinFor } from "../passes/fuse.ts";
import { lower } from "../passes/lower.ts";
import { planMemory } from "../passes/memory.ts";
import { buildMesh, type Mesh } from "../passes/mesh.ts";
import { overlap } from "../passes/overlap.ts";
import type { Pipeline } from "../passes/pipelineStages.ts";
import { type Schedule, schedule } from "../passes/schedule.ts";
import { shardJob } from "../passes/shardJob.ts";
import { chunkKinds } from "../peakMemory.ts";

/** What an estimate of a job needs. */
export interface JobEstimateOptions {
  readonly profile: DeviceProfile;
  readonly target: Target;
  /** What the software of the profile does and a plan does not say; default: nothing. */
  readonly assumed?: Assumptions;
}

/** Estimates a step of a job without findings, as `estimate` does for its plan. */
export function estimateJob(job: Job, { profile, target, assumed = {} }: JobEstimateOptions): Estimate {
  const mesh = buildMesh(job);
  const sharded = shardJob(job, mesh);
  const order = schedule(job, sharded.pipeline.chunks);
  const lowered = (only?: ReadonlySet<number>): Program[] =>
    joinFor(target, overlap(job, mesh, fuseFor(target, lower(job, mesh, { ...sharded, order }, only))));
  const likes = stageKinds(job, mesh, sharded.pipeline, order);
  const few = lowered(new Set(likes));
  const isSampled = few.every((p) => hasNeighboursAlone(p, likes));
  const { programs, kernels } = generateKernels(isSampled ? few : lowered(), mesh, target);
  const options: TimingOptions = { profile, imbalance: 1, assumed };
  const timer = blockTimer({ job, mesh, kernels }, options);
  const known = new Map(programs.map((program) => [program.stage, { program, blocks: timer(program, planMemory(program, kernels)) }]));
  const stages = order.map(({ order: runs }, stage): StageBlocks => {
    const like = isSampled ? (likes[stage] ?? stage) : stage;
    const own = known.get(like);
    invariant(own !== undefined, () => `stage ${like} was not lowered`);
    const shift = stage - like + likes.length;
    return { stage, order: runs, ...own, peerOf: (peer) => (peer + shift) % likes.length };
  });
  return estimateOf({ job, mesh }, simulateStages(stages, options), profile);
}

/** Returns for each stage the first stage of its kind. */
function stageKinds(job: Job, mesh: Mesh, pipeline: Pipeline, order: readonly Schedule[]): number[] {
  const { stages, chunks } = pipeline;
  const kinds = chunkKinds(job, pipeline);
  const first = new Map<string, number>();
  return Array.from({ length: stages }, (_, stage) => {
    const own = Array.from({ length: chunks }, (_, c) => kinds[c * stages + stage] ?? "");
    const onNode = (stage * mesh.per_stage) % mesh.gpus_per_node;
    const ends = [stage + 1, stage + stages - 1].map((peer) => crosses({ mesh }, stage, peer % stages));
    const key = [...own, onNode, ...ends, ...pairedChunks(order[stage]?.order ?? [])].join("|");
    const known = first.get(key) ?? stage;
    first.set(key, known);
    return known;
  });
}

/** Returns the chunks of each forward and backward that a stage pairs: of these a program has the turns. */
const pairedChunks = (order: readonly BlockRun[]): string[] =>
  [
    ...new Set(groupsOf(order).flatMap(([forward, backward]) => (forward && backward ? [`${forward.chunk}+${backward.chunk}`] : []))),
  ].sort();

/** Returns whether a program may stand for others: they have none, or it sends to its neighbours alone. */
function hasNeighboursAlone(program: Program, likes: readonly number[]): boolean {
  const { stage } = program;
  if (likes.every((like, other) => like !== stage || other === stage)) return true;
  const stages = likes.length;
  const isNeighbour = (peer: number): boolean => (peer + 1) % stages === stage || (stage + 1) % stages === peer;
  return instructionsOf(program).every((i) => (i.kind !== "send" && i.kind !== "recv") || isNeighbour(i.peer));
}
