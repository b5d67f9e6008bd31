/**
 * Memory planning: assigns an offset to every buffer of a program. Parameters, gradients and optimizer state live for the whole run.
 * Activations (one copy per chunk and microbatch in flight) live from the forward op that writes them to the last backward op that
 * reads them. Workspace lives within one block; the blocks of a pair run at the same time, so that backwards have theirs behind that of forwards. Buffers of an asynchronous collective live until an instruction waits for it. Two buffers share bytes only if their lifetimes do not overlap.
 * A part of a buffer has the bytes of that buffer.
 */

import { bytesOf } from "../../schemas/dtypes.ts";
import { visitTouched } from "../../schemas/effects.ts";
import { itemOf } from "../../schemas/lookup.ts";
import type { Buffer, BufferKind, Instruction, Kernel, Memory, Program } from "../../schemas/plan.ts";
import { type Block, blocksOf, microbatchBlocks, turnsOf, writtenFirst } from "../../schemas/program.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { type OpenCollectives, visitWithWaits } from "../analysis/asyncTouches.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { memoryBreakdown, memoryKinds, memoryNames, peakOfParts } from "../analysis/memoryBreakdown.ts";
import { invariant } from "../ops/op.ts";
import { pairs } from "./layout.ts";

/** Alignment of offsets in bytes. Vector loads and tensor-memory descriptors need it. */
export const ALIGN = 256;

/** Returns the bytes of a buffer on one rank. */
export const sizeOf = (b: Pick<Buffer, "dtype" | "shape">): number => bytesOf[b.dtype] * elementsOf(b.shape);
/** Returns the bytes that a buffer occupies in its arena: its size, rounded up to the alignment. */
export const aligned = (b: Pick<Buffer, "dtype" | "shape">): number => Math.max(ALIGN, Math.ceil(sizeOf(b) / ALIGN) * ALIGN);

/** A buffer with the first and the last instruction that touches it, as indices of a timeline; -1 for inputs, which exist before. */
export interface Lifetime {
  readonly buffer: Buffer;
  from: number;
  to: number;
}

/** Returns the offsets of all buffers and the bytes of each arena. Without kernels, scratch is 0. */
export function planMemory(program: Program, kernels: readonly Kernel[] = []): Memory {
  const offsets: Record<string, number> = {};
  const total = { parameter: 0, gradient: 0, optimizer: 0, workspace: 0 };

  // gradients that need zeros come first, so that one fill clears them; what shares the bytes of another follows it
  const written = writtenFirst(program);
  const rankOf = (b: Buffer) => (b.within ? 2 : written.has(b.id) ? 1 : 0);
  const inOrder = [...program.buffers].sort((a, b) => rankOf(a) - rankOf(b));
  for (const kind of ["parameter", "gradient", "optimizer"] as const) {
    for (const b of inOrder) {
      if (b.kind !== kind) continue;
      if (b.within) {
        offsets[b.id] = offsetIn(offsets, b.within);
        continue;
      }
      offsets[b.id] = total[kind];
      total[kind] += aligned(b);
    }
  }
  const tables = tablesOf(program);
  const activation = timelines(program).map((timeline, c) => pack(lifetimes(tables, "activation", timeline, c), offsets));
  total.workspace = packWorkspace(program, tables, offsets).all;

  for (const b of program.buffers) if (b.part) offsets[b.id] = offsetIn(offsets, b.part.of) + b.part.at * bytesOf[b.dtype];
  const arenas = { ...total, activation, scratch: scratchOf(program, kernels) };
  return { stage: program.stage, ...arenas, peak: peakOfParts(memoryBreakdown(program, arenas)), offsets };
}

/** The end of the workspace of forward blocks, and of all blocks, in bytes. */
interface WorkspaceEnds {
  readonly forward: number;
  readonly all: number;
}

/**
 * Assigns offsets to workspace. Blocks run one after another, so their workspace overlaps, except inputs that several blocks read. The
 * blocks of a pair run at the same time: with pairs, backwards have their workspace behind that of forwards.
 */
