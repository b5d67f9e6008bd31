/**
 * The CPU, the reference: all ranks in this process, each with its arenas as typed arrays, every buffer at the place the plan
 * gives it, every op by its declaration's plain loops. bf16 and f16 buffers hold halves: values are widened when read and
 * rounded when stored.
 */
import { totalmem } from "node:os";
import type { Buffer, Compute, Kind, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { activationBytes, activationStart } from "../../schemas/program.ts";
import { elementsOf, numberInStage, parts, stageOfRank, startIn } from "../../schemas/sharding.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { ops } from "../../src/ops/index.ts";
import type { Place } from "../../src/ops/op.ts";
import type { Fleet, HostData, OpenBackend } from "../backend.ts";
import { overBound } from "../capacityExceeded.ts";
import { narrow, widen } from "../float16.ts";
import { loopback } from "./comm.ts";

export function openCpu(plan: Plan, { profile = false } = {}): Fleet {
  const { world, per_stage } = plan.mesh;
  const needed = plan.memory.reduce((sum, m) => sum + m.peak * per_stage, 0);
  if (needed > totalmem())
    throw new Trouble(
      `${printable(plan.job.name)} does not fit this machine: its ${world} ranks need ${gib(needed)}, and one process on the CPU holds them all; there are ${gib(totalmem())}`,
      "run it on the machines it was compiled for, or make the model smaller",
      3,
    );
  const taken: Timing[] = [];
  const ranks = Array.from({ length: world }, (_, r) => r);
  const backends = ranks.map((r) => cpuBackend(plan, r, profile ? taken : undefined));

  return {
    ranks,
    backend: (rank) => backends[rank]!,
    comm: loopback(plan, backends),
    beginStep() {
      taken.length = 0;
      return false;
    },
    profile: () => [...taken],
    async finish() {
      for (const r of ranks) {
        const { bounds, buffers } = plan.programs[stageOfRank(plan.mesh, r)]!;
        for (const limit of bounds) {
          const found = backends[r]!.peek(buffers.find((b) => b.id === limit.needed)!, 0)[0]!;
          if (found > limit.bound) throw overBound(limit, r, found);
        }
      }
    },
    async close() {},
  };
}

const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const noRows = new Int32Array(1);

function cpuBackend(plan: Plan, rank: number, times?: Timing[]): OpenBackend {
  const stage = stageOfRank(plan.mesh, rank);
  const local = numberInStage(plan.mesh, rank);
  const program = plan.programs[stage]!;
  const memory = plan.memory[stage]!;
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const arenas: Record<Kind, ArrayBuffer> = {
    parameter: new ArrayBuffer(memory.parameter),
    gradient: new ArrayBuffer(memory.gradient),
    optimizer: new ArrayBuffer(memory.optimizer),
    activation: new ArrayBuffer(activationBytes(program, memory)),
    workspace: new ArrayBuffer(memory.workspace),
  };

  const raw = (b: Buffer, slot: number): Float32Array | Int32Array | Uint16Array => {
    const at = memory.offsets[b.id]! + (b.kind === "activation" ? activationStart(program, memory, b, slot) : 0);
    const Type = b.dtype === "f32" ? Float32Array : b.dtype === "i32" ? Int32Array : Uint16Array;
    return new Type(arenas[b.kind], at, elementsOf(b.shape));
  };
  const peek = (b: Buffer, slot: number): HostData => {
    const data = raw(b, slot);
    if (!(data instanceof Uint16Array)) return data;
    const wide = new Float32Array(data.length);
    widen(b.dtype, wide, data);
    return wide;
  };
  const write = (b: Buffer, slot: number, data: HostData): void => {
    const own = raw(b, slot);
    if (own instanceof Uint16Array) narrow(b.dtype, own, data as Float32Array);
    else own.set(data);
  };

  /** An op bound to its buffers in one slot; made once, run every microbatch. */
  function bind(i: Compute, slot: number): () => void {
    const op = ops[i.op]!;
    const names = [...Object.entries(i.reads), ...Object.entries(i.writes)];
    const of = (id: string) => buffers.get(id)!;
    const reads = Object.keys(i.reads).length;
    const d: Record<string, number> = { ...i.attrs };
    const starts: Record<string, number> = {};
    for (const [dim, [size, cut]] of Object.entries(i.dims)) {
      d[dim] = size / parts(plan.mesh, cut);
      starts[dim] = startIn(plan.mesh, i, dim, local);
    }
    const ragged = names.map(([, id]) => of(id)).find((b) => b.ragged);
    const rows = ragged ? (raw(of(i.rows ?? ragged.rows!), slot) as Int32Array) : noRows;
    const place: Place = { start: (dim) => starts[dim]!, rows };
    const t: Record<string, Float32Array> = {};
    const before: (() => void)[] = [];
    const after: (() => void)[] = [];
    for (const [at, [name, id]] of names.entries()) {
      const output = at >= reads;
      const keeps = output && i.keeps?.includes(name);
      const own = raw(of(id), slot);
      const half = own instanceof Uint16Array;
      const view = half ? new Float32Array(own.length) : (own as Float32Array);
      t[name] = view;
      if (half && (!output || keeps)) before.push(() => widen(of(id).dtype, view, own));
      if (output && !keeps) before.push(() => view.fill(0));
      if (half && output) after.push(() => narrow(of(id).dtype, own, view));
    }
    const bound = ragged?.shape[0] ?? 0;
    return () => {
      for (const f of before) f();
      if (i.rows) {
        const needed = op.rows!(t, d, place, rows, bound);
        if (needed > bound) throw overBound({ needed: i.id, bound, of: "rows" }, rank, needed);
      }
      op.cpu(t, d, place);
      for (const f of after) f();
    };
  }

  const bound = new Map<Compute, (() => void)[]>();
  return {
    zeroGradients: () => new Uint8Array(arenas.gradient).fill(0),
    compute(i, slot) {
      const slots = bound.get(i) ?? [];
      bound.set(i, slots);
      const run = (slots[slot] ??= bind(i, slot));
      const begin_us = performance.now() * 1e3;
      run();
      times?.push({ rank, stream: "compute", id: i.id, op: i.op, begin_us, end_us: performance.now() * 1e3 });
    },
    peek,
    read: async (b, slot) => peek(b, slot).slice(),
    write,
  };
}
