/**
 * The CPU backend, the reference: all ranks in this process, arenas as typed arrays, buffers at the plan's offsets, ops as the loops of
 * their declarations. bf16 and f16 buffers are converted to f32 when read and rounded when written.
 */

import { totalmem } from "node:os";
import { storeValues, type TypedMemory, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Buffer, BufferKind, Compute, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { activationBytes, activationStart } from "../../schemas/program.ts";
import { elementsOf, globalStart, numberInStage, shardCount, stageOfRank } from "../../schemas/sharding.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { ops } from "../../src/ops/index.ts";
import type { ShardContext } from "../../src/ops/op.ts";
import type { HostData, HostRankDevice, LocalRanks } from "../backend.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import { cpuComm } from "./comm.ts";

/** Opens all ranks of a plan on the CPU. Throws a Trouble (exit 3) if the plan needs more memory than this machine has. */
export function openCpu(plan: Plan, { profile = false } = {}): LocalRanks {
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
    rankDevice: (rank) => backends[rank]!,
    comm: cpuComm(plan, backends),
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
          if (found > limit.bound) throw capacityExceeded(limit, r, found);
        }
      }
    },
    async close() {},
  };
}

const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const noRows = new Int32Array(1);

function cpuBackend(plan: Plan, rank: number, times?: Timing[]): HostRankDevice {
  const stage = stageOfRank(plan.mesh, rank);
  const local = numberInStage(plan.mesh, rank);
  const program = plan.programs[stage]!;
  const memory = plan.memory[stage]!;
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const arenas: Record<BufferKind, ArrayBuffer> = {
    parameter: new ArrayBuffer(memory.parameter),
    gradient: new ArrayBuffer(memory.gradient),
    optimizer: new ArrayBuffer(memory.optimizer),
    activation: new ArrayBuffer(activationBytes(program, memory)),
    workspace: new ArrayBuffer(memory.workspace),
  };

  const raw = (b: Buffer, copy: number): TypedMemory => {
    const at = memory.offsets[b.id]! + (b.kind === "activation" ? activationStart(program, memory, b, copy) : 0);
    return typedMemory(b.dtype, arenas[b.kind], at, elementsOf(b.shape));
  };
  const peek = (b: Buffer, copy: number): HostData => valuesIn(raw(b, copy));
  const write = (b: Buffer, copy: number, data: HostData): void => storeValues(raw(b, copy), data);

  /** Binds an op to its buffers in one activation copy, once; the result runs for every microbatch. */
  function bind(i: Compute, copy: number): () => void {
    const op = ops[i.op];
    const names = [...Object.entries(i.reads), ...Object.entries(i.writes)];
    const of = (id: string) => buffers.get(id)!;
    const reads = Object.keys(i.reads).length;
    const d: Record<string, number> = { ...i.attrs };
    const starts: Record<string, number> = {};
    for (const [dim, [size, subAxes]] of Object.entries(i.dims)) {
      d[dim] = size / shardCount(plan.mesh, subAxes);
      starts[dim] = globalStart(plan.mesh, i, dim, local);
    }
    const ragged = names.map(([, id]) => of(id)).find((b) => b.ragged);
    const rows = ragged ? (raw(of(i.rows ?? ragged.rows!), copy).words as Int32Array) : noRows;
    const place: ShardContext = { start: (dim) => starts[dim]!, rows };
    const t: Record<string, Float32Array> = {};
    const before: (() => void)[] = [];
    const after: (() => void)[] = [];
    for (const [at, [name, id]] of names.entries()) {
      const output = at >= reads;
      const accumulates = output && i.accumulates?.includes(name);
      const own = raw(of(id), copy);
      const view = own.codec ? new Float32Array(own.words.length) : (own.words as Float32Array);
      t[name] = view;
      if (own.codec && (!output || accumulates)) before.push(() => own.codec.decode(view, own.words));
      if (output && !accumulates) before.push(() => view.fill(0));
      if (own.codec && output) after.push(() => own.codec.encode(own.words, view));
    }
    const bound = ragged?.shape[0] ?? 0;
    return () => {
      for (const f of before) f();
      if (i.rows) {
        const needed = op.rows!(t, d, place, rows, bound);
        if (needed > bound) throw capacityExceeded({ needed: i.id, bound, of: "rows" }, rank, needed);
      }
      op.cpu(t, d, place);
      for (const f of after) f();
    };
  }

  const bound = new Map<Compute, (() => void)[]>();
  return {
    zeroGradients: () => new Uint8Array(arenas.gradient).fill(0),
    compute(i, copy) {
      const copies = bound.get(i) ?? [];
      bound.set(i, copies);
      const run = (copies[copy] ??= bind(i, copy));
      const begin_us = performance.now() * 1e3;
      run();
      times?.push({ rank, stream: "compute", id: i.id, op: i.op, begin_us, end_us: performance.now() * 1e3 });
    },
    peek,
    read: async (b, copy) => peek(b, copy).slice(),
    write,
  };
}
