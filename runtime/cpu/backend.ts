/**
 * The CPU backend, the reference: all ranks in this process, arenas as typed arrays, buffers at the plan's offsets, ops as the loops of
 * their declarations. bf16 and f16 buffers are converted to f32 when read and rounded when written.
 */

import { totalmem } from "node:os";
import { storeValues, type TypedMemory, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import { raggedOperandOf } from "../../schemas/effects.ts";
import type { Buffer, BufferKind, Compute, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { activationBytes, activationStart } from "../../schemas/program.ts";
import { blockStart, elementsOf, globalStart, numberInStage, shardCount } from "../../schemas/sharding.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { ops } from "../../src/ops/index.ts";
import { drawElements, type ElementWords, normalTable } from "../../src/ops/normalDraw.ts";
import type { ShardContext } from "../../src/ops/op.ts";
import type { AsyncNeeds } from "../asyncCollectives.ts";
import type { HostData, HostRankDevice, LocalRanks, NormalDraw } from "../backend.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import { RankPrograms, type StageProgram } from "../rankPrograms.ts";
import { cpuComm } from "./comm.ts";

/** Settings of `openCpu`. `profile`: time each op. `isHeld`: which asynchronous collectives to leave until a rank waits for them. */
export interface CpuSettings extends Pick<AsyncNeeds, "isHeld"> {
  readonly profile?: boolean;
}

/** Opens all ranks of a plan on the CPU. Throws a Trouble (exit 3) if the plan needs more memory than this machine has. */
export function openCpu(plan: Plan, { profile = false, isHeld }: CpuSettings = {}): LocalRanks {
  const { world, per_stage } = plan.mesh;
  const needed = plan.memory.reduce((sum, m) => sum + m.peak * per_stage, 0);
  if (needed > totalmem())
    throw new Trouble(
      `${printable(plan.job.name)} does not fit this machine: its ${world} ranks need ${gib(needed)}, and one process on the CPU holds them all; there are ${gib(totalmem())}`,
      "run it on the machines it was compiled for, or make the model smaller",
      3,
    );
  const taken: Timing[] = [];
  const ranks = Array.from({ length: world }, (_, rank) => rank);
  const programs = new RankPrograms(plan);
  const devices = ranks.map((rank) => new CpuRankDevice(plan, rank, programs.of(rank), profile ? taken : undefined));
  const deviceOf = (rank: number): CpuRankDevice => {
    const device = devices[rank];
    if (!device) throw new Error(`rankc: the plan has no rank ${rank}`);
    return device;
  };
  return {
    ranks,
    rankDevice: deviceOf,
    comm: cpuComm(plan, deviceOf, isHeld),
    beginStep() {
      taken.length = 0;
      return false;
    },
    profile: () => [...taken],
    async finish() {
      for (const device of devices) device.expectWithinBounds();
    },
    async close() {},
  };
}

const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const noRows = new Int32Array(1);

/** An op bound to its buffers in one activation copy. */
type BoundOp = () => void;

/** The memory and the ops of one rank. */
class CpuRankDevice implements HostRankDevice {
  readonly #plan: Plan;
  readonly #rank: number;
  readonly #stage: StageProgram;
  readonly #times: Timing[] | undefined;
  readonly #arenas: Readonly<Record<BufferKind, ArrayBuffer>>;
  readonly #bound = new Map<Compute, BoundOp[]>();

  /** `times`: receives the time of each op. */
  constructor(plan: Plan, rank: number, stage: StageProgram, times: Timing[] | undefined) {
    const { program, memory } = stage;
    this.#plan = plan;
    this.#rank = rank;
    this.#stage = stage;
    this.#times = times;
    this.#arenas = {
      parameter: new ArrayBuffer(memory.parameter),
      gradient: new ArrayBuffer(memory.gradient),
      optimizer: new ArrayBuffer(memory.optimizer),
      activation: new ArrayBuffer(activationBytes(program, memory)),
      workspace: new ArrayBuffer(memory.workspace),
    };
  }

  zeroGradients(): void {
    new Uint8Array(this.#arenas.gradient).fill(0);
  }

  compute(i: Compute, copy: number): void {
    const copies = this.#bound.get(i) ?? [];
    this.#bound.set(i, copies);
    const run = (copies[copy] ??= this.#bind(i, copy));
    const begin_us = performance.now() * 1e3;
    run();
    this.#times?.push({ rank: this.#rank, stream: "compute", id: i.id, op: i.op, begin_us, end_us: performance.now() * 1e3 });
  }

  peek(b: Buffer, copy: number): HostData {
    return valuesIn(this.#raw(b, copy));
  }

  async read(b: Buffer, copy: number): Promise<HostData> {
    return this.peek(b, copy).slice();
  }

  write(b: Buffer, copy: number, data: HostData): void {
    storeValues(this.#raw(b, copy), data);
  }

  draw(buffers: readonly Buffer[], { key, std, box }: NormalDraw): void {
    for (const b of buffers) {
      const { words } = this.#raw(b, 0);
      const table = normalTable(std, b.dtype);
      const out = (words instanceof Float32Array ? new Int32Array(words.buffer, words.byteOffset, words.length) : words) as ElementWords;
      for (let row = 0; row < box.rows; row++) {
        const start = box.base + Math.floor(row / box.height) * box.planeStride + (row % box.height) * box.rowStride;
        drawElements(out.subarray(row * box.width, (row + 1) * box.width), table, key, start);
      }
    }
  }

  /** Throws a Trouble if a step had more rows than a buffer has room for. */
  expectWithinBounds(): void {
    for (const limit of this.#stage.program.bounds) {
      const [found] = this.peek(this.#stage.buffer(limit.needed), 0);
      if (found !== undefined && found > limit.bound) throw capacityExceeded(limit, this.#rank, found);
    }
  }

  #raw(b: Buffer, copy: number): TypedMemory {
    const { program, memory } = this.#stage;
    const at = this.#stage.offset(b.id) + (b.kind === "activation" ? activationStart(program, memory, b, copy) : 0);
    return typedMemory(b.dtype, this.#arenas[b.kind], at, elementsOf(b.shape));
  }

  /** Binds an op to its buffers in one activation copy, once; the result runs for every microbatch. */
  #bind(i: Compute, copy: number): BoundOp {
    if (i.tensors !== undefined) {
      const each = membersOf(i).map((one) => this.#bind(one, copy));
      return () => {
        for (const run of each) run();
      };
    }
    const op = ops[i.op];
    const { sizes, starts, block } = this.#localDims(i);
    const operands = [
      ...Object.entries(i.reads).map(([name, id]) => ({ name, id, output: false })),
      ...Object.entries(i.writes).map(([name, id]) => ({ name, id, output: true })),
    ];
    const ragged = raggedOperandOf(i, { get: (id) => this.#stage.buffer(id) });
    const counts = ragged?.rows;
    const rows = counts === undefined ? noRows : (this.#raw(this.#stage.buffer(counts), copy).words as Int32Array);
    const place: ShardContext = { start: (dim) => starts[dim]!, rows, block };
    const tensors: Record<string, Float32Array> = {};
    const before: BoundOp[] = [];
    const after: BoundOp[] = [];
    for (const { name, id, output } of operands) {
      const accumulates = output && i.accumulates?.includes(name);
      const own = this.#raw(this.#stage.buffer(id), copy);
      const view = own.codec ? new Float32Array(own.words.length) : (own.words as Float32Array);
      tensors[name] = view;
      if (own.codec && (!output || accumulates)) before.push(() => own.codec.decode(view, own.words));
      if (output && !accumulates) before.push(() => view.fill(0));
      if (own.codec && output) after.push(() => own.codec.encode(own.words, view));
    }
    const bound = ragged?.shape[0] ?? 0;
    return () => {
      for (const f of before) f();
      if (i.rows) {
        const needed = op.rows!(tensors, sizes, place, rows, bound);
        if (needed > bound) throw capacityExceeded({ needed: i.id, bound, of: "rows" }, this.#rank, needed);
      }
      op.cpu(tensors, sizes, place);
      for (const f of after) f();
    };
  }

  /** Returns the sizes of this rank's shards of the dims, with the attributes of the op, and where the shards begin. */
  #localDims(i: Compute): {
    readonly sizes: Record<string, number>;
    readonly starts: Readonly<Record<string, number>>;
    readonly block: number;
  } {
    const { mesh } = this.#plan;
    const local = numberInStage(mesh, this.#rank);
    const sizes: Record<string, number> = { ...i.attrs };
    const starts: Record<string, number> = {};
    for (const [dim, [size, subAxes]] of Object.entries(i.dims)) {
      sizes[dim] = size / shardCount(mesh, subAxes);
      starts[dim] = globalStart(mesh, i, dim, local);
    }
    return { sizes, starts, block: blockStart(mesh, i, local) };
  }
}
