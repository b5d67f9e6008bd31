/** What the memory of a rank is made of: the one list of parts, which add up to the peak on every target. */
import type { Memory, Program } from "../../schemas/plan.ts";
import { activationBytes } from "../../schemas/program.ts";

export const memoryKinds = ["parameter", "gradient", "optimizer", "activation", "workspace", "scratch"] as const;
export type MemoryKind = (typeof memoryKinds)[number];
/** Bytes of each part. */
export type MemoryBreakdown = Readonly<Record<MemoryKind, number>>;

/** The bytes of a role's parts: activations of all chunks and slots, and the scratch of the kernels that needs most. */
export const memoryBreakdown = (program: Pick<Program, "chunks">, memory: Omit<Memory, "peak" | "offsets" | "stage">): MemoryBreakdown => ({
  parameter: memory.parameter,
  gradient: memory.gradient,
  optimizer: memory.optimizer,
  activation: activationBytes(program, memory),
  workspace: memory.workspace,
  scratch: memory.scratch,
});

/** The sum of the parts: the peak. Bytes. */
export const peakOfParts = (parts: MemoryBreakdown): number => memoryKinds.reduce((sum, kind) => sum + parts[kind], 0);

/** Names of the parts for a reader. */
export const memoryNames: Readonly<Record<MemoryKind, string>> = {
  parameter: "parameters",
  gradient: "gradients",
  optimizer: "optimizer",
  activation: "activations",
  workspace: "workspace",
  scratch: "scratch",
};
