/**
 * Rows of tokens in parts: buffers for a part of a shard, or of rows that lie part by part, and the copies between that order and the order
 * of the sequence.
 */
import type { Collective, Compute, Instruction } from "../../../schemas/plan.ts";
import { elementsOf, shardCount } from "../../../schemas/sharding.ts";
import type { BufferTable } from "../../analysis/bufferTable.ts";
import { bytesSent } from "../../analysis/cost.ts";
import { ops } from "../../ops/index.ts";
import { arrange } from "../../ops/rearrange.ts";
import { arrangement, isSameMemory, type MemoryAxis } from "../collectives/memoryAxes.ts";
import { computeInstruction } from "../computeInstruction.ts";
import { ALIGN } from "../memory.ts";
import type { Mesh } from "../mesh.ts";

/** The sizes of an exchange: local tokens [sequences, positions], ranks, and rows of one rank in a part. */
export interface TokenParts {
  readonly sequences: number;
  readonly positions: number;
  readonly ranks: number;
  readonly rows: number;
}

/** Returns the axes of rows that lie part by part, and those of rows in the order of the sequence. */
export function ordersOf({ sequences, positions, ranks, rows }: TokenParts, width: number): Record<"parts" | "sequence", MemoryAxis[]> {
  const axis = (dim: number, size: number): MemoryAxis => ({ kind: "dim", dim, size });
  const inner = axis(4, Math.min(rows, positions) * width);
  const rank = axis(1, ranks);
  const [outer, between] = rows < positions ? [sequences, positions / rows] : [(sequences * positions) / rows, rows / positions];
  const [first, second] = [axis(0, outer), axis(2, between)];
  return {
    parts: rows < positions ? [first, second, rank, inner] : [first, rank, second, inner],
    sequence: rows < positions ? [first, rank, second, inner] : [first, second, rank, inner],
  };
}

/** Returns the names of the operands of an op with a row for each token; undefined if an operand has tokens in another place. */
function rowOperandsOf({ op, reads, writes }: Compute): string[] {
  const { inputs, outputs } = ops[op];
  const own = [...inputs, ...outputs].filter(({ name }) => reads[name] !== undefined || writes[name] !== undefined);
  return own.flatMap(({ name, any, dimSpecs }) => (any || (dimSpecs[0]?.dim === "B" && dimSpecs[1]?.dim === "S") ? [name] : []));
}

/** Adds buffers for parts of rows, and makes the instructions of parts. */
export class RowParts {
  readonly buffers: BufferTable;
  readonly mesh: Mesh;
  /** Per buffer in the order of the sequence, the one whose rows lie part by part. */
  readonly #inParts = new Map<string, { readonly id: string; readonly tokens: TokenParts }>();

  constructor(buffers: BufferTable, mesh: Mesh) {
    this.buffers = buffers;
    this.mesh = mesh;
  }

  /** Returns whether parts of so many rows of a buffer begin where memory is aligned. */
  isAligned(id: string, rows: number): boolean {
    const { shape } = this.buffers.get(id);
    return ((this.buffers.bytesOf(id) / elementsOf(shape)) * (shape.at(-1) ?? 0) * rows) % ALIGN === 0;
  }

  /** Returns the buffer of rows that lie part by part, if there is one with these parts. */
  known(id: string, tokens: TokenParts): string | undefined {
    const found = this.#inParts.get(id);
    return found && JSON.stringify(found.tokens) === JSON.stringify(tokens) ? found.id : undefined;
  }

