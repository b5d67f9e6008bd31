/**
 * The laws of a whole plan, checked when a plan is read. Correct digests do not prove that rankc wrote a file, because an edited plan
 * can be sealed again. So everything that the compiler guarantees is checked before the plan decides allocations, loops or file names:
 * the laws of `verifyPrograms` and `verifyMemory`, and the bounds that the compiler keeps by construction.
 */
import { isDeepStrictEqual } from "node:util";
import type { Job } from "../../schemas/job.ts";
import type { Plan, Program } from "../../schemas/plan.ts";
import { microbatchBlocks } from "../../schemas/program.ts";
import { chunksPerStage } from "../analysis/stages.ts";
import { targetNames } from "../codegen/targetNames.ts";
import { invariant } from "../ops/op.ts";
import { buildMesh } from "../passes/mesh.ts";
import { microbatchesOf, smallerStepsOf } from "../passes/schedule.ts";
import { verifyPrograms } from "../passes/verify.ts";
import { Repeats } from "../repeats.ts";
import type { sections } from "./seal.ts";
import { verifyArenas } from "./verifyArenas.ts";
import { verifyKernels } from "./verifyKernels.ts";
import { verifyShapes } from "./verifyShapes.ts";

type Law = readonly [section: (typeof sections)[number], check: (plan: Plan) => void];

/** The laws by section, in order: each may rely on those before it. */
export const laws: readonly Law[] = [
  ["toolchain", ({ toolchain: { target } }) => invariant(targetNames.includes(target), `unknown target ${target}`)],
  ["mesh", verifyMesh],
  ["programs", verifyStages],
  ["kernels", verifyKernels],
  ["programs", ({ job, mesh, programs }) => verifyPrograms(programs, mesh, smallerSteps(job, programs))],
  ["memory", verifyArenas],
];

/** Checks that the mesh is the one that the job defines. */
function verifyMesh({ job, mesh }: Plan): void {
  invariant(job.parallel.world === mesh.world, `the mesh has ${mesh.world} ranks, the job ${job.parallel.world}`);
  const expected = buildMesh(job);
  for (const key of Object.keys(expected) as (keyof typeof expected)[])
    invariant(isDeepStrictEqual(mesh[key], expected[key]), `"${key}" does not match the parallel keys of the job`);
}

/** Checks that programs are in the order of stages, with equal numbers of chunks and the microbatches of the job. */
function verifyStages({ job, mesh, programs }: Plan): void {
  const stages = mesh.world / mesh.per_stage;
  invariant(programs.length === stages, `${programs.length} programs for ${stages} stages`);
  const microbatches = microbatchesOf(job);
  invariant(Number.isInteger(microbatches), `the global batch of the job is not a multiple of one microbatch on all data ranks`);
  const checked = { buffers: new Repeats<number>(), instructions: new Repeats<true>() };
  for (const [stage, p] of programs.entries()) {
    invariant(p.stage === stage, `program ${stage} is for stage ${p.stage}`);
    verifyChunks(p, chunksPerStage({ programs }), microbatches);
    verifyShapes(p, { job, mesh, stages: programs, checked });
  }
}

/** Checks the chunks of a program and the number of forward blocks. `verifyPrograms` checks the order of block runs. */
function verifyChunks({ stage, chunks, order }: Program, count: number, microbatches: number): void {
  invariant(chunks.length === count, `stage ${stage} has ${chunks.length} chunks, stage 0 has ${count}`);
  const forward = order.filter(({ kind }) => kind === "forward").length;
  invariant(
    forward === microbatches * count,
    `stage ${stage}: ${forward} forward blocks for ${microbatches} microbatches of ${count} chunks`,
  );
  for (const { layers, copies } of chunks) {
    invariant(layers[0] <= layers[1], `stage ${stage}: layers ${layers.join(" to ")}`);
    invariant(
      copies >= 1 && copies <= Math.max(1, microbatches),
      `stage ${stage}: ${copies} copies of activations, ${microbatches} microbatches`,
    );
  }
}

/** The largest number of block runs that are simulated. The waits of a smaller step are a subset of those of the whole step. */
const MOST_SIMULATED = 2 ** 22;

/** Returns the numbers of microbatches of the steps during batch ramp-up, limited by `MOST_SIMULATED`. */
function smallerSteps(job: Job, programs: readonly Program[]): number[] {
  const perMicrobatch = programs.length * chunksPerStage({ programs }) * microbatchBlocks.length;
  const orders = programs.reduce((sum, p) => sum + p.order.length, 0);
  let left = MOST_SIMULATED;
  return [...new Set(smallerStepsOf(job))].filter((m) => {
    left -= m * perMicrobatch + orders;
    return left >= 0;
  });
}
