/**
 * Gradients of weights beside the exchanges of sequence parallelism. In backward a layer all-gathers the gradient of its result, and
 * reduce-scatters the gradient of its input. Between the reduce-scatter of one layer and the product after the all-gather of the next, a
 * rank has nothing to compute but gradients of weights: they are delayed until then. The all-gather of an input for these gradients runs
 * beside the products before them. Additions to one buffer keep their order, so all numbers stay.
 */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Chunk, Collective, Instruction, Program } from "../../../schemas/plan.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { flopsOf } from "../../analysis/cost.ts";
import { ops } from "../../ops/index.ts";
import { arrange } from "../../ops/rearrange.ts";
import type { Mesh } from "../mesh.ts";
import { withWaits } from "./buckets.ts";
import { type Dependencies, dependenciesOf, isWeightGradient } from "./expertOverlap.ts";

/** Returns a program whose gradients of weights run beside the all-gathers and reduce-scatters between tensor ranks. */
export function overlapTensor(program: Program, mesh: Mesh): Program {
  const buffers = new BufferTable(program.buffers);
  const flops = (i: Instruction): number => (i.kind === "compute" ? flopsOf(ops[i.op], i, mesh, (id) => buffers.get(id)) : 0);
  const async = (block: readonly Instruction[]): Instruction[] => withWaits(begun(block, buffers, flops), [], buffers);
  const chunks = program.chunks.map(
    (c): Chunk => ({
      ...c,
      backward: async(delayWeightGradients(c.backward, buffers, flops)),
      weights: async(gatherAhead(c.weights, buffers)),
    }),
  );
  return { ...program, chunks };
}

/** Returns whether an instruction is an exchange of sequence parallelism. */
export const isTensorExchange = (i: Instruction): i is Collective =>
  i.kind === "collective" && i.axes === "tp" && i.stream === undefined && (i.how === "all_gather" || i.how === "reduce_scatter");

type Flops = (i: Instruction) => number;

/** Gradients of weights that wait for a place, in their order. */
class Delayed {
  readonly #flops: Flops;
  #waiting: { readonly at: number; readonly i: Instruction }[] = [];

  constructor(flops: Flops) {
    this.#flops = flops;
  }

  add(at: number, i: Instruction): void {
    this.#waiting.push({ at, i });
  }

  /** Removes those up to the last that `before` holds. Returns them. */
  upTo(before: ReadonlySet<number>): Instruction[] {
    return this.#take(this.#waiting.findLastIndex(({ at }) => before.has(at)) + 1);
  }

  /** Removes the first of them, until they have a share of the work of all. Returns them. */
  share(share: number): Instruction[] {
    const work = this.#waiting.map(({ i }) => this.#flops(i));
    const most = share * work.reduce((sum, own) => sum + own, 0);
    let sum = 0;
    const enough = work.findIndex((own) => (sum += own) >= most);
    const count = enough < 0 ? work.length : enough + 1;
    return this.#take(count);
  }

  rest(): Instruction[] {
    return this.#take(this.#waiting.length);
  }

  #take(count: number): Instruction[] {
    const taken = this.#waiting.slice(0, count).map(({ i }) => i);
    this.#waiting = this.#waiting.slice(count);
    return taken;
  }
}

/**
 * Returns a block in which gradients of weights stand behind the reduce-scatter that follows them and the all-gather after it, half of the
 * work behind each. Those of experts stay, and those that run beside other collectives.
 */
function delayWeightGradients(block: readonly Instruction[], buffers: BufferTable, flops: Flops): Instruction[] {
  if (!block.some(isTensorExchange)) return [...block];
  const dependencies = dependenciesOf(block, buffers);
  const beforeOf = (at: number): ReadonlySet<number> => dependencies.before[at] ?? new Set();
  const isBeside = besideOthers(block);
  const movable = new Set(
    block.flatMap((i, at) => (i.waits === undefined && !isBeside[at] && isDenseWeightGradient(i, buffers) ? [at] : [])),
  );
  // an all-gather that only gradients of weights read has the products before these beside it
  const slots = block.flatMap((i, at) =>
    isTensorExchange(i) && !readersOf(at, block, dependencies).every((r) => movable.has(r)) ? [{ at, how: i.how }] : [],
  );
  const delayed = new Delayed(flops);
  const taken = new Set<number>();
  const delay = (i: Instruction, at: number): void => {
    taken.add(at);
    delayed.add(at, i);
  };
  const arranged = block.flatMap((i, at): Instruction[] => {
    if (taken.has(at)) return [];
    if (movable.has(at)) {
      delay(i, at);
      return [];
    }
    const needed = delayed.upTo(beforeOf(at));
    const number = slots.findIndex((s) => s.at === at);
    const [slot, next] = [slots[number], slots[number + 1]];
    if (!slot) return [...needed, i];
    for (const later of movable)
      if (later > at && later < (next?.at ?? block.length) && [...beforeOf(later)].every((b) => b < at || taken.has(b)))
        delay(block[later] as Instruction, later);
    const isShared = slot.how === "reduce_scatter" && next?.how === "all_gather";
    return [...needed, i, ...delayed.share(isShared ? 0.5 : 1)];
  });
  return [...arranged, ...delayed.rest()];
}

/** Returns a block in which each exchange stands behind the one before it, as far as its operands allow: ahead of the gradients between them. */
function gatherAhead(block: readonly Instruction[], buffers: BufferTable): Instruction[] {
  if (!block.some(isTensorExchange)) return [...block];
  const { before } = dependenciesOf(block, buffers);
  const behind = new Map<number, Instruction[]>();
  let last = -1;
  for (const [at, i] of block.entries()) {
    if (!isTensorExchange(i)) continue;
    const from = Math.max(last, ...(before[at] ?? []));
    if (from >= 0) behind.set(from, [...(behind.get(from) ?? []), i]);
    last = at;
  }
  const moved = new Set([...behind.values()].flat());
  return block.flatMap((i, at) => [...(moved.has(i) ? [] : [i]), ...(behind.get(at) ?? [])]);
}

/** Returns the instructions that compute on what an exchange brings, past the copy behind it. */
function readersOf(at: number, block: readonly Instruction[], dependencies: Dependencies): number[] {
  return [...(dependencies.after[at] ?? [])].flatMap((r) => {
    const reader = block[r];
    return reader?.kind === "compute" && reader.op === arrange.name ? readersOf(r, block, dependencies) : [r];
  });
}

/** Returns whether an instruction adds to gradients of weights that no experts have. */
const isDenseWeightGradient = (i: Instruction, buffers: BufferTable): boolean =>
  isWeightGradient(i, buffers) && [...touchedBy(i, buffers)].every((id) => buffers.get(id).ragged === 0);

/** Returns per instruction whether an asynchronous collective is open when it runs. */
export function besideOthers(block: readonly Instruction[]): boolean[] {
  const open = new Set<string>();
  return block.map((i) => {
    for (const id of i.waits ?? []) open.delete(id);
    const isBeside = open.size > 0;
    if (i.kind === "collective" && i.stream) open.add(i.id);
    return isBeside;
  });
}

/** Returns a block in which exchanges are asynchronous where products stand between them and what touches their buffers. */
function begun(block: readonly Instruction[], buffers: BufferTable, flops: Flops): Instruction[] {
  return block.map((i, at) => {
    if (!isTensorExchange(i)) return i;
    const own = touchedBy(i, buffers);
    for (const later of block.slice(at + 1)) {
      if ([...touchedBy(later, buffers)].some((id) => own.has(id))) break;
      if (flops(later) > 0) return { ...i, stream: "tensor" as const };
    }
    return i;
  });
}
