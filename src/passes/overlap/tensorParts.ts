/**
 * Products beside the exchanges of sequence parallelism, in forward. An all-gather and the products that read it, and a product and its
 * reduce-scatter, are divided into parts of as many tokens. While one part is exchanged, the products of another run: all but the first part
 * of an all-gather and the last of a reduce-scatter are hidden. A part has tokens of all ranks, so between the products and the exchanges
 * rows lie part by part; `arrange` copies them to and from the order of the sequence, where a part is less than a sequence. Each row of a
 * product is a sum of its own, so all numbers stay.
 */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Buffer, Chunk, Collective, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { blocksOf } from "../../../schemas/program.ts";
import { elementsOf, shardCount } from "../../../schemas/sharding.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { bytesSent } from "../../analysis/cost.ts";
import { gemm } from "../../ops/gemm.ts";
import { arrange } from "../../ops/rearrange.ts";
import { arrangement, isSameMemory, type MemoryAxis } from "../collectives/memoryAxes.ts";
import { computeInstruction } from "../computeInstruction.ts";
import { ALIGN } from "../memory.ts";
import type { Mesh } from "../mesh.ts";
import { withWaits } from "./buckets.ts";
import { type Dependencies, dependenciesOf } from "./expertOverlap.ts";
import { besideOthers, isTensorExchange } from "./tensorOverlap.ts";

/** Returns a program whose exchanges between tensor ranks in forward, and the products beside them, have `count` parts each. */
export function splitProducts(program: Program, mesh: Mesh, count: number): Program {
  const buffers = new BufferTable(program.buffers);
  const before = new Set(program.buffers.map(({ id }) => id));
  const chunks = program.chunks.map((c): Chunk => ({ ...c, forward: new PartSplitter(c.forward, buffers, mesh, count).split() }));
  const split = { ...program, chunks };
  const used = new Set(blocksOf(split).flatMap(({ instructions }) => instructions.flatMap((i) => [...touchedBy(i, buffers)])));
  const isHeld = (b: Buffer): boolean => used.has(b.id) || !before.has(b.id) || b.kind !== "workspace";
  // a part follows its whole
  return { ...split, buffers: [...buffers.values()].filter(isHeld) };
}

