/**
 * Communication among ranks that share one device: collectives are copies and sums, recorded when the last member of a group arrives.
 * Sources are copied first, so source and destination may overlap. Sums run in the order of members, in f32, and are rounded once.
 */

import { bytesOf, type Dtype } from "../../schemas/dtypes.ts";
import type { Buffer, Collective, CollectiveKind, Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { elementsOf, rankAt } from "../../schemas/sharding.ts";
import { membersOf } from "../asyncCollectives.ts";
import type { Comm } from "../backend.ts";
import { inProcessComm, type RankTable, rankTable } from "../inProcessComm.ts";
import { type BufferRange, bytesOfBuffer } from "./arenas.ts";
import type { Bind } from "./bindings.ts";
import { gridOf, MOST_SOURCES, placeSource, type Reduce, type Reduction, reduceSource } from "./collectives.ts";
import type { Commands, Dispatch } from "./commands.ts";
import type { Gpu } from "./device.ts";
import type { Compile, ComputePipeline } from "./pipelines.ts";

type Copy = { readonly from: BufferRange; readonly to: BufferRange };
type Step = Dispatch | Copy;

/** What webgpuComm needs of the device. */
export interface CommDevice {
  readonly gpu: Gpu;
  readonly commands: Commands;
  readonly compile: Compile;
  readonly bind: Bind;
  place(rank: number, b: Buffer, copy: number): BufferRange;
}

/** Returns the communication of all ranks on one device. */
export async function webgpuComm(plan: Plan, parts: CommDevice): Promise<Comm> {
  const { gpu, commands, compile, place } = parts;
  const ranks = rankTable(plan);
  const { sources, room } = needsOf(plan, ranks);
  const compiled = [...sources].map(async ([name, source]): Promise<[string, ComputePipeline]> => {
    const [pipeline] = await compile(source);
    if (!pipeline) throw new Error(`rankc: ${name} has no kernel`);
    return [name, pipeline];
  });
  const staging = room.map((bytes, j) => gpu.make(`collectives ${j}`, Math.ceil(bytes / 256) * 256));
  const collectives = new Collectives(ranks, parts, new Map(await Promise.all(compiled)), staging);
  /** Message buffers for reuse, by size; reuse is safe because the device executes in order. */
  const read = new Map<number, GPUBuffer[]>();
  return inProcessComm<GPUBuffer>(plan, ranks, {
    perform: (group, i, copy) => collectives.perform(group, i, copy),
    send(rank, b, copy) {
      const from = place(rank, b, copy);
      const message = read.get(from.bytes)?.pop() ?? gpu.make(`what rank ${rank} sends`, Math.ceil(from.bytes / 4) * 4);
      commands.copy(from, { buffer: message, offset: 0, bytes: from.bytes });
      return message;
    },
    receive(rank, b, copy, message) {
      const to = place(rank, b, copy);
      commands.copy({ buffer: message, offset: 0, bytes: to.bytes }, to);
      read.set(to.bytes, [...(read.get(to.bytes) ?? []), message]);
    },
  });
}

/** Returns the sources of the kernels that the plan's collectives need, by name, and the bytes of staging memory of each member. */
function needsOf({ mesh, programs }: Plan, { bufferOf, groupOf }: RankTable) {
  const sources = new Map<string, ReturnType<typeof reduceSource>>();
  const room: number[] = [];
  const need = (at: number, bytes: number): void => void (room[at] = Math.max(room[at] ?? 0, bytes));
  for (const p of programs)
    for (const i of instructionsOf(p)) {
      if (i.kind !== "collective") continue;
      const one = rankAt(mesh, p.stage, 0);
      const g = groupOf(one, i).length;
      const reduction = reductionOf(i);
      for (const pair of membersOf(i)) {
        const [from, to] = [bufferOf(one, pair.from), bufferOf(one, pair.to)];
        if (reduction) {
          need(0, 4 * elementsOf(from.shape));
          for (const r of reductions(reduction, from.dtype, g)) sources.set(nameOf(r), reduceSource(r));
          if (to.dtype !== "f32") sources.set(placing("f32", to.dtype), placeSource("f32", to.dtype));
        } else {
          for (let j = 0; j < g; j++) need(j, bytesOfBuffer(from));
          if (!wholeWords(to, g)) sources.set(placing(from.dtype, to.dtype), placeSource(from.dtype, to.dtype));
        }
      }
    }
  return { sources, room };
}

/** A range of memory with the type of its elements. */
interface TypedRange {
  readonly range: BufferRange;
  readonly dtype: Dtype;
}
/** The operand of a member in a collective. */
interface Member extends TypedRange {
  readonly rank: number;
}
/** One collective of one group: the sources and destinations of its members in order, with so many elements each. */
interface Exchange {
  readonly i: Collective;
  readonly held: readonly Member[];
  readonly wanted: readonly Member[];
  readonly n: number;
  readonly m: number;
}

/** The collectives of a plan as dispatches and copies. */
class Collectives {
  readonly #ranks: RankTable;
  readonly #parts: CommDevice;
  readonly #kernels: ReadonlyMap<string, ComputePipeline>;
  /** Staging memory by member. */
  readonly #staging: readonly GPUBuffer[];
  /** By collective, then by group and activation copy. Created on first use; equal in every step. */
  readonly #prepared = new Map<Collective, Map<string, readonly Step[]>>();

  constructor(ranks: RankTable, parts: CommDevice, kernels: ReadonlyMap<string, ComputePipeline>, staging: readonly GPUBuffer[]) {
    this.#ranks = ranks;
    this.#parts = parts;
    this.#kernels = kernels;
    this.#staging = staging;
  }

  /** Records a collective of a group. */
  perform(group: readonly number[], i: Collective, copy: number): void {
    const known = this.#prepared.get(i) ?? new Map<string, readonly Step[]>();
    this.#prepared.set(i, known);
    const key = `${group[0]}|${copy}`;
    const steps = known.get(key) ?? this.#steps(group, i, copy);
    known.set(key, steps);
    for (const s of steps) {
      if ("pipeline" in s) this.#parts.commands.dispatch(s);
      else this.#parts.commands.copy(s.from, s.to);
    }
  }

  #steps(group: readonly number[], i: Collective, copy: number): readonly Step[] {
    const [first = 0] = group;
    const [from, to] = [this.#ranks.bufferOf(first, i.from), this.#ranks.bufferOf(first, i.to)];
    const [n, m, g] = [elementsOf(from.shape), elementsOf(to.shape), group.length];
    const expected: Record<CollectiveKind, number> = {
      ...{ all_gather: n * g, reduce_scatter: n / g, all_to_all: n },
      ...{ all_reduce: n, all_reduce_max: n, shift: n },
    };
    if (m !== expected[i.how]) throw new Error(`rankc: ${i.id} is no ${i.how} of ${g} ranks: ${from.id} has ${n} elements, ${to.id} ${m}`);
    const members = (id: string): Member[] =>
      group.map((rank) => {
        const b = this.#ranks.bufferOf(rank, id);
        return { rank, range: this.#parts.place(rank, b, copy), dtype: b.dtype };
      });
    const exchange: Exchange = { i, held: members(i.from), wanted: members(i.to), n, m };
    const reduction = reductionOf(i);
    return reduction ? this.#reduce(exchange, reduction, from.dtype) : this.#exchange(exchange);
  }

  /** Reduces all sources to f32 in staging memory, then places the total, or each member's block of it. */
  #reduce({ i, held, wanted, n, m }: Exchange, reduction: Reduction, dtype: Dtype): Step[] {
    const total: TypedRange = { range: this.#stagingOf(0, 4 * n), dtype: "f32" };
    const reduce = reductions(reduction, dtype, held.length).map((r, k) => {
      const part = held.slice(k * MOST_SOURCES, k * MOST_SOURCES + r.sources);
      const [{ rank } = { rank: 0 }] = part;
      return this.#run(i, nameOf(r), rank, [...part.map(({ range }) => range), total.range], n);
    });
    const scatter = wanted.map((to, k) => this.#place(i, total, i.how === "reduce_scatter" ? k * m : 0, to, 0, m));
    return [...reduce, ...scatter];
  }

  /** Copies all sources to staging memory, then places the blocks that each member receives. */
  #exchange({ i, held, wanted, m }: Exchange): Step[] {
    const g = held.length;
    const staged = held.map(({ range, dtype }, j) => ({ from: range, to: this.#stagingOf(j, range.bytes), dtype }));
    const copies = staged.map(({ from, to }): Copy => ({ from, to }));
    if (i.how === "shift") {
      const shifted = [...staged.slice(-1), ...staged.slice(0, -1)];
      return [...copies, ...shifted.flatMap(({ to: from }, k): Copy[] => wanted.slice(k, k + 1).map(({ range }) => ({ from, to: range })))];
    }
    const blocks = wanted.flatMap((to, k) =>
      staged.map(({ to: range, dtype }, j) =>
        this.#place(i, { range, dtype }, i.how === "all_to_all" ? (k * m) / g : 0, to, (j * m) / g, m / g),
      ),
    );
    return [...copies, ...blocks];
  }

  #stagingOf(member: number, bytes: number): BufferRange {
    const buffer = this.#staging[member];
    if (!buffer) throw new Error(`rankc: no staging memory for member ${member}`);
    return { buffer, offset: 0, bytes };
  }

  /** Copies n elements, from element `at` to element `start`, or converts them to another type. */
  #place(i: Collective, from: TypedRange, at: number, to: Member, start: number, n: number): Step {
    const [a, b, bytes] = [at * bytesOf[from.dtype], start * bytesOf[to.dtype], n * bytesOf[to.dtype]];
    if (from.dtype === to.dtype && [a, b, bytes].every((x) => x % 4 === 0))
      return {
        from: { ...from.range, offset: from.range.offset + a, bytes },
        to: { ...to.range, offset: to.range.offset + b, bytes },
      };
    return this.#run(i, placing(from.dtype, to.dtype), to.rank, [from.range, to.range], n, [at, start, n]);
  }

  #run(i: Collective, name: string, rank: number, ranges: readonly BufferRange[], elements: number, uniform?: readonly number[]): Dispatch {
    const kernel = this.#kernels.get(name);
    if (!kernel) throw new Error(`rankc: the kernel ${name} is not compiled`);
    const { pipeline, layout } = kernel;
    const group = this.#parts.bind(`${i.id}, rank ${rank}`, layout, ranges, uniform);
    return { pipeline, group, grid: gridOf(elements), of: { rank, id: i.id, op: i.how, kernel: name } };
  }
}

const reductionOf = (i: Collective): Reduction | undefined =>
  i.how === "all_reduce" || i.how === "reduce_scatter" ? "sum" : i.how === "all_reduce_max" ? "max" : undefined;

/** Returns the launches that reduce the shards of a group, each with as many sources as it can bind. */
const reductions = (reduction: Reduction, dtype: Dtype, members: number): Reduce[] =>
  Array.from({ length: Math.ceil(members / MOST_SOURCES) }, (_, k) => ({
    reduction,
    dtype,
    sources: Math.min(MOST_SOURCES, members - k * MOST_SOURCES),
    more: k > 0,
  }));

const nameOf = ({ reduction, dtype, sources, more }: Reduce): string => `${reduction}${sources}_${dtype}${more ? "_more" : ""}`;
const placing = (from: Dtype, to: Dtype): string => `place_${from}_${to}`;
const wholeWords = (b: Buffer, blocks: number): boolean => (bytesOfBuffer(b) / blocks) % 4 === 0;
