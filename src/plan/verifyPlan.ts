/**
 * verifyPlan: the laws of a whole plan, checked when a plan is read. A file with right digests is no proof that rankc wrote it: who
 * edits a plan can seal it again. So what the compiler guarantees is checked here before anything allocates, loops or opens a file by
 * what the plan says: the laws of `verifyPrograms` and `verifyMemory`, and the bounds that the compiler keeps by construction.
 */
import { isDeepStrictEqual } from "node:util";
import type { Job } from "../../schemas/job.ts";
import type { Plan, Program } from "../../schemas/plan.ts";
import { blockTag, microbatchBlocks } from "../../schemas/program.ts";
import { targetNames } from "../codegen/targetNames.ts";
import { invariant } from "../ops/op.ts";
import { buildMesh } from "../passes/mesh.ts";
import { microbatchesOf, smallerStepsOf } from "../passes/schedule.ts";
import { verifyPrograms } from "../passes/verify.ts";
import type { sections } from "./seal.ts";
import { verifyArenas } from "./verifyArenas.ts";
import { verifyKernels } from "./verifyKernels.ts";
import { verifyShapes } from "./verifyShapes.ts";

type Law = readonly [section: (typeof sections)[number], check: (plan: Plan) => void];

/** In this order: each law may rely on those before it. */
export const laws: readonly Law[] = [
  ["toolchain", ({ toolchain: { target } }) => invariant(targetNames.includes(target), `no target is named ${target}`)],
  ["mesh", verifyMesh],
  ["programs", verifyRoles],
  ["kernels", verifyKernels],
  ["programs", ({ job, mesh, programs }) => verifyPrograms(programs, mesh, smallerSteps(job, programs))],
  ["memory", verifyArenas],
];

/** The mesh is a function of the job. */
function verifyMesh({ job, mesh }: Plan): void {
  invariant(job.parallel.world === mesh.world, `${mesh.world} ranks, and the job has ${job.parallel.world}`);
  const made = buildMesh(job);
  for (const key of Object.keys(made) as (keyof typeof made)[])
    invariant(isDeepStrictEqual(mesh[key], made[key]), `"${key}" is not what the job's parallel keys give`);
}

/** Programs stand in the order of their stages, have the same chunks, and do the microbatches that the job has. */
function verifyRoles({ job, mesh, programs }: Plan): void {
  const stages = mesh.world / mesh.per_stage;
  invariant(programs.length === stages, `${programs.length} programs for ${stages} stages`);
  const microbatches = microbatchesOf(job);
  invariant(Number.isInteger(microbatches), `the job's global batch is no multiple of a microbatch on all data ranks`);
  for (const [stage, p] of programs.entries()) {
    invariant(p.stage === stage, `the program at place ${stage} is of stage ${p.stage}`);
    verifyTags(p, programs[0]!.chunks.length, microbatches);
    verifyShapes(p, { job, mesh, stages: programs });
  }
}

function verifyTags({ stage, chunks, order }: Program, count: number, microbatches: number): void {
  invariant(chunks.length === count, `stage ${stage} has ${chunks.length} chunks, stage 0 has ${count}`);
  const tags = new Set<string>();
  for (const tag of order) {
    const [, letter, m, c = "0"] = /^([FBW])(\d{1,15})(?:\.(\d{1,5}))?$/.exec(tag) ?? [];
    const kind = microbatchBlocks.find((k) => k[0]?.toUpperCase() === letter);
    const work = kind && { kind, microbatch: Number(m), chunk: Number(c) };
    invariant(
      work !== undefined && blockTag(work, count) === tag && !tags.has(tag),
      `stage ${stage}: the order holds ${JSON.stringify(tag)}`,
    );
    tags.add(tag);
  }
  const forward = order.filter((tag) => tag.startsWith("F")).length;
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

/** Pieces of work that are played through at most; what a smaller step waits for is a part of what the whole one waits for. */
const PLAYED = 2 ** 22;

/** Microbatches of the steps while the batch grows, as many as `PLAYED` has room for. */
function smallerSteps(job: Job, programs: readonly Program[]): number[] {
  const perMicrobatch = programs.length * programs[0]!.chunks.length * microbatchBlocks.length;
  const orders = programs.reduce((sum, p) => sum + p.order.length, 0);
  let left = PLAYED;
  return [...new Set(smallerStepsOf(job))].filter((m) => {
    left -= m * perMicrobatch + orders;
    return left >= 0;
  });
}