/** The sizes of an exchange: local tokens [sequences, positions], ranks, and rows of one rank in a part. */
interface Tokens {
  readonly sequences: number;
  readonly positions: number;
  readonly ranks: number;
  readonly rows: number;
}
/** Returns the axes of rows that lie part by part, and those of rows in the order of the sequence. */
function ordersOf({ sequences, positions, ranks, rows }: Tokens, width: number): Record<"parts" | "sequence", MemoryAxis[]> {
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

/** Divides the exchanges of one block. */
class PartSplitter {
  readonly #block: readonly Instruction[];
  readonly #buffers: BufferTable;
  readonly #mesh: Mesh;
  readonly #count: number;
  readonly #dependencies: Dependencies;
  readonly #isBeside: readonly boolean[];
  /** Per instruction what stands in its place. */
  readonly #replaced = new Map<Instruction, readonly Instruction[]>();

  constructor(block: readonly Instruction[], buffers: BufferTable, mesh: Mesh, count: number) {
    this.#block = block;
    this.#buffers = buffers;
    this.#mesh = mesh;
    this.#count = count;
    this.#dependencies = dependenciesOf(block, buffers);
    this.#isBeside = besideOthers(block);
  }

  /** Returns the block with divided exchanges. */
  split(): Instruction[] {
    for (const [at, i] of this.#block.entries()) {
      if (!isTensorExchange(i) || this.#isBeside[at]) continue;
      if (i.how === "all_gather") this.#splitGather(at, i);
      else this.#splitScatter(at, i);
    }
    if (this.#replaced.size === 0) return [...this.#block];
    return withWaits(
      this.#block.flatMap((i) => this.#replaced.get(i) ?? [i]),
      [],
      this.#buffers,
    );
  }

  /** Returns the tokens of an exchange whose shard is a buffer; undefined if they have no such parts. */
  #tokensOf({ subAxes }: Collective, shard: string, whole: string): Tokens | undefined {
    const [{ shape, ragged, layer, within }, gathered] = [this.#buffers.get(shard), this.#buffers.get(whole)];
    const [sequences = 0, positions = 0, width = 0] = shape;
    const ranks = shardCount(this.#mesh, subAxes);
    const rows = (sequences * positions) / this.#count;
    const isWhole = gathered.shape.join() === [sequences, positions * ranks, width].join();
    if (shape.length !== 3 || ragged > 0 || layer === undefined || within !== undefined || !isWhole) return undefined;
    if (!Number.isInteger(rows) || (positions % rows !== 0 && rows % positions !== 0)) return undefined;
    return { sequences, positions, ranks, rows };
  }

  /** Returns whether parts of so many rows of a buffer begin where memory is aligned. */
  #isAligned(id: string, rows: number): boolean {
    const { shape } = this.#buffers.get(id);
    return ((this.#buffers.bytesOf(id) / elementsOf(shape)) * (shape.at(-1) ?? 0) * rows) % ALIGN === 0;
  }

  #at(n: number): Instruction | undefined {
    return this.#block[n];
  }

  /** Returns the only instruction after or before another, if it is the copy between the order of the sequence and that of ranks. */
  #copyOf(neighbours: ReadonlySet<number> | undefined, from: readonly MemoryAxis[], to: readonly MemoryAxis[]): Compute | undefined {
    const [only, another] = [...(neighbours ?? [])].map((n) => this.#at(n));
    if (another || only?.kind !== "compute" || only.op !== arrange.name || only.blocks) return undefined;
    const { attrs } = arrangement(this.#mesh, from, to, []);
    return JSON.stringify(only.attrs) === JSON.stringify(attrs) ? only : undefined;
  }

  /** Returns the products of a site if they are products alone, and nothing stands between them and the place of the site. */
  #productsAt(users: readonly number[], place: number, own: readonly number[], reads: string): Compute[] | undefined {
    const products: Compute[] = [];
    for (const n of users) {
      const i = this.#at(n);
      const isProduct = i?.kind === "compute" && i.op === gemm.name && i.reads.x === reads && i.reads.w !== reads && !i.accumulates;
      const isFree = [...(this.#dependencies.before[n] ?? [])].every((b) => b < place || own.includes(b));
      if (!isProduct || !isFree || i.waits || this.#isBeside[n] || this.#replaced.has(i)) return undefined;
      products.push(i);
    }
    return products.length > 0 ? products : undefined;
  }

  #splitGather(at: number, i: Collective): void {
    const { after } = this.#dependencies;
    const shard = this.#buffers.get(i.from);
    const [B = 0, S = 0, K = 0] = shard.shape;
    const ranks = shardCount(this.#mesh, i.subAxes);
    const orders = ordersOf({ sequences: B, positions: S, ranks, rows: B * S }, K);
    const copy = isSameMemory(orders.parts, orders.sequence) ? undefined : this.#copyOf(after[at], orders.parts, orders.sequence);
    const whole = copy?.writes.y ?? i.to;
    const tokens = this.#tokensOf(i, i.from, whole);
    const place = copy ? this.#block.indexOf(copy) : at;
    const products = this.#productsAt([...(after[place] ?? [])], at, [at, place], whole);
    if (!tokens || !products || this.#buffers.get(whole).kind !== "workspace") return;
    const { rows } = tokens;
    const outputs = products.map((p) => p.writes.y ?? "");
    if (!this.#isAligned(i.from, rows) || !outputs.every((id) => this.#isAligned(id, rows * ranks))) return;
    const gathers: Instruction[] = [];
    const made: Instruction[] = [];
    const results = products.map((p) => this.#inParts(p.writes.y ?? "", tokens));
    for (let n = 0; n < this.#count; n++) {
      const received = this.#workspace(`${whole}.part${n}`, whole, rows * ranks);
      gathers.push(this.#partOf(i, n, this.#part(i.from, n, rows), received));
      for (const [at, p] of products.entries())
        made.push(this.#productOf(p, n, { x: received, y: this.#part(results[at]?.id ?? "", n, rows * ranks) }, rows * ranks));
    }
    this.#replaced.set(i, [...gathers, ...made, ...results.flatMap(({ copy }) => copy)]);
    for (const p of [...(copy ? [copy] : []), ...products]) this.#replaced.set(p, []);
  }

  #splitScatter(at: number, i: Collective): void {
    const { after, before } = this.#dependencies;
    const shard = this.#buffers.get(i.to);
    const [B = 0, S = 0, K = 0] = shard.shape;
    const ranks = shardCount(this.#mesh, i.subAxes);
    const orders = ordersOf({ sequences: B, positions: S, ranks, rows: B * S }, K);
    const writerOf = (id: string, n: number): number => [...(before[n] ?? [])].find((b) => writes(this.#at(b), id)) ?? -1;
    const isPacked = !isSameMemory(orders.parts, orders.sequence);
    const source = writerOf(i.from, at);
    const copy = isPacked ? this.#copyOf(new Set([source]), orders.sequence, orders.parts) : undefined;
    if (isPacked && !copy) return;
    const whole = copy?.reads.x ?? i.from;
    const place = copy ? writerOf(whole, source) : source;
    const product = this.#at(place);
    const tokens = this.#tokensOf(i, i.to, whole);
    if (product?.kind !== "compute" || !tokens || product.writes.y !== whole) return;
    const x = product.reads.x ?? "";
    const [p] = this.#productsAt([place], place, [], x) ?? [];
    const isOnly = (n: number, user: number): boolean => [...(after[n] ?? [])].every((a) => a === user);
    const isFree = [...(before[at] ?? [])].every((b) => b < place || b === place || b === source);
    if (!p || !isFree || !isOnly(place, copy ? source : at) || (copy && !isOnly(source, at))) return;
    const { rows } = tokens;
    if (!this.#isAligned(i.to, rows) || !this.#isAligned(x, rows * ranks)) return;
    const input = this.#outOfSequence(p, x, tokens);
    const made: Instruction[] = [...input.copy];
    for (let n = 0; n < this.#count; n++) {
      const sent = this.#workspace(`${whole}.part${n}`, whole, rows * ranks);
      made.push(this.#productOf(p, n, { x: this.#part(input.id, n, rows * ranks), y: sent }, rows * ranks));
      made.push(this.#partOf(i, n, sent, this.#part(i.to, n, rows)));
    }
    this.#replaced.set(p, made);
    for (const gone of [i, ...(copy ? [copy] : [])]) this.#replaced.set(gone, []);
  }

  /** Returns where products write the rows of a result part by part, with the copy to the order of the sequence. */
  #inParts(id: string, tokens: Tokens): { readonly id: string; readonly copy: readonly Instruction[] } {
    const { parts, sequence } = ordersOf(tokens, this.#buffers.get(id).shape.at(-1) ?? 0);
    if (isSameMemory(parts, sequence)) return { id, copy: [] };
    const from = this.#workspace(`${id}.parts`, id, this.#rowsOf(id));
    return { id: from, copy: [this.#arranged(`${id}.in_sequence`, from, parts, id, sequence)] };
  }

  /** Returns where a product reads its rows part by part, with the copy from the order of the sequence. */
  #outOfSequence(p: Compute, id: string, tokens: Tokens): { readonly id: string; readonly copy: readonly Instruction[] } {
    const { parts, sequence } = ordersOf(tokens, this.#buffers.get(id).shape.at(-1) ?? 0);
    if (isSameMemory(parts, sequence)) return { id, copy: [] };
    const to = this.#workspace(`${p.id}.x.parts`, id, this.#rowsOf(id));
    return { id: to, copy: [this.#arranged(`${p.id}.in_parts`, id, sequence, to, parts)] };
  }

  #rowsOf(id: string): number {
    const { shape } = this.#buffers.get(id);
    return elementsOf(shape) / (shape.at(-1) ?? 1);
  }

  #arranged(id: string, from: string, have: readonly MemoryAxis[], to: string, want: readonly MemoryAxis[]): Instruction {
    const { attrs } = arrangement(this.#mesh, have, want, []);
    const length = this.#buffers.lengthOf(from);
    const dims: Compute["dims"] = { I: [length, []], O: [length, []] };
    return computeInstruction({ op: arrange, id, reads: { x: from }, writes: { y: to }, dims, attrs: { ...attrs } });
  }

  /** Adds workspace for rows like those of a buffer. Returns its id. */
  #workspace(id: string, like: string, rows: number): string {
    const { dtype, shape, sizes, shardedBy, partial, layer } = this.#buffers.get(like);
    return this.#buffers.add({
      ...{ id, kind: "workspace", dtype, shape: [1, rows, shape.at(-1) ?? 0], sizes: [1, rows, sizes.at(-1) ?? 0], ragged: 0 },
      shardedBy: [[], [], [...(shardedBy.at(-1) ?? [])]],
      ...(partial && { partial: [...partial] }),
      ...(layer !== undefined && { layer }),
    });
  }

  /** Adds a part of the rows of a buffer. Returns its id. */
  #part(of: string, n: number, rows: number): string {
    const { kind, chunk } = this.#buffers.get(of);
    const id = this.#workspace(`${of}.rows${n}`, of, rows);
    const part = { of, at: n * this.#buffers.lengthOf(id) };
    const own = this.#buffers.get(id);
    this.#buffers.delete(id);
    return this.#buffers.add({ ...own, kind, ...(chunk !== undefined && { chunk }), part });
  }

  #partOf(i: Collective, n: number, from: string, to: string): Collective {
    const bytes = bytesSent(i.how, shardCount(this.#mesh, i.subAxes), this.#buffers.bytesOf(from), this.#buffers.bytesOf(to));
    const { waits, ...own } = i;
    return { ...own, ...(waits && n === 0 && { waits }), id: `${i.id}.part${n}`, stream: "tensor", from, to, bytes };
  }

  #productOf(p: Compute, n: number, { x, y }: { readonly x: string; readonly y: string }, rows: number): Compute {
    const dims: Compute["dims"] = { ...p.dims, B: [1, []], S: [rows, []] };
    return { ...p, id: `${p.id}.part${n}`, reads: { ...p.reads, x }, writes: { ...p.writes, y }, dims };
  }
}

const writes = (i: Instruction | undefined, id: string): boolean => i?.kind === "compute" && Object.values(i.writes).includes(id);
