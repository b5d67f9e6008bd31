/**
 * Memory: gives every buffer of a program its place. Parameters, gradients and optimizer state live for good; activations
 * (one copy per microbatch in flight and chunk) from the forward op that makes them to the last backward op that reads them;
 * workspace within one block. Two buffers share bytes only if never alive together.
 */

import type { Buffer, BufferKind, Instruction, Kernel, Memory, Program } from "../../schemas/plan.ts";
import { blocksOf, microbatchBlocks } from "../../schemas/program.ts";
import { bytesOf, elementsOf } from "../../schemas/sharding.ts";
import { memoryBreakdown, memoryKinds, memoryNames, peakOfParts } from "../analysis/memoryBreakdown.ts";
import { invariant } from "../ops/op.ts";
import { touched } from "./lower.ts";

/** Places begin at multiples of this many bytes: what vector loads and tensor-memory descriptors need. */
export const ALIGN = 256;

/** Bytes of a buffer on one rank. */
export const sizeOf = (b: Pick<Buffer, "dtype" | "shape">): number => bytesOf[b.dtype] * elementsOf(b.shape);
/** Bytes that a buffer takes in its arena. */
export const aligned = (b: Pick<Buffer, "dtype" | "shape">): number => Math.max(ALIGN, Math.ceil(sizeOf(b) / ALIGN) * ALIGN);

interface Lifetime {
  readonly buffer: Buffer;
  from: number;
  to: number;
}

export function planMemory(program: Program, kernels: readonly Kernel[] = []): Memory {
  const offsets: Record<string, number> = {};
  const total = { parameter: 0, gradient: 0, optimizer: 0, workspace: 0 };

  for (const kind of ["parameter", "gradient", "optimizer"] as const) {
    for (const b of program.buffers) {
      if (b.kind !== kind) continue;
      if (b.within) {
        offsets[b.id] = offsets[b.within]!;
        continue;
      }
      offsets[b.id] = total[kind];
      total[kind] += aligned(b);
    }
  }
  const activation = timelines(program).map((timeline, c) => pack(lifetimes(program, "activation", timeline, c), offsets));
  // workspace: blocks never run together, so each starts from nothing, but for inputs that several of them read
  const fixed = placesInAll(program);
  for (const { instructions } of blocksOf(program))
    total.workspace = Math.max(total.workspace, pack(lifetimes(program, "workspace", instructions), offsets, fixed));

  const arenas = { ...total, activation, scratch: scratchOf(program, kernels) };
  return { stage: program.stage, ...arenas, peak: peakOfParts(memoryBreakdown(program, arenas)), offsets };
}

/** Workspace that several blocks touch: inputs, which have one place in all of them, at the beginning. */
function placesInAll(program: Program): Map<string, number> {
  const byId = new Map(program.buffers.map((b) => [b.id, b]));
  const blocks = blocksOf(program).map(({ instructions }) => new Set(instructions.flatMap((i) => [...touched(i, byId)])));
  const places = new Map<string, number>();
  let end = 0;
  for (const b of program.buffers) {
    if (b.kind !== "workspace" || blocks.filter((ids) => ids.has(b.id)).length < 2) continue;
    places.set(b.id, end);
    end += aligned(b);
  }
  return places;
}

/** By chunk, what one microbatch does: forward, then backward. An activation lives from one instruction to another of it. */
const timelines = ({ chunks }: Program): Instruction[][] => chunks.map((c) => microbatchBlocks.flatMap((kind) => c[kind]));

/** Bytes of scratch of the program's kernel that uses the most; 0 before kernels are known. */
export function scratchOf(program: Program, kernels: readonly Kernel[]): number {
  const bytes = new Map(kernels.map((k) => [k.id, k.scratch]));
  let most = 0;
  for (const { instructions } of blocksOf(program))
    for (const i of instructions) if (i.kind === "compute") most = Math.max(most, bytes.get(i.kernel) ?? 0);
  return Math.ceil(most / ALIGN) * ALIGN;
}

/** From the first instruction that touches a buffer to the last. Inputs are filled before the block starts. */
function lifetimes(program: Program, kind: BufferKind, timeline: readonly Instruction[], chunk = 0): Lifetime[] {
  const byId = new Map(program.buffers.map((b) => [b.id, b]));
  const inputs = new Set(Object.values(program.inputs));
  const alive = new Map<string, Lifetime>();
  for (const [at, i] of timeline.entries())
    for (const id of touched(i, byId)) {
      const buffer = byId.get(id)!;
      if (buffer.kind !== kind || (buffer.chunk ?? 0) !== chunk) continue;
      const l = alive.get(id) ?? { buffer, from: inputs.has(id) ? -1 : at, to: at };
      l.to = at;
      alive.set(id, l);
    }
  return [...alive.values()].sort((a, b) => a.from - b.from);
}

