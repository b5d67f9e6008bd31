/** Blocks of a program, the order of block runs, and offsets of activation copies. Arithmetic over the plan, shared by compiler and runtime. */
import type { BlockRun, Buffer, HostInput, Instruction, Memory, Pair, Program } from "./plan.ts";

/** A block of instructions. `weights` has the gradients of weights if they are computed separately from those of inputs. */
export interface Block {
  readonly kind: "forward" | "backward" | "weights" | "step" | "evaluation" | "evaluation_step";
  readonly chunk: number;
  readonly instructions: readonly Instruction[];
}
/** The blocks of one microbatch, in order. */
export const microbatchBlocks = ["forward", "backward", "weights"] as const satisfies readonly BlockRun["kind"][];

/** Returns all blocks with instructions, chunk by chunk, then the step block, then the blocks of an evaluation. */
export function blocksOf({ chunks, step, evaluation }: Pick<Program, "chunks" | "step" | "evaluation">): Block[] {
  const all: Block[] = chunks.flatMap((c, chunk) => microbatchBlocks.map((kind) => ({ kind, chunk, instructions: c[kind] })));
  const evaluated: Block[] = evaluation
    ? [
        ...evaluation.chunks.map((instructions, chunk) => ({ kind: "evaluation", chunk, instructions }) as const),
        { kind: "evaluation_step", chunk: 0, instructions: evaluation.step },
      ]
    : [];
  const hasAny = (b: Block): boolean => b.instructions.length > 0;
  return [...all.filter(hasAny), { kind: "step", chunk: 0, instructions: step }, ...evaluated.filter(hasAny)];
}
/** Returns all instructions of a program, in the order of `blocksOf`. */
export const instructionsOf = (p: Pick<Program, "chunks" | "step" | "evaluation">): Instruction[] =>
  blocksOf(p).flatMap((b) => b.instructions);

/** Returns the name of an input: its source, with the depth of multi-token prediction: `ids`, `labels_1`. */
export const inputName = ({ source, depth }: HostInput): string => (depth === undefined ? source : `${source}_${depth}`);

const letters: Readonly<Record<BlockRun["kind"], string>> = { forward: "F", backward: "B", weights: "W" };
/** Returns the name of a block run in reports: `F3`, `B0`, `W2`; with several chunks `F3.1`. */
export const blockTag = ({ kind, microbatch, chunk }: BlockRun, chunks: number): string =>
  `${letters[kind]}${microbatch}${chunks > 1 ? `.${chunk}` : ""}`;

/** Returns the instructions of a block run. Throws if the program lacks its chunk. */
export function blockOf({ chunks }: Pick<Program, "chunks">, { kind, chunk }: BlockRun): Instruction[] {
  const found = chunks[chunk];
  if (!found) throw new Error(`rankc: the program has no chunk ${chunk}`);
  return found[kind];
}

/** Returns the block runs of an order that run together: each alone, or a forward and the backward after it as a pair. */
export function groupsOf(order: readonly BlockRun[]): BlockRun[][] {
  const groups: BlockRun[][] = [];
  for (let at = 0; at < order.length; ) {
    const group = order.slice(at, at + (order[at]?.paired ? 2 : 1));
    groups.push(group);
    at += group.length;
  }
  return groups;
}

/** Consecutive instructions of one block run. */
export interface Turn {
  readonly run: BlockRun;
  readonly instructions: readonly Instruction[];
}

/** Returns the instructions of block runs that run together, in the order in which they are issued. Throws if the program lacks their pair. */
export function turnsOf(p: Pick<Program, "chunks" | "pairs">, group: readonly BlockRun[]): Turn[] {
  const [first, second] = group;
  if (!first) return [];
  if (!second) return [{ run: first, instructions: blockOf(p, first) }];
  return partsOf(pairOf(p, first, second), blockOf(p, first), blockOf(p, second)).map((instructions, n) => ({
    ...{ run: n % 2 === 0 ? first : second, instructions },
  }));
}

/** Returns how a forward and a backward alternate. Throws if the program does not state it. */
function pairOf({ pairs = [] }: Pick<Program, "pairs">, forward: Pick<BlockRun, "chunk">, backward: Pick<BlockRun, "chunk">): Pair {
  const found = pairs.find((p) => p.forward === forward.chunk && p.backward === backward.chunk);
  if (!found) throw new Error(`rankc: the program has no pair of forward ${forward.chunk} and backward ${backward.chunk}`);
  return found;
}

