/** How a program is walked: its blocks, the order of its work, and where its activations lie. Arithmetic over the plan, shared by compiler and runtime. */
import type { Buffer, Instruction, Memory, Program } from "./plan.ts";

/** A block of instructions. `weights` has the gradients of weights where they are made apart from those of inputs. */
export interface Block {
  readonly kind: "forward" | "backward" | "weights" | "step";
  readonly chunk: number;
  readonly instructions: readonly Instruction[];
}
export const microbatchBlocks = ["forward", "backward", "weights"] as const;
type MicrobatchBlock = (typeof microbatchBlocks)[number];

/** All blocks that have instructions, chunk by chunk, then the step block. */
export function blocksOf({ chunks, step }: Pick<Program, "chunks" | "step">): Block[] {
  const all: Block[] = chunks.flatMap((c, chunk) => microbatchBlocks.map((kind) => ({ kind, chunk, instructions: c[kind] })));
  return [...all.filter((b) => b.instructions.length > 0), { kind: "step", chunk: 0, instructions: step }];
}
export const instructionsOf = (p: Pick<Program, "chunks" | "step">): Instruction[] => blocksOf(p).flatMap((b) => b.instructions);

/** One block of one microbatch, as `Program.order` names it: `F3`, `B0`, `W2`; with several chunks `F3.1`. */
export interface BlockRun {
  readonly kind: MicrobatchBlock;
  readonly microbatch: number;
  readonly chunk: number;
}
const letters: Readonly<Record<MicrobatchBlock, string>> = { forward: "F", backward: "B", weights: "W" };
export const blockTag = ({ kind, microbatch, chunk }: BlockRun, chunks: number): string =>
  `${letters[kind]}${microbatch}${chunks > 1 ? `.${chunk}` : ""}`;

export function parseTag(tag: string): BlockRun {
  const kind = microbatchBlocks.find((k) => letters[k] === tag[0]);
  const dot = tag.indexOf(".");
  const microbatch = Number(dot < 0 ? tag.slice(1) : tag.slice(1, dot));
  const chunk = dot < 0 ? 0 : Number(tag.slice(dot + 1));
  if (kind === undefined || !Number.isInteger(microbatch) || !Number.isInteger(chunk)) throw new Error(`rankc: ${tag} is no piece of work`);
  return { kind, microbatch, chunk };
}

/** The instructions of a piece of work, as a program's order names it. */
export function blockOf({ chunks }: Pick<Program, "chunks">, tag: string): Instruction[] {
  const { kind, chunk } = parseTag(tag);
  return chunks[chunk]![kind];
}

/**
 * The order of a step of fewer microbatches than the plan's: the same without those from `microbatches` on. What stages wait for in it
 * comes in the order in which it came, so it waits for nothing that does not come; and no more are in flight.
 */
export const orderOf = ({ order }: Pick<Program, "order">, microbatches: number): string[] =>
  order.filter((tag) => parseTag(tag).microbatch < microbatches);

/** Microbatches of a step of the whole batch. */
export const microbatchesIn = ({ chunks, order }: Pick<Program, "chunks" | "order">): number =>
  order.filter((tag) => tag.startsWith("F")).length / chunks.length;

/** Bytes of all copies of all chunks' activations. */
export const activationBytes = ({ chunks }: Pick<Program, "chunks">, { activation }: Pick<Memory, "activation">): number =>
  chunks.reduce((sum, { copies }, c) => sum + copies * activation[c]!, 0);

/** Where a copy of a chunk's activations begins in their arena: chunk after chunk, slot after slot. */
export const activationStart = (
  { chunks }: Pick<Program, "chunks">,
  { activation }: Pick<Memory, "activation">,
  { chunk = 0 }: Pick<Buffer, "chunk">,
  copy: number,
): number => activationBytes({ chunks: chunks.slice(0, chunk) }, { activation }) + copy * activation[chunk]!;
