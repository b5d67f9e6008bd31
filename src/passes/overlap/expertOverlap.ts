/**
 * Work beside dispatch and combine: shared experts, and in backward gradients of weights, of the same layer and of the attention that backward
 * has just left. A block keeps its order but for these instructions, which move behind the begin of an exchange of rows as far as their
 * operands and results allow. Additions to one buffer keep their order, so all numbers stay.
 */
import { touchedBy, writesOf } from "../../../schemas/effects.ts";
import type { Chunk, Collective, Instruction, Program } from "../../../schemas/plan.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { flopsOf } from "../../analysis/cost.ts";
import { isOfSharedExperts } from "../../analysis/idParts.ts";
import { layerOf } from "../../analysis/layerNames.ts";
import { ops } from "../../ops/index.ts";
import type { Mesh } from "../mesh.ts";
import { withWaits } from "./buckets.ts";

/**
 * Returns a program in which shared experts and gradients of weights run beside dispatch and combine. `all`: all collectives of the groups
 * of experts are asynchronous, also those beside which this block has nothing to run.
 */
export function overlapExperts(program: Program, mesh: Mesh, all: boolean): Program {
  const buffers = new BufferTable(program.buffers);
  const arranged = (block: readonly Instruction[]): Instruction[] => {
    const moved = arrange(block, buffers, mesh);
    return withWaits(all ? withStream(moved) : moved, [], buffers);
  };
  const chunks = program.chunks.map((c): Chunk => ({ ...c, forward: arranged(c.forward), backward: arranged(c.backward) }));
  return { ...program, chunks };
}

/** Per instruction of a block, the indices of those that must come before and after it. */
export interface Dependencies {
  readonly before: readonly ReadonlySet<number>[];
  readonly after: readonly ReadonlySet<number>[];
}

/** Returns the dependencies of a block: reads after writes, writes after reads, and writes after writes of one buffer. */
export function dependenciesOf(block: readonly Instruction[], buffers: BufferTable): Dependencies {
  const before = block.map(() => new Set<number>());
  const after = block.map(() => new Set<number>());
  const writer = new Map<string, number>();
  const readers = new Map<string, number[]>();
  const root = (id: string): string => buffers.rootOf(id);
  const link = (from: number | undefined, to: number): void => {
    if (from === undefined || from === to) return;
    before[to]?.add(from);
    after[from]?.add(to);
  };
  for (const [at, i] of block.entries()) {
    const written = new Set([...writesOf(i, buffers)].map(root));
    for (const id of new Set([...touchedBy(i, buffers)].map(root))) {
      link(writer.get(id), at);
      if (written.has(id)) {
        for (const reader of readers.get(id) ?? []) link(reader, at);
        writer.set(id, at);
        readers.set(id, []);
      } else readers.set(id, [...(readers.get(id) ?? []), at]);
    }
  }
  return { before, after };
}

const isExchange = (i: Instruction): i is Collective => i.kind === "collective" && (i.name === "dispatch" || i.name === "combine");
/** Returns a block whose collectives are asynchronous if they are of the group of an exchange: that group has one order of collectives. */
function withStream(block: readonly Instruction[]): Instruction[] {
  const groupOf = ({ subAxes }: Collective): string => subAxes.toSorted((a, b) => a - b).join();
  const groups = new Set(block.flatMap((i) => (isExchange(i) ? [groupOf(i)] : [])));
  return block.map((i) => (i.kind === "collective" && !i.world && groups.has(groupOf(i)) ? { ...i, stream: "experts" } : i));
}
/** Returns whether an instruction computes gradients of weights and nothing else. */
export const isWeightGradient = (i: Instruction, buffers: BufferTable): boolean =>
  i.kind === "compute" && ops[i.op].flops !== undefined && Object.values(i.writes).every((id) => buffers.get(id).kind === "gradient");

/**
 * Returns the indices of the instructions that may move: those of shared experts, gradients of weights in layers with experts, what computes
 * on their results alone, and what only they read. Transfers stay, because other stages wait for them, and what reads the rows of an exchange.
 */
function movableIn(block: readonly Instruction[], { before, after }: Dependencies, buffers: BufferTable): Set<number> {
  const layers = new Set(block.flatMap((i) => (isExchange(i) ? (layerOf(i, buffers) ?? []) : [])));
  const mayMove = (i: Instruction, at: number): boolean =>
    (i.kind === "compute" || i.kind === "collective") && !isExchange(i) && ![...(before[at] ?? [])].some((s) => exchanges.has(s));
  const exchanges = new Set(block.flatMap((i, at) => (isExchange(i) ? [at] : [])));
  const movable = new Set(
    block.flatMap((i, at) =>
      mayMove(i, at) && layers.has(layerOf(i, buffers) ?? -1) && (isOfSharedExperts(i.id) || isWeightGradient(i, buffers)) ? [at] : [],
    ),
  );
  for (const [at, i] of block.entries()) {
    const sources = [...(before[at] ?? [])];
    if (mayMove(i, at) && sources.length > 0 && sources.every((s) => movable.has(s))) movable.add(at);
  }
  for (const [at, i] of [...block.entries()].toReversed()) {
    const readers = [...(after[at] ?? [])];
    if (mayMove(i, at) && readers.length > 0 && readers.every((r) => movable.has(r))) movable.add(at);
  }
  return movable;
}

