/** Emitter: the instruction list that replaces a block's reshard steps, and the temporary buffers that they need. */

import type { Dtype } from "../../../schemas/dtypes.ts";
import type { Buffer, CollectiveKind, Compute, Instruction } from "../../../schemas/plan.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import { bytesSent } from "../../analysis/cost.ts";
import { type AnyOp, invariant } from "../../ops/op.ts";
import { arrange } from "../../ops/rearrange.ts";
import { computeInstruction } from "../computeInstruction.ts";
import type { Mesh } from "../mesh.ts";
import type { ProgramBuilder, Reshard } from "../programBuilder.ts";
import { arrangement, type MemoryAxis } from "./memoryAxes.ts";

/** An op between buffers: its attributes and the dims that its operands do not determine. */
export interface TransportStep {
  readonly op: AnyOp;
  readonly id: string;
  readonly reads: Readonly<Record<string, string>>;
  readonly writes: Readonly<Record<string, string>>;
  readonly attrs?: Readonly<Record<string, number>>;
  readonly dims?: Compute["dims"];
  readonly blocks?: NonNullable<Compute["blocks"]>;
}

/** Emits collectives, copies and temporary buffers of one block. */
export class Emitter {
  readonly mesh: Mesh;
  /** The bound on rows of experts: `worst`, or a factor of the balanced load. */
  readonly rowsBound: "worst" | number;
  /** Index buffers that an instruction has written. The place of a row depends on routing and sharding only. */
  readonly indexed = new Set<string>();
  readonly #role: ProgramBuilder;
  /** The layer of the reshard step that is lowered, and of its temporary buffers. */
  #layer: Pick<Buffer, "layer"> = {};
  #list: Instruction[] = [];

  constructor(role: ProgramBuilder) {
    this.#role = role;
    this.mesh = role.mesh;
    this.rowsBound = role.job.model.moe?.rows_bound ?? "worst";
  }

  /** Returns the instructions that `fill` emits. */
  collect(fill: () => void): Instruction[] {
    this.#list = [];
    fill();
    return this.#list;
  }
  emit(i: Instruction): void {
    this.#list.push(i.kind === "compute" ? this.#indexOnce(i) : i);
  }
  buffer(id: string): Buffer {
    return this.#role.buffers.get(id);
  }
  /** Says which reshard step the following instructions replace. */
  begin({ to }: Pick<Reshard, "to">): void {
    const { layer } = this.buffer(to);
    this.#layer = layer === undefined ? {} : { layer };
  }
  /** Returns the layout in the name of an index of rows. */
  layoutOf(rows: string): string {
    return this.#role.rowLayout(rows);
  }
  lengthOf(id: string): number {
    return this.#role.buffers.lengthOf(id);
  }
  /** Adds a replicated workspace buffer. Returns its id. */
  temporary(id: string, dtype: Dtype, shape: readonly number[]): string {
    const shardedBy = shape.map(() => []);
    const sizes = { shape: [...shape], sizes: [...shape], ragged: 0, shardedBy };
    return this.#role.buffers.add({ id, kind: "workspace", dtype, ...sizes, ...this.#layer });
  }
  /** Returns the operand that receives the number of rows that `id` needed, if rows are bounded. */
  overflow(id: string, most: number): Record<string, string> {
    return this.rowsBound === "worst" ? {} : { needed: this.#role.needed(id, most, this.#layer) };
  }

  /** Emits an op. A buffer counts as one dim, whatever its shape. */
  compute({ op, id, reads, writes, attrs = {}, dims: own = {}, blocks = [] }: TransportStep): void {
    const dims: Compute["dims"] = { ...own };
    for (const { name, dimSpecs } of [...op.inputs, ...op.outputs]) {
      const [spec] = dimSpecs;
      const buffer = reads[name] ?? writes[name];
      if (spec && buffer !== undefined) dims[spec.dim] = [this.lengthOf(buffer), []];
    }
    this.#list.push(computeInstruction({ op, id, reads: { ...reads }, writes: { ...writes }, dims, attrs: { ...attrs }, blocks }));
  }
  /** Copies a buffer into other axes (`arrangement`). */
  rearrange(
    id: string,
    from: string,
    have: readonly MemoryAxis[],
    to: string,
    want: readonly MemoryAxis[],
    pick: readonly number[] = [],
  ): void {
    this.compute({ op: arrange, id, reads: { x: from }, writes: { y: to }, ...arrangement(this.mesh, have, want, pick) });
  }
  /** Emits the collective of a reshard step, between contiguous buffers. */
  collective({ blockAxes: _, ...i }: Reshard, how: CollectiveKind, { id, from, to, name = i.name }: Ends): void {
    const { buffers } = this.#role;
    const members = i.world ? this.mesh.world : shardCount(this.mesh, i.subAxes);
    const bytes = bytesSent(how, members, buffers.bytesOf(from), buffers.bytesOf(to));
    this.#list.push({ ...i, kind: "collective", how, id, name, from, to, bytes });
  }

  /**
   * Removes the index output of all but the first op of one routing: they share the index. Ops of lists keep it: it tells which of their two
   * kinds of rows they make.
   */
  #indexOnce(i: Compute): Compute {
    if (i.rows === undefined) return i;
    const { rows, ...rest } = i;
    if (this.indexed.has(rows)) return Object.values(i.reads).some((id) => this.buffer(id).ragged > 0) ? i : rest;
    this.indexed.add(rows);
    const ragged = Object.values(i.writes)
      .map((id) => this.buffer(id))
      .find((b) => b.ragged > 0);
    invariant(ragged !== undefined, () => `${i.id} writes an index and no rows`);
    this.begin({ to: rows });
    this.overflow(rows, ragged.shape[0] ?? 0);
    return i;
  }
}

interface Ends {
  readonly id: string;
  readonly from: string;
  readonly to: string;
  readonly name?: string;
}
