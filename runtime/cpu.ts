/**
 * The CPU backend, the reference: one rank's arenas as typed arrays, every buffer at the place the plan gives it, every op
 * by its declaration's plain loops. bf16 buffers hold bf16: values are widened when read and rounded when stored.
 */
import { elementsOf, parts, startOf } from "../schemas/layout.ts";
import type { Buffer, Compute, Kind, Plan } from "../schemas/plan.ts";
import { Trouble } from "../schemas/trouble.ts";
import { ops } from "../src/ops/index.ts";
import type { Place } from "../src/ops/op.ts";
import type { Backend, HostData } from "./backend.ts";
import { fromBf16, toBf16 } from "./bf16.ts";

const noRows = new Int32Array(1);

export function cpuBackend(plan: Plan, rank: number): Backend {
  const stage = Math.floor(rank / plan.mesh.per_stage);
  const local = rank % plan.mesh.per_stage;
  const program = plan.programs[stage]!;
  const memory = plan.memory[stage]!;
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const arenas: Record<Kind, ArrayBuffer> = {
    parameter: new ArrayBuffer(memory.parameter),
    gradient: new ArrayBuffer(memory.gradient),
    optimizer: new ArrayBuffer(memory.optimizer),
    activation: new ArrayBuffer(memory.activation * program.slots),
    workspace: new ArrayBuffer(memory.workspace),
  };

  const raw = (b: Buffer, slot: number): Float32Array | Int32Array | Uint16Array => {
    const at = memory.offsets[b.id]! + (b.kind === "activation" ? slot * memory.activation : 0);
    const Type = b.dtype === "f32" ? Float32Array : b.dtype === "i32" ? Int32Array : Uint16Array;
    return new Type(arenas[b.kind], at, elementsOf(b.shape));
  };
  const read = (b: Buffer, slot: number): HostData => {
    const data = raw(b, slot);
    if (!(data instanceof Uint16Array)) return data;
    const wide = new Float32Array(data.length);
    fromBf16(wide, data);
    return wide;
  };
  const write = (b: Buffer, slot: number, data: HostData): void => {
    const own = raw(b, slot);
    if (own instanceof Uint16Array) toBf16(own, data as Float32Array);
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
      starts[dim] = startOf(plan.mesh, size, cut, local);
    }
    const rowsId = i.rows ?? names.map(([, id]) => of(id).rows).find((r) => r);
    const rows = rowsId ? (raw(of(rowsId), slot) as Int32Array) : noRows;
    const place: Place = { start: (dim) => starts[dim]!, rows };
    const t: Record<string, Float32Array> = {};
    const widen: (() => void)[] = [];
    const clear: (() => void)[] = [];
    const round: (() => void)[] = [];
    for (const [at, [name, id]] of names.entries()) {
      const output = at >= reads;
      const keeps = output && i.keeps?.includes(name);
      const own = raw(of(id), slot);
      const view = own instanceof Uint16Array ? new Float32Array(own.length) : (own as Float32Array);
      t[name] = view;
      if (own instanceof Uint16Array && (!output || keeps)) widen.push(() => fromBf16(view, own));
      if (output && !keeps) clear.push(() => view.fill(0));
      if (own instanceof Uint16Array && output) round.push(() => toBf16(own, view));
    }
    const bound = (rows.length - 1) / 3;
    return () => {
      for (const f of widen) f();
      for (const f of clear) f();
      if (i.rows) {
        const needed = op.rows!(t, d, place, rows, bound);
        if (needed > bound) throw rowsOverflow(i.id, rank, needed, bound);
      }
      op.cpu(t, d, place);
      for (const f of round) f();
    };
  }

  const bound = new Map<Compute, (() => void)[]>();
  return {
    zeroGradients: () => new Uint8Array(arenas.gradient).fill(0),
    compute(i, slot) {
      const slots = bound.get(i) ?? [];
      bound.set(i, slots);
      (slots[slot] ??= bind(i, slot))();
    },
    read,
    write,
  };
}

/** A static bound of rows was too small for what the router chose: nothing is dropped in silence. */
export const rowsOverflow = (id: string, rank: number, needed: number, bound: number): Trouble =>
  new Trouble(
    `${id}, rank ${rank}: the router sent ${needed} rows, and the plan holds at most ${bound}`,
    "raise model.moe.rows_bound (or write `worst`), and compile again",
  );
