/** The parts of the memory of a rank. They add up to the peak on every target. */
import type { Memory, Program } from "../../schemas/plan.ts";
import { activationBytes } from "../../schemas/program.ts";

/** All parts, in the order of reports. */
export const memoryKinds = ["parameter", "gradient", "optimizer", "activation", "workspace", "scratch"] as const;
/** The name of a part. */
export type MemoryKind = (typeof memoryKinds)[number];
/** Bytes of each part. */
export type MemoryBreakdown = Readonly<Record<MemoryKind, number>>;

/** Returns the parts of a stage in bytes. Activations include all chunks and copies; scratch is that of the largest kernel. */
export const memoryBreakdown = (program: Pick<Program, "chunks">, memory: Omit<Memory, "peak" | "offsets" | "stage">): MemoryBreakdown => ({
  parameter: memory.parameter,
  gradient: memory.gradient,
  optimizer: memory.optimizer,
  activation: activationBytes(program, memory),
  workspace: memory.workspace,
  scratch: memory.scratch,
});

/** Returns the peak in bytes: the sum of the parts. */
export const peakOfParts = (parts: MemoryBreakdown): number => memoryKinds.reduce((sum, kind) => sum + parts[kind], 0);

/** Names of the parts in reports. */
export const memoryNames: Readonly<Record<MemoryKind, string>> = {
  parameter: "parameters",
  gradient: "gradients",
  optimizer: "optimizer",
  activation: "activations",
  workspace: "workspace",
  scratch: "scratch",
};