  /** Returns a buffer to which rows are written part by part, with the copy to the order of the sequence. */
  written(id: string, tokens: TokenParts): { readonly id: string; readonly copy: readonly Instruction[] } {
    const { parts, sequence } = this.#ordersOf(id, tokens);
    const isSame = isSameMemory(parts, sequence);
    const from = isSame ? id : this.workspace(`${id}.parts`, id, this.#rowsOf(id));
    this.#inParts.set(id, { id: from, tokens });
    return { id: from, copy: isSame ? [] : [this.#arranged(`${id}.in_sequence`, from, parts, id, sequence)] };
  }

  /** Returns a buffer from which an instruction reads rows part by part, with the copy from the order of the sequence. */
  read(by: Compute, id: string, tokens: TokenParts): { readonly id: string; readonly copy: readonly Instruction[] } {
    const known = this.known(id, tokens);
    if (known !== undefined) return { id: known, copy: [] };
    const { parts, sequence } = this.#ordersOf(id, tokens);
    if (isSameMemory(parts, sequence)) return { id, copy: [] };
    const to = this.workspace(`${by.id}.x.parts`, id, this.#rowsOf(id));
    return { id: to, copy: [this.#arranged(`${by.id}.in_parts`, id, sequence, to, parts)] };
  }

  /** Adds workspace for rows like those of a buffer. Returns its id. */
  workspace(id: string, like: string, rows: number): string {
    const { dtype, shape, sizes, shardedBy, partial, layer } = this.buffers.get(like);
    return this.buffers.add({
      ...{ id, kind: "workspace", dtype, shape: [1, rows, shape.at(-1) ?? 0], sizes: [1, rows, sizes.at(-1) ?? 0], ragged: 0 },
      shardedBy: [[], [], [...(shardedBy.at(-1) ?? [])]],
      ...(partial && { partial: [...partial] }),
      ...(layer !== undefined && { layer }),
    });
  }

  /** Adds a part of the rows of a buffer. Returns its id. */
  part(of: string, n: number, rows: number): string {
    const { kind, chunk } = this.buffers.get(of);
    const id = `${of}.rows${n}`;
    if (this.buffers.has(id)) return id;
    const own = this.buffers.get(this.workspace(id, of, rows));
    const part = { of, at: n * elementsOf(own.shape) };
    this.buffers.delete(id);
    return this.buffers.add({ ...own, kind, ...(chunk !== undefined && { chunk }), part });
  }

  /** Returns a part of an exchange. */
  exchanged(i: Collective, n: number, from: string, to: string): Collective {
    const bytes = bytesSent(i.how, shardCount(this.mesh, i.subAxes), this.buffers.bytesOf(from), this.buffers.bytesOf(to));
    return { ...i, id: `${i.id}.part${n}`, stream: "tensor", from, to, bytes };
  }

  /** Returns an op on so many rows, with other buffers for those of its operands that have rows. */
  computed(i: Compute, id: string, rows: number, bufferOf: (buffer: string) => string): Compute {
    const names = new Set(rowOperandsOf(i));
    const renamed = (all: Compute["reads"]): Compute["reads"] =>
      Object.fromEntries(Object.entries(all).map(([name, buffer]) => [name, names.has(name) ? bufferOf(buffer) : buffer]));
    const dims: Compute["dims"] = { ...i.dims, ...(i.dims.B && { B: [1, []] }), ...(i.dims.S && { S: [rows, []] }) };
    return { ...i, id, reads: renamed(i.reads), writes: renamed(i.writes), dims };
  }

  /** Returns the buffers of the operands of an instruction that have a row for each token. */
  rowBuffers(i: Compute): string[] {
    return rowOperandsOf(i).flatMap((name) => i.reads[name] ?? i.writes[name] ?? []);
  }

  #ordersOf(id: string, tokens: TokenParts): ReturnType<typeof ordersOf> {
    return ordersOf(tokens, this.buffers.get(id).shape.at(-1) ?? 0);
  }
  #rowsOf(id: string): number {
    const { shape } = this.buffers.get(id);
    return elementsOf(shape) / (shape.at(-1) ?? 1);
  }

  #arranged(id: string, from: string, have: readonly MemoryAxis[], to: string, want: readonly MemoryAxis[]): Instruction {
    const { attrs } = arrangement(this.mesh, have, want, []);
    const length = this.buffers.lengthOf(from);
    const dims: Compute["dims"] = { I: [length, []], O: [length, []] };
    return computeInstruction({ op: arrange, id, reads: { x: from }, writes: { y: to }, dims, attrs: { ...attrs } });
  }
}
