/** TF32 (`train.matmul: tf32`): products of f32 operands get an attribute by which every backend rounds their operands. */
import type { Job } from "../../schemas/job.ts";
import type { Instruction, Program } from "../../schemas/plan.ts";
import { epilogueOps, productOps, sumOps, twinOps } from "../codegen/matmul.ts";

const products: ReadonlySet<string> = new Set(Object.keys({ ...productOps, ...sumOps, ...twinOps, ...epilogueOps }));

/** Returns the programs with that attribute if the job multiplies in TF32, else the programs themselves. It runs after fusion. */
export const roundProducts = ({ train }: Pick<Job, "train">, programs: Program[]): Program[] =>
  train.matmul === "tf32" ? programs.map(rounded) : programs;

function rounded(program: Program): Program {
  const types = new Map(program.buffers.map(({ id, dtype }) => [id, dtype]));
  const mark = (list: readonly Instruction[]): Instruction[] =>
    list.map((i) =>
      i.kind === "compute" && products.has(i.op) && Object.values(i.reads).every((id) => types.get(id) === "f32")
        ? { ...i, attrs: { ...i.attrs, tf32: 1 } }
        : i,
    );
  const chunks = program.chunks.map((c) => ({ ...c, forward: mark(c.forward), backward: mark(c.backward), weights: mark(c.weights) }));
  const { evaluation } = program;
  return { ...program, chunks, ...(evaluation && { evaluation: { ...evaluation, chunks: evaluation.chunks.map(mark) } }) };
}