/** A gap behind the begin of an exchange, with the work that is to run there and that runs there so far, in floating-point operations. */
interface Slot {
  readonly gap: number;
  readonly bytes: number;
  filled: number;
}

/** Returns a block in which movable instructions stand behind exchanges, which are then asynchronous. */
function arrange(block: readonly Instruction[], buffers: BufferTable, mesh: Mesh): Instruction[] {
  if (!block.some(isExchange)) return [...block];
  const dependencies = dependenciesOf(block, buffers);
  const movable = movableIn(block, dependencies, buffers);
  const fixed = block.flatMap((_, at) => (movable.has(at) ? [] : [at]));
  /** Per fixed instruction its number among these; a gap is the place behind it. */
  const numberOf = new Map(fixed.map((at, n) => [at, n]));
  const latest = latestGaps(block.length, dependencies, movable, numberOf, fixed.length - 1);
  const slots = slotsOf(block, numberOf, buffers);
  const flops = (i: Instruction): number => (i.kind === "compute" ? flopsOf(ops[i.op], i, mesh, (id) => buffers.get(id)) : 0);
  const work = new Map<number | undefined, number>();
  for (const at of movable) {
    const i = block[at];
    if (i) work.set(layerOf(i, buffers), (work.get(layerOf(i, buffers)) ?? 0) + flops(i));
  }
  const gapOf = new Map<number, number>();
  const gaps = new Map<number, Instruction[]>();
  let current = -1;
  for (const [at, i] of block.entries()) {
    current = numberOf.get(at) ?? current;
    if (!movable.has(at)) continue;
    const from = Math.max(-1, ...[...(dependencies.before[at] ?? [])].map((p) => numberOf.get(p) ?? gapOf.get(p) ?? -1));
    const to = latest.get(at) ?? fixed.length - 1;
    const layer = layerOf(i, buffers);
    const legal = (s: Slot): boolean => s.gap >= from && s.gap <= to;
    const inLayer = (slots.get(layer) ?? []).filter(legal);
    // gradients of attention's weights come after the exchanges of their layer: they fill the first one of the layer that follows in backward
    const isLate = inLayer.length === 0 && layer !== undefined && isWeightGradient(i, buffers);
    const own = isLate ? (slots.get(layer - 1) ?? []).filter(legal).slice(0, 1) : inLayer;
    const all = own.reduce((sum, { bytes }) => sum + bytes, 0);
    const share = (s: Slot): number => ((work.get(layer) ?? 0) * s.bytes) / all;
    const slot = own.find((s) => s.filled < share(s)) ?? own.at(-1);
    const gap = slot?.gap ?? Math.min(Math.max(current, from), to);
    if (slot) slot.filled += flops(i);
    gapOf.set(at, gap);
    gaps.set(gap, [...(gaps.get(gap) ?? []), i]);
  }
  const filled = new Set([...slots.values()].flat().flatMap((s) => (s.filled > 0 ? [s.gap] : [])));
  const begun = (i: Instruction, n: number): Instruction => (isExchange(i) && filled.has(n) ? { ...i, stream: "experts" } : i);
  return [
    ...(gaps.get(-1) ?? []),
    ...fixed.flatMap((at, n) => block.slice(at, at + 1).flatMap((i) => [begun(i, n), ...(gaps.get(n) ?? [])])),
  ];
}

/** Returns per movable instruction the last gap from which all that needs it can still follow. */
function latestGaps(
  length: number,
  { after }: Dependencies,
  movable: ReadonlySet<number>,
  numberOf: ReadonlyMap<number, number>,
  last: number,
): Map<number, number> {
  const latest = new Map<number, number>();
  for (let at = length - 1; at >= 0; at--) {
    if (!movable.has(at)) continue;
    const limits = [...(after[at] ?? [])].map((s) => {
      const number = numberOf.get(s);
      return number === undefined ? (latest.get(s) ?? last) : number - 1;
    });
    latest.set(at, Math.min(last, ...limits));
  }
  return latest;
}

/** Returns per layer the gaps behind its exchanges. An exchange of less than half of the most bytes, such as that of weights of rows, has none. */
function slotsOf(
  block: readonly Instruction[],
  numberOf: ReadonlyMap<number, number>,
  buffers: BufferTable,
): Map<number | undefined, Slot[]> {
  const slots = new Map<number | undefined, Slot[]>();
  const most = Math.max(...block.map((i) => (isExchange(i) ? i.bytes : 0)));
  for (const [at, i] of block.entries()) {
    const gap = numberOf.get(at);
    if (!isExchange(i) || gap === undefined || i.bytes < most / 2) continue;
    slots.set(layerOf(i, buffers), [...(slots.get(layerOf(i, buffers)) ?? []), { gap, bytes: i.bytes, filled: 0 }]);
  }
  return slots;
}