function packWorkspace(program: Program, tables: Tables, offsets: Record<string, number>): WorkspaceEnds {
  const packed = (blocks: readonly Block[], from: number): WorkspaceEnds => {
    const fixed = sharedInputOffsets(program, blocks, from);
    const ends = { forward: from, all: from };
    for (const { kind, instructions } of blocks) {
      const end = pack(lifetimes(tables, "workspace", instructions), offsets, fixed, from);
      ends.all = Math.max(ends.all, end);
      if (kind === "forward") ends.forward = Math.max(ends.forward, end);
    }
    return ends;
  };
  const blocks = blocksOf(program);
  if (!program.pairs) return packed(blocks, 0);
  const isBackward = ({ kind }: Block): boolean => kind === "backward";
  const { forward, all } = packed(
    blocks.filter((b) => !isBackward(b)),
    0,
  );
  return { forward, all: Math.max(all, packed(blocks.filter(isBackward), forward).all) };
}

/** Returns the end of the workspace of forward blocks in bytes: that of the others begins there if the program has pairs. */
export function forwardWorkspace(program: Program, { offsets }: Pick<Memory, "offsets">): number {
  const byId = new BufferTable(program.buffers);
  let end = 0;
  for (const { forward } of program.chunks)
    for (const i of forward)
      visitTouched(i, byId, (id) => {
        const buffer = byId.get(id);
        if (buffer.kind === "workspace") end = Math.max(end, offsetIn(offsets, id) + aligned(buffer));
      });
  return end;
}

/** Returns the offset of a buffer. Throws an invariant if it has none. */
function offsetIn(offsets: Memory["offsets"], id: string): number {
  const offset = offsets[id];
  invariant(offset !== undefined, () => `${id} has no offset`);
  return offset;
}

/** Returns the offsets of workspace that several of the blocks touch. These are inputs; they begin at byte `from` of the arena. */
function sharedInputOffsets(program: Program, blocks: readonly Block[], from: number): Map<string, number> {
  const byId = new Map(program.buffers.map((b) => [b.id, b]));
  /** Per workspace buffer, the first block that touches it; `several` if another does too. */
  const several = -1;
  const blockOfBuffer = new Map<string, number>();
  for (const [block, { instructions }] of blocks.entries())
    for (const i of instructions)
      visitTouched(i, byId, (id) => {
        const known = blockOfBuffer.get(id);
        if (known === undefined) blockOfBuffer.set(id, block);
        else if (known !== block) blockOfBuffer.set(id, several);
      });
  const offsets = new Map<string, number>();
  let end = from;
  for (const b of program.buffers) {
    if (b.kind !== "workspace" || blockOfBuffer.get(b.id) !== several) continue;
    offsets.set(b.id, end);
    end += aligned(b);
  }
  return offsets;
}

/** Returns per chunk the instructions of one microbatch, forward and then backward: the timeline of its activations. */
const timelines = ({ chunks }: Program): Instruction[][] => chunks.map((c) => microbatchBlocks.flatMap((kind) => c[kind]));

/** Returns the largest scratch of the kernels that a program launches, in bytes, aligned; 0 without kernels. */
export function scratchOf(program: Program, kernels: readonly Kernel[]): number {
  const bytes = new Map(kernels.map((k) => [k.id, k.scratch]));
  let most = 0;
  for (const { instructions } of blocksOf(program))
    for (const i of instructions)
      if (i.kind === "compute") most = Math.max(most, bytes.get(i.kernel) ?? 0, bytes.get(i.first_kernel ?? "") ?? 0);
  return Math.ceil(most / ALIGN) * ALIGN;
}

/**
 * Bytes of scratch that a kernel may need whatever its operands: sums of parts. A product in f32 has up to 64 MiB of them, but each part has a depth of
 * at least 512, so that its operands bound what is beyond.
 */
const SCRATCH_OF_PARTS = 32 * 2 ** 20;

/** Returns an upper bound of `scratchOf` for every target: no kernel has more scratch than twice its operands, beside sums of parts. */
export function scratchBound(program: Program): number {
  const byId = new BufferTable(program.buffers);
  let most = 0;
  for (const { instructions } of blocksOf(program))
    for (const i of instructions) {
      if (i.kind !== "compute") continue;
      // a list of tensors has partial sums of some thousand blocks, whatever the sizes of its tensors
      for (const { reads, writes } of membersOf(i)) {
        const ids = [...Object.values(reads), ...Object.values(writes)];
        most = Math.max(
          most,
          ids.reduce((sum, id) => sum + sizeOf(byId.get(id)), 0),
        );
      }
    }
  return Math.ceil((SCRATCH_OF_PARTS + 2 * most) / ALIGN) * ALIGN;
}

