/**
 * Communication among ranks that share one device: collectives are copies and sums, recorded when the last member of a group arrives.
 * Sources are copied first, so source and destination may overlap. Sums run in the order of members, in f32, and are rounded once.
 */

import type { Buffer, Collective, CollectiveKind, Dtype, Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { bytesOf, elementsOf, rankAt } from "../../schemas/sharding.ts";
import type { Comm } from "../backend.ts";
import { inProcessComm, rankTable } from "../inProcessComm.ts";
import { type BufferRange, bytesOfBuffer } from "./arenas.ts";
import type { Bind } from "./bindings.ts";
import { gridOf, MOST_SOURCES, placeSource, type Reduce, type Reduction, reduceSource } from "./collectives.ts";
import type { Commands, Dispatch, Origin } from "./commands.ts";
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
export async function webgpuComm(plan: Plan, { gpu, commands, compile, bind, place }: CommDevice): Promise<Comm> {
  const { mesh, programs } = plan;
  const ranks = rankTable(plan);
  const { bufferOf, groupOf } = ranks;

  const { kernels, aside } = await prepareAll();
  const kernel = (name: string): ComputePipeline => kernels.get(name)!;

  /** The kernels of the plan's collectives, and a staging GPUBuffer per member. */
  async function prepareAll(): Promise<{ kernels: Map<string, ComputePipeline>; aside: GPUBuffer[] }> {
    const sources = new Map<string, ReturnType<typeof reduceSource>>();
    const room: number[] = [];
    for (const p of programs)
      for (const i of instructionsOf(p)) {
        if (i.kind !== "collective") continue;
        const one = rankAt(mesh, p.stage, 0);
        const [from, to] = [bufferOf(one, i.from), bufferOf(one, i.to)];
        const g = groupOf(one, i).length;
        const reduction = reductionOf(i);
        const need = (at: number, bytes: number) => (room[at] = Math.max(room[at] ?? 0, bytes));
        if (reduction) {
          need(0, 4 * elementsOf(from.shape));
          for (const r of reductions(reduction, from.dtype, g)) sources.set(nameOf(r), reduceSource(r));
          if (to.dtype !== "f32") sources.set(placing("f32", to.dtype), placeSource("f32", to.dtype));
        } else {
          for (let j = 0; j < g; j++) need(j, bytesOfBuffer(from));
          if (!wholeWords(to, g)) sources.set(placing(from.dtype, to.dtype), placeSource(from.dtype, to.dtype));
        }
      }
    const made = [...sources].map(async ([name, source]) => [name, (await compile(source))[0]!] as const);
    const aside = room.map((bytes, j) => gpu.make(`collectives ${j}`, Math.ceil(bytes / 256) * 256));
    return { kernels: new Map(await Promise.all(made)), aside };
  }

  function steps(i: Collective, group: readonly number[], copy: number): Step[] {
    const origin = (rank: number, kernel: string): Origin => ({ rank, id: i.id, op: i.how, kernel });
    const run = (name: string, rank: number, places: readonly BufferRange[], elements: number, uniform?: readonly number[]): Dispatch => {
      const { pipeline, layout } = kernel(name);
      return { pipeline, group: bind(`${i.id}, rank ${rank}`, layout, places, uniform), grid: gridOf(elements), of: origin(rank, name) };
    };
    /** Copies a block (first element, length) to a buffer of the same type, or rounds it to another type. */
    const block = (
      rank: number,
      from: BufferRange,
      at: number,
      fromType: Dtype,
      to: BufferRange,
      start: number,
      n: number,
      toType: Dtype,
    ): Step => {
      const [a, b, bytes] = [at * bytesOf[fromType], start * bytesOf[toType], n * bytesOf[toType]];
      if (fromType === toType && [a, b, bytes].every((x) => x % 4 === 0))
        return { from: { ...from, offset: from.offset + a, bytes }, to: { ...to, offset: to.offset + b, bytes } };
      return run(placing(fromType, toType), rank, [from, to], n, [at, start, n]);
    };
    const held = group.map((rank) => ({ rank, b: bufferOf(rank, i.from), at: place(rank, bufferOf(rank, i.from), copy) }));
    const wanted = group.map((rank) => ({ rank, b: bufferOf(rank, i.to), at: place(rank, bufferOf(rank, i.to), copy) }));
    const [from, to] = [held[0]!.b, wanted[0]!.b];
    const [n, m, g] = [elementsOf(from.shape), elementsOf(to.shape), group.length];
    const expected: Record<CollectiveKind, number> = {
      ...{ all_gather: n * g, reduce_scatter: n / g, all_to_all: n },
      ...{ all_reduce: n, all_reduce_max: n, shift: n },
    };
    if (m !== expected[i.how]) throw new Error(`rankc: ${i.id} is no ${i.how} of ${g} ranks: ${from.id} has ${n} elements, ${to.id} ${m}`);

    const reduction = reductionOf(i);
    if (reduction) {
      const total = { buffer: aside[0]!, offset: 0, bytes: 4 * n };
      const reduce = reductions(reduction, from.dtype, g).map((r, k) => {
        const part = held.slice(k * MOST_SOURCES, k * MOST_SOURCES + r.sources);
        return run(nameOf(r), part[0]!.rank, [...part.map(({ at }) => at), total], n);
      });
      const scatter = wanted.map(({ rank, at }, k) =>
        block(rank, total, i.how === "reduce_scatter" ? k * m : 0, "f32", at, 0, m, to.dtype),
      );
      return [...reduce, ...scatter];
    }
    const copies = held.map(({ at }, j): Copy => ({ from: at, to: { buffer: aside[j]!, offset: 0, bytes: at.bytes } }));
    if (i.how === "shift") return [...copies, ...wanted.map(({ at }, k): Copy => ({ from: copies[(k + g - 1) % g]!.to, to: at }))];
    const blocks = wanted.flatMap(({ rank, at }, k) =>
      copies.map(({ to: source }, j) =>
        block(rank, source, i.how === "all_to_all" ? (k * m) / g : 0, from.dtype, at, (j * m) / g, m / g, to.dtype),
      ),
    );
    return [...copies, ...blocks];
  }

  /** Created on first use; equal in every step. */
  const prepared = new Map<Collective, Map<string, Step[]>>();
  function perform(group: readonly number[], i: Collective, copy: number): void {
    const known = prepared.get(i) ?? new Map<string, Step[]>();
    prepared.set(i, known);
    const key = `${group[0]}|${copy}`;
    if (!known.has(key)) known.set(key, steps(i, group, copy));
    for (const s of known.get(key)!) {
      if ("pipeline" in s) commands.dispatch(s);
      else commands.copy(s.from, s.to);
    }
  }

  /** Message buffers for reuse, by size; reuse is safe because the device executes in order. */
  const read = new Map<number, GPUBuffer[]>();
  return inProcessComm<GPUBuffer>(plan, ranks, {
    perform,
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