/** Best fit in order of birth: the smallest hole that is free, else the end; `fixed` have theirs. Returns the bytes of the arena. */
function pack(lives: readonly Lifetime[], offsets: Record<string, number>, fixed: ReadonlyMap<string, number> = new Map()): number {
  let end = 0;
  const holes: { at: number; size: number }[] = [];
  for (const [id, at] of fixed) {
    const life = lives.find((l) => l.buffer.id === id);
    if (!life) continue;
    invariant(life.from === -1, `${id} is no input, and has a place in several blocks`);
    if (at > end) holes.push({ at: end, size: at - end });
    offsets[id] = at;
    end = at + aligned(life.buffer);
  }
  const dying = [...lives].sort((a, b) => a.to - b.to);
  let dead = 0;
  const free = (at: number, size: number) => {
    let i = holes.findIndex((h) => h.at > at);
    if (i < 0) i = holes.length;
    holes.splice(i, 0, { at, size });
    for (const j of [i, i - 1]) {
      const [a, b] = [holes[j], holes[j + 1]];
      if (a && b && a.at + a.size === b.at) holes.splice(j, 2, { at: a.at, size: a.size + b.size });
    }
  };
  for (const { buffer, from } of lives) {
    // what is read for the last time by an instruction stays until that instruction is over
    for (; dead < dying.length && dying[dead]!.to < from; dead++) free(offsets[dying[dead]!.buffer.id]!, aligned(dying[dead]!.buffer));
    if (fixed.has(buffer.id)) continue;
    const size = aligned(buffer);
    let best = -1;
    for (const [i, h] of holes.entries()) if (h.size >= size && (best < 0 || h.size < holes[best]!.size)) best = i;
    if (best >= 0) {
      const h = holes[best]!;
      offsets[buffer.id] = h.at;
      if (h.size === size) holes.splice(best, 1);
      else holes[best] = { at: h.at + size, size: h.size - size };
      continue;
    }
    // the last hole may reach to the end: grow it
    const last = holes.at(-1);
    const at = last && last.at + last.size === end ? last.at : end;
    if (last && at === last.at) holes.pop();
    offsets[buffer.id] = at;
    end = at + size;
  }
  return end;
}

/** Law: buffers that are alive together in one timeline do not overlap, and all lie within their arena. */
export function verifyMemory(program: Program, memory: Memory): void {
  const check = (kind: "activation" | "workspace", timeline: readonly Instruction[], bytes: number, chunk = 0) => {
    const lives = lifetimes(program, kind, timeline, chunk);
    const open: { readonly id: string; readonly to: number; readonly start: number; readonly stop: number }[] = [];
    for (const l of lives) {
      const start = memory.offsets[l.buffer.id]!;
      const stop = start + sizeOf(l.buffer);
      invariant(start % ALIGN === 0 && stop <= bytes, `${l.buffer.id} at ${start} leaves the ${kind} arena of ${bytes}`);
      for (let i = open.length - 1; i >= 0; i--) {
        const other = open[i]!;
        if (other.to < l.from) {
          open.splice(i, 1);
          continue;
        }
        // asked before the words are made: pairs are many
        if (stop > other.start && other.stop > start) invariant(false, `${l.buffer.id} and ${other.id} overlap`);
      }
      open.push({ id: l.buffer.id, to: l.to, start, stop });
    }
  };
  for (const [c, timeline] of timelines(program).entries()) check("activation", timeline, memory.activation[c]!, c);
  for (const { instructions } of blocksOf(program)) check("workspace", instructions, memory.workspace);
}

/** Text of the memory map: the table of arenas, then every buffer at its place. */
export function printMemory(programs: readonly Program[], memory: readonly Memory[]): string {
  const lines: string[] = [];
  for (const [s, m] of memory.entries()) {
    const p = programs[s]!;
    const parts = memoryBreakdown(p, m);
    const copies = p.chunks.map(({ copies }, c) => `${copies} x ${m.activation[c]}`).join(" + ");
    const terms = memoryKinds
      .filter((kind) => kind !== "scratch" || parts.scratch > 0)
      .map((kind) => `${memoryNames[kind]} ${kind === "activation" ? copies : parts[kind]}`);
    lines.push(`stage ${s}: peak ${m.peak} bytes = ${terms.join(" + ")}`);
    for (const b of [...p.buffers].sort((x, y) => x.kind.localeCompare(y.kind) || m.offsets[x.id]! - m.offsets[y.id]!))
      lines.push(
        `  ${b.kind.padEnd(10)} ${String(m.offsets[b.id]).padStart(12)} ${String(sizeOf(b)).padStart(12)}  ${b.dtype}[${b.shape}]  ${b.id}`,
      );
  }
  return `${lines.join("\n")}\n`;
}