/** The tables of a program that each of its timelines reads. */
interface Tables {
  readonly byId: BufferTable;
  /** Ids of the buffers that the host fills. */
  readonly inputs: ReadonlySet<string>;
}
const tablesOf = ({ buffers, inputs }: Program): Tables => ({
  byId: new BufferTable(buffers),
  inputs: new Set(inputs.map(({ buffer }) => buffer)),
});

/** Returns the lifetimes of the buffers of one kind, sorted by their first instruction. Inputs are filled before the block starts. */
function lifetimes({ byId, inputs }: Tables, kind: BufferKind, timeline: readonly Instruction[], chunk = 0): Lifetime[] {
  const alive = new Map<string, Lifetime>();
  let at = 0;
  const touch = (id: string): void => {
    const known = alive.get(id);
    if (known) {
      known.to = at;
      return;
    }
    const buffer = byId.get(id);
    if (buffer.part) {
      touch(buffer.part.of);
      return;
    }
    if (buffer.kind !== kind || (buffer.chunk ?? 0) !== chunk) return;
    alive.set(id, { buffer, from: inputs.has(id) ? -1 : at, to: at });
  };
  const open: OpenCollectives = new Map();
  for (; at < timeline.length; at++) visitWithWaits(itemOf(timeline, at, "instruction"), byId, open, touch);
  // what nothing in the timeline waits for touches its buffers until the end
  at--;
  for (const i of open.values()) visitTouched(i, byId, touch);
  return [...alive.values()].sort((a, b) => a.from - b.from);
}

/** A block, and the lifetimes of the activations and the workspace that are alive in it, as indices of its instructions. */
export interface BlockLifetimes {
  readonly block: Block;
  /** -1: alive before the block; the number of its instructions: alive after it. */
  readonly lives: readonly Readonly<Lifetime>[];
}

/** Returns the lifetimes in each block of a program; activations are those of one microbatch. */
export function blockLifetimes(program: Program): BlockLifetimes[] {
  const tables = tablesOf(program);
  const activations = timelines(program).map((timeline, c) => lifetimes(tables, "activation", timeline, c));
  return blocksOf(program).map((block) => {
    const { kind, chunk, instructions } = block;
    const own = program.chunks[chunk];
    const at = (microbatchBlocks as readonly string[]).indexOf(kind);
    const before = own ? microbatchBlocks.slice(0, Math.max(0, at)).reduce((sum, name) => sum + own[name].length, 0) : 0;
    const end = before + instructions.length;
    const kept = at < 0 ? [] : (activations[chunk] ?? []).filter(({ from, to }) => from < end && to >= before);
    const inBlock = (n: number): number => Math.max(-1, Math.min(instructions.length, n - before));
    return {
      block,
      lives: [
        ...kept.map(({ buffer, from, to }) => ({ buffer, from: inBlock(from), to: inBlock(to) })),
        ...lifetimes(tables, "workspace", instructions),
      ],
    };
  });
}

/**
 * Assigns offsets by best fit, in order of the first instruction: the smallest free hole, or the end of the arena. Buffers in `fixed`
 * keep their offsets. Nothing is placed before byte `from`. Returns the bytes of the arena.
 */