type Parts = readonly (readonly Instruction[])[];
/** Cache of the parts of a pair: the same arrays in each step. */
const knownParts = new WeakMap<
  Pair,
  { readonly forward: readonly Instruction[]; readonly backward: readonly Instruction[]; readonly parts: Parts }
>();

/** Returns the instructions of each turn of a pair. */
function partsOf(pair: Pair, forward: readonly Instruction[], backward: readonly Instruction[]): Parts {
  const known = knownParts.get(pair);
  if (known?.forward === forward && known.backward === backward) return known.parts;
  const at = [0, 0];
  const parts = pair.turns.map((length, n) => {
    const from = at[n % 2] ?? 0;
    at[n % 2] = from + length;
    return (n % 2 === 0 ? forward : backward).slice(from, from + length);
  });
  knownParts.set(pair, { forward, backward, parts });
  return parts;
}

/**
 * Returns the order of a step with fewer microbatches: the order of the plan without microbatches from `microbatches` on. The remaining
 * transfers keep their order, so the step cannot deadlock, and no more microbatches are in flight. A backward whose forward of a pair is left
 * out runs alone: it is of an earlier microbatch.
 */
export const orderOf = ({ order }: Pick<Program, "order">, microbatches: number): BlockRun[] =>
  order.filter(({ microbatch }) => microbatch < microbatches);

/** Returns the order of the blocks of an evaluation: that of the forward blocks of a step with the full batch. */
export const evaluationOrder = ({ order }: Pick<Program, "order">): BlockRun[] => order.filter(({ kind }) => kind === "forward");

/** Forward runs per order: `timesIn` needs them for each instruction, and an order has thousands of runs. */
const forwardRuns = new WeakMap<Program["order"], number>();

/** Returns the number of microbatches of a step with the full batch. */
export function microbatchesIn({ chunks, order }: Pick<Program, "chunks" | "order">): number {
  let runs = forwardRuns.get(order);
  if (runs === undefined) {
    runs = order.reduce((n, { kind }) => n + Number(kind === "forward"), 0);
    forwardRuns.set(order, runs);
  }
  return runs / chunks.length;
}

/** Returns whether an instruction runs at a place of a step: in its first or last microbatch, in a step whose numbers are logged. */
export const runsIn = (
  { only }: Pick<Instruction, "only">,
  at: Readonly<Partial<Record<NonNullable<Instruction["only"]>, boolean | undefined>>>,
): boolean => only === undefined || at[only] === true;

/** Returns how often an instruction of a block runs in a step with the full batch; 0 in an evaluation, which is not part of a step. */
export const timesIn = (
  p: Pick<Program, "chunks" | "order">,
  { kind }: Pick<Block, "kind">,
  { only }: Pick<Instruction, "only">,
): number => (kind.startsWith("evaluation") ? 0 : kind === "step" || only ? 1 : microbatchesIn(p));

/** Returns the gradients that the first microbatch of a step writes where a target has kernels for it; all others must be zero before. */
export function writtenFirst({ chunks }: Pick<Program, "chunks">): Set<string> {
  const written = new Set<string>();
  for (const c of chunks)
    for (const i of microbatchBlocks.flatMap((kind) => c[kind])) {
      if (i.kind !== "compute" || i.first_kernel === undefined) continue;
      for (const name of i.accumulates ?? []) if (i.writes[name] !== undefined) written.add(i.writes[name]);
    }
  return written;
}

/** Returns the bytes of all activation copies of all chunks. */
export const activationBytes = ({ chunks }: Pick<Program, "chunks">, { activation }: Pick<Memory, "activation">): number =>
  chunks.reduce((sum, { copies }, c) => sum + copies * (activation[c] ?? 0), 0);

/** Returns the byte offset of an activation copy of a chunk in the arena: chunk after chunk, copy after copy. */
export const activationStart = (
  { chunks }: Pick<Program, "chunks">,
  { activation }: Pick<Memory, "activation">,
  { chunk = 0 }: Pick<Buffer, "chunk">,
  copy: number,
): number => activationBytes({ chunks: chunks.slice(0, chunk) }, { activation }) + copy * (activation[chunk] ?? 0);
