/** The compiler pipeline: job → mesh → graph → sharded graph → programs → kernels → memory → plan. */

import type { Job } from "../schemas/job.ts";
import { itemOf } from "../schemas/lookup.ts";
import type { Instruction, Plan } from "../schemas/plan.ts";
import { instructionsOf } from "../schemas/program.ts";
import { generateKernels, printKernels } from "./codegen/generateKernels.ts";
import { cpu, type Target } from "./codegen/targets.ts";
import { printGraph } from "./passes/backward.ts";
import { fuseFor, joinFor } from "./passes/fuse.ts";
import { lower } from "./passes/lower.ts";
import { planMemory, printMemory, verifyMemory } from "./passes/memory.ts";
import { buildMesh, printMesh } from "./passes/mesh.ts";
import { overlap } from "./passes/overlap.ts";
import { type Counts, type Stage, type Trace, untraced } from "./passes/passNames.ts";
import { printPipeline } from "./passes/pipelineStages.ts";
import { printSchedule, schedule, smallerStepsOf } from "./passes/schedule.ts";
import type { ShardOptions } from "./passes/shard.ts";
import { shardJob } from "./passes/shardJob.ts";
import { printSharded } from "./passes/shardText.ts";
import { roundProducts } from "./passes/tf32.ts";
import { verifyPrograms } from "./passes/verify.ts";
import { sealPlan } from "./plan/seal.ts";
import { printPlanText } from "./report/planText.ts";
import { printProgram } from "./report/programText.ts";
import { version } from "./version.ts";

/** The result of `compile`. */
export interface Compiled {
  readonly plan: Plan;
  /** Kernel sources by file name, for the folder kernels/ next to the plan. */
  readonly sources: ReadonlyMap<string, string>;
  /** Returns the text form of a compiler stage. */
  emit(stage: Stage): string;
}

/** Options of `compile`: the target (default cpu), `trace` to measure passes, and `pick` for tests of sharding. */
export interface Settings extends Pick<ShardOptions, "pick"> {
  readonly target?: Target;
  readonly trace?: Trace;
}

/** Compiles a job that has no findings. Throws only broken invariants, which are bugs of rankc. */
export function compile(job: Job, { target = cpu, trace = untraced, ...pick }: Settings = {}): Compiled {
  const mesh = trace("mesh", () => buildMesh(job));
  const { graph, sharded, pipeline, evaluation } = shardJob(job, mesh, pick, trace);
  const order = trace("schedule", () => schedule(job, pipeline.chunks));
  const lowered = trace(
    "program",
    () => {
      const programs = lower(job, mesh, { graph, sharded, pipeline, order, ...(evaluation && { evaluation }) });
      return joinFor(target, overlap(job, mesh, roundProducts(job, fuseFor(target, programs))));
    },
    countPrograms,
  );
  trace("verify", () => verifyPrograms(lowered, mesh, smallerStepsOf(job)));
  const { programs, kernels, sources } = trace(
    "kernels",
    () => generateKernels(lowered, mesh, target),
    (made) => ({ kernels: made.kernels.length }),
  );
  const memory = trace(
    "memory",
    () => programs.map((p) => planMemory(p, kernels)),
    (stages) => ({ "bytes of the largest peak": Math.max(...stages.map(({ peak }) => peak)) }),
  );
  for (const [s, p] of programs.entries()) verifyMemory(p, itemOf(memory, s, "memory of stage"));
  const toolchain = { rankc: version, target: target.name };
  const plan = trace("plan", () => sealPlan({ job, mesh, programs, memory, kernels, toolchain }));
  const text: Record<Stage, () => string> = {
    job: () => `${JSON.stringify(job, null, 2)}\n`,
    mesh: () => printMesh(mesh),
    pipeline: () => printPipeline(pipeline, job),
    model: () => printGraph({ ...graph, order: graph.order.filter((n) => !n.backward) }),
    graph: () => printGraph(graph),
    sharded: () => printSharded(sharded, mesh),
    schedule: () => printSchedule(order),
    program: () => programs.map((p) => `stage ${p.stage}\n${printProgram(p).join("\n")}\n`).join("\n"),
    memory: () => printMemory(programs, memory),
    kernels: () => printKernels(kernels),
    plan: () => printPlanText(plan),
  };
  return { plan, sources, emit: (stage) => text[stage]() };
}

/** The instructions and buffers of all stages. */
function countPrograms(programs: Parameters<typeof verifyPrograms>[0]): Counts {
  const all = programs.flatMap(instructionsOf);
  const of = (...kinds: readonly Instruction["kind"][]): number => all.filter((i) => kinds.includes(i.kind)).length;
  const buffers = programs.reduce((n, p) => n + p.buffers.length, 0);
  return { ops: of("compute"), collectives: of("collective"), transfers: of("send", "recv"), buffers };
}