function pack(
  lives: readonly Lifetime[],
  offsets: Record<string, number>,
  fixed: ReadonlyMap<string, number> = new Map(),
  from = 0,
): number {
  let end = from;
  const holes: { at: number; size: number }[] = [];
  for (const [id, at] of fixed) {
    const life = lives.find((l) => l.buffer.id === id);
    if (!life) continue;
    invariant(life.from === -1, `${id} is not an input, but several blocks share it`);
    if (at > end) holes.push({ at: end, size: at - end });
    offsets[id] = at;
    end = at + aligned(life.buffer);
  }
  const byEnd = [...lives].sort((a, b) => a.to - b.to);
  let freed = 0;
  const free = (at: number, size: number) => {
    let i = holes.findIndex((h) => h.at > at);
    if (i < 0) i = holes.length;
    holes.splice(i, 0, { at, size });
    for (const j of [i, i - 1]) {
      const [a, b] = [holes[j], holes[j + 1]];
      if (a && b && a.at + a.size === b.at) holes.splice(j, 2, { at: a.at, size: a.size + b.size });
    }
  };
  for (const { buffer, from: begin } of lives) {
    // a buffer is free after the last instruction that reads it, so that instruction cannot write over it
    for (let next = byEnd[freed]; next && next.to < begin; next = byEnd[++freed])
      free(offsetIn(offsets, next.buffer.id), aligned(next.buffer));
    if (fixed.has(buffer.id)) continue;
    const size = aligned(buffer);
    let best: (typeof holes)[number] | undefined;
    for (const h of holes) if (h.size >= size && (!best || h.size < best.size)) best = h;
    if (best) {
      offsets[buffer.id] = best.at;
      best.at += size;
      best.size -= size;
      if (best.size === 0) holes.splice(holes.indexOf(best), 1);
      continue;
    }
    // a hole at the end of the arena is extended
    const last = holes.at(-1);
    const at = last && last.at + last.size === end ? last.at : end;
    if (last && at === last.at) holes.pop();
    offsets[buffer.id] = at;
    end = at + size;
  }
  return end;
}

/** Throws an invariant if two buffers with overlapping lifetimes overlap in memory, or if one is misaligned or outside of its arena. */
export function verifyMemory(program: Program, memory: Memory): void {
  const tables = tablesOf(program);
  const check = (kind: "activation" | "workspace", timeline: readonly Instruction[], bytes: number, chunk = 0) => {
    const lives = lifetimes(tables, kind, timeline, chunk);
    const open: { readonly id: string; readonly to: number; readonly start: number; readonly stop: number }[] = [];
    for (const l of lives) {
      const start = offsetIn(memory.offsets, l.buffer.id);
      const stop = start + sizeOf(l.buffer);
      invariant(
        start % ALIGN === 0 && stop <= bytes,
        () => `${l.buffer.id} at ${start} is misaligned or outside of the ${kind} arena of ${bytes} bytes`,
      );
      let kept = 0;
      for (const other of open) {
        if (other.to < l.from) continue;
        open[kept++] = other;
        // the condition is tested first: building a message for every pair is slow
        if (stop > other.start && other.stop > start) invariant(false, `${l.buffer.id} and ${other.id} overlap`);
      }
      open.length = kept;
      open.push({ id: l.buffer.id, to: l.to, start, stop });
    }
  };
  for (const [c, [timeline, bytes]] of pairs(timelines(program), memory.activation).entries()) check("activation", timeline, bytes, c);
  for (const { instructions } of blocksOf(program)) check("workspace", instructions, memory.workspace);
  for (const { forward, backward } of program.pairs ?? []) {
    const runs = [
      { kind: "forward", microbatch: 1, chunk: forward },
      { kind: "backward", microbatch: 0, chunk: backward },
    ] as const;
    check(
      "workspace",
      turnsOf(program, runs).flatMap(({ instructions }) => instructions),
      memory.workspace,
    );
  }
}

/** Prints the memory of each stage: the sizes of its arenas, then every buffer with offset and size. */
export function printMemory(programs: readonly Program[], memory: readonly Memory[]): string {
  const lines: string[] = [];
  for (const [p, m] of pairs(programs, memory)) {
    const offset = (b: Buffer): number => offsetIn(m.offsets, b.id);
    const parts = memoryBreakdown(p, m);
    const copies = p.chunks.map(({ copies }, c) => `${copies} x ${m.activation[c]}`).join(" + ");
    const terms = memoryKinds
      .filter((kind) => kind !== "scratch" || parts.scratch > 0)
      .map((kind) => `${memoryNames[kind]} ${kind === "activation" ? copies : parts[kind]}`);
    lines.push(`stage ${m.stage}: peak ${m.peak} bytes = ${terms.join(" + ")}`);
    for (const b of [...p.buffers].sort((x, y) => (x.kind === y.kind ? offset(x) - offset(y) : x.kind < y.kind ? -1 : 1)))
      lines.push(
        `  ${b.kind.padEnd(10)} ${String(offset(b)).padStart(12)} ${String(sizeOf(b)).padStart(12)}  ${b.dtype}[${b.shape}]  ${b.id}`,
      );
  }
  return `${lines.join("\n")}\n`;
}
