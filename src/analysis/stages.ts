/** The stages of a plan. */
import type { Memory, Plan, Program } from "../../schemas/plan.ts";
import { invariant } from "../ops/op.ts";

/** The program of a stage, and its memory. */
export interface StageOfPlan {
  readonly program: Program;
  readonly memory: Memory;
}

/** Returns the stages of a plan, in order. Throws an invariant if a stage has no memory. */
export const stagesOf = ({ programs, memory }: Pick<Plan, "programs" | "memory">): StageOfPlan[] =>
  programs.map((program) => {
    const own = memory.find(({ stage }) => stage === program.stage);
    invariant(own !== undefined, () => `stage ${program.stage} has no memory`);
    return { program, memory: own };
  });

/** Returns the program of a stage. Throws an invariant if the plan has none. */
export function programOf({ programs }: Pick<Plan, "programs">, stage: number): Program {
  const found = programs.find((p) => p.stage === stage);
  invariant(found !== undefined, () => `the plan has no stage ${stage}`);
  return found;
}

/** Returns the number of chunks of a stage; it is equal for all stages. */
export const chunksPerStage = ({ programs: [first] }: { readonly programs: readonly Program[] }): number => first?.chunks.length ?? 1;

/** Returns the first layer of a chunk of a stage. */
export const firstLayerOf = ({ chunks }: Pick<Program, "chunks">, chunk = 0): number => chunks[chunk]?.layers[0] ?? 0;
