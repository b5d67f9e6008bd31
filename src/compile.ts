/** The compiler pipeline: job → mesh → graph → sharded graph → programs → kernels → memory → plan. */
import type { Job } from "../schemas/job.ts";
import type { Plan } from "../schemas/plan.ts";
import { generateKernels, printKernels } from "./codegen/generateKernels.ts";
import { cpu, type Target } from "./codegen/targets.ts";
import { printGraph } from "./passes/backward.ts";
import { lower } from "./passes/lower.ts";
import { planMemory, printMemory, verifyMemory } from "./passes/memory.ts";
import { buildMesh, printMesh } from "./passes/mesh.ts";
import type { Stage } from "./passes/passNames.ts";
import { printSchedule, schedule, smallerStepsOf } from "./passes/schedule.ts";
import type { ShardOptions } from "./passes/shard.ts";
import { shardJob } from "./passes/shardJob.ts";
import { printSharded } from "./passes/shardText.ts";
import { verifyPrograms } from "./passes/verify.ts";
import { sealPlan } from "./plan/seal.ts";
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

/** Options of `compile`: the target (default cpu), and `pick` for tests of sharding. */
export interface Settings extends Pick<ShardOptions, "pick"> {
  readonly target?: Target;
}

/** Compiles a job that has no findings. Throws only broken invariants, which are bugs of rankc. */
export function compile(job: Job, { target = cpu, ...pick }: Settings = {}): Compiled {
  const mesh = buildMesh(job);
  const { graph, sharded, pipeline } = shardJob(job, mesh, pick);
  const order = schedule(job, pipeline.chunks);
  const lowered = lower(job, mesh, { graph, sharded, pipeline, order });
  verifyPrograms(lowered, mesh, smallerStepsOf(job));
  const { programs, kernels, sources } = generateKernels(lowered, mesh, target);
  const memory = programs.map((p) => planMemory(p, kernels));
  for (const [s, p] of programs.entries()) verifyMemory(p, memory[s]!);
  const plan = sealPlan({ job, mesh, programs, memory, kernels, toolchain: { rankc: version, target: target.name } });
  const text: Record<Stage, () => string> = {
    mesh: () => printMesh(mesh),
    graph: () => printGraph(graph),
    sharded: () => printSharded(sharded, mesh),
    schedule: () => printSchedule(order),
    program: () => programs.map((p) => `stage ${p.stage}\n${printProgram(p).join("\n")}\n`).join("\n"),
    memory: () => printMemory(programs, memory),
    kernels: () => printKernels(kernels),
  };
  return { plan, sources, emit: (stage) => text[stage]() };
}
