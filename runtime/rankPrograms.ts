/** The programs of a plan by rank, with their memory, and their buffers by id. */
import type { BlockRun, Buffer, Memory, Plan, Program } from "../schemas/plan.ts";
import { groupsOf, orderOf } from "../schemas/program.ts";
import { type MeshData, stageOfRank } from "../schemas/sharding.ts";

/** The program of one stage. */
export class StageProgram {
  readonly program: Program;
  readonly memory: Memory;
  readonly #buffers: ReadonlyMap<string, Buffer>;
  /** Orders by number of microbatches: most steps have the same number. */
  readonly #orders = new Map<number, readonly (readonly BlockRun[])[]>();

  constructor(program: Program, memory: Memory) {
    this.program = program;
    this.memory = memory;
    this.#buffers = new Map(program.buffers.map((b) => [b.id, b]));
  }

  /** Returns the buffer with this id. */
  buffer(id: string): Buffer {
    const found = this.#buffers.get(id);
    if (!found) throw new Error(`rankc: stage ${this.program.stage} has no buffer ${id}`);
    return found;
  }

  /** Returns the offset of a buffer in the arena of its kind, in bytes. */
  offset(id: string): number {
    const offset = this.memory.offsets[id];
    if (offset === undefined) throw new Error(`rankc: stage ${this.program.stage} has no memory for ${id}`);
    return offset;
  }

  /** Returns the block runs of a step with so many microbatches, in their order: each alone, or two that are paired. */
  order(microbatches: number): readonly (readonly BlockRun[])[] {
    const order = this.#orders.get(microbatches) ?? groupsOf(orderOf(this.program, microbatches));
    this.#orders.set(microbatches, order);
    return order;
  }
}

/** The programs of all stages. */
export class RankPrograms {
  readonly stages: readonly StageProgram[];
  readonly #mesh: MeshData;

  constructor({ mesh, programs, memory }: Pick<Plan, "mesh" | "programs" | "memory">) {
    this.#mesh = mesh;
    this.stages = programs.map((program, stage) => {
      const own = memory[stage];
      if (!own) throw new Error(`rankc: the plan has no memory for stage ${stage}`);
      return new StageProgram(program, own);
    });
  }

  /** Returns the program of a rank. */
  of(rank: number): StageProgram {
    const stage = this.stages[stageOfRank(this.#mesh, rank)];
    if (!stage) throw new Error(`rankc: the plan has no program for rank ${rank}`);
    return stage;
  }

  /** Returns a buffer of a rank. */
  readonly buffer = (rank: number, id: string): Buffer => this.of(rank).buffer(id);
}
