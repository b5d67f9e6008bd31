/**
 * Products beside the exchanges of sequence parallelism, in forward. An all-gather and the products that read it, and a product and its
 * reduce-scatter, are divided into parts of as many tokens: while one part is exchanged, the products of another run. Where sums and norms of
 * tokens alone stand between a reduce-scatter and the next all-gather, they have the same parts (exchangeSites.ts: the order). A part has
 * tokens of all ranks, so that between an all-gather and a reduce-scatter rows lie part by part; `arrange` copies them to the order of the
 * sequence for what needs that. Each row of a product is a sum of its own, so all numbers stay.
 */
import { readsOf, touchedBy } from "../../../schemas/effects.ts";
import type { OpName } from "../../../schemas/opNames.ts";
import type { Buffer, Chunk, Collective, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { blocksOf } from "../../../schemas/program.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { arrange } from "../../ops/rearrange.ts";
import { arrangement, isSameMemory, type MemoryAxis } from "../collectives/memoryAxes.ts";
import type { Mesh } from "../mesh.ts";
import { withWaits } from "./buckets.ts";
import { type GatherSite, inOrder, type ScatterSite } from "./exchangeSites.ts";
import { type Dependencies, dependenciesOf } from "./expertOverlap.ts";
import { ordersOf, RowParts, type TokenParts } from "./rowParts.ts";
import { besideOthers, isTensorExchange } from "./tensorOverlap.ts";

/** Returns a program whose exchanges between tensor ranks in forward, and the products beside them, have `count` parts each. */
export function splitProducts(program: Program, mesh: Mesh, count: number): Program {
  const buffers = new BufferTable(program.buffers);
  const before = new Set(program.buffers.map(({ id }) => id));
  const parts = new RowParts(buffers, mesh);
  const chunks = program.chunks.map((c): Chunk => ({ ...c, forward: new PartSplitter(c.forward, parts, count).split() }));
  const split = withoutCopies({ ...program, chunks }, buffers);
  const used = new Set(blocksOf(split).flatMap(({ instructions }) => instructions.flatMap((i) => [...touchedBy(i, buffers)])));
  for (const id of [...used]) used.add(buffers.rootOf(id));
  const isHeld = (b: Buffer): boolean => used.has(b.id) || (before.has(b.id) && b.kind !== "workspace");
  return { ...split, buffers: [...buffers.values()].filter(isHeld) };
}

/** Returns a program without the copies to the order of the sequence that nothing reads. */
function withoutCopies(program: Program, buffers: BufferTable): Program {
  const read = new Set(blocksOf(program).flatMap(({ instructions }) => instructions.flatMap((i) => [...readsOf(i)])));
  const isIdle = (i: Instruction): boolean =>
    i.kind === "compute" && i.id.endsWith(".in_sequence") && !read.has(i.writes.y ?? "") && !buffers.has(`${i.writes.y}.rows0`);
  const chunks = program.chunks.map((c): Chunk => ({ ...c, forward: c.forward.filter((i) => !isIdle(i)) }));
  return { ...program, chunks };
}

/** Products with a row for each token. */
const products: ReadonlySet<OpName> = new Set(["gemm", "gemm_pair", "gemm_swiglu"] as const);
/** Ops on each element alone, between the products of a feed-forward part. */
const activations: ReadonlySet<OpName> = new Set([
  ...(["swiglu", "geglu", "quick_geglu", "gelu", "gelu_tanh", "squared_relu", "add_bias"] as const),
]);

/** Divides the exchanges of one block. */
class PartSplitter {
  readonly #block: readonly Instruction[];
  readonly #parts: RowParts;
  readonly #buffers: BufferTable;
  readonly #count: number;
  readonly #dependencies: Dependencies;
  readonly #isBeside: readonly boolean[];
  /** Per instruction what stands in its place. */
  readonly #replaced = new Map<Instruction, readonly Instruction[]>();
  readonly #gathers: GatherSite[] = [];
  readonly #scatters: ScatterSite[] = [];

  constructor(block: readonly Instruction[], parts: RowParts, count: number) {
    this.#block = block;
    this.#parts = parts;
    this.#buffers = parts.buffers;
    this.#count = count;
    this.#dependencies = dependenciesOf(block, parts.buffers);
    this.#isBeside = besideOthers(block);
  }

  /** Returns the block with divided exchanges. */
  split(): Instruction[] {
    for (const [at, i] of this.#block.entries()) {
      if (i.kind === "compute" && activations.has(i.op)) this.#activate(i);
      if (!isTensorExchange(i) || this.#isBeside[at]) continue;
      if (i.how === "all_gather") this.#gather(at, i);
      else this.#scatter(at, i);
    }
    if (this.#gathers.length + this.#scatters.length === 0) return [...this.#block];
    const sites = { block: this.#block, dependencies: this.#dependencies, isBeside: this.#isBeside, parts: this.#parts };
    for (const [i, by] of inOrder(sites, this.#scatters, this.#gathers)) this.#replaced.set(i, by);
    return withWaits(
      this.#block.flatMap((i) => this.#replaced.get(i) ?? [i]),
      [],
      this.#buffers,
    );
  }

  /** Returns the tokens of an exchange between a shard and the whole; undefined if they have no such parts. */
  #tokensOf({ subAxes }: Collective, shard: string, whole: string): TokenParts | undefined {
    const [{ shape, ragged, layer, within }, gathered] = [this.#buffers.get(shard), this.#buffers.get(whole)];
    const [sequences = 0, positions = 0, width = 0] = shape;
    const ranks = shardCount(this.#parts.mesh, subAxes);
    const rows = (sequences * positions) / this.#count;
    const isWhole = gathered.shape.join() === [sequences, positions * ranks, width].join();
    if (shape.length !== 3 || ragged > 0 || layer === undefined || within !== undefined || !isWhole) return undefined;
    if (!Number.isInteger(rows) || (positions % rows !== 0 && rows % positions !== 0)) return undefined;
    return { sequences, positions, ranks, rows };
  }

  /** Returns the axes of the blocks of ranks, and of rows in the order of the sequence, for a shard. */
  #wholeOrders({ subAxes }: Collective, shard: string): ReturnType<typeof ordersOf> {
    const [sequences = 0, positions = 0, width = 0] = this.#buffers.get(shard).shape;
    return ordersOf({ sequences, positions, ranks: shardCount(this.#parts.mesh, subAxes), rows: sequences * positions }, width);
  }

  /** Returns the only neighbour of an instruction, if it is the copy between two orders of rows. */
  #copyOf(neighbours: readonly number[], from: readonly MemoryAxis[], to: readonly MemoryAxis[]): Compute | undefined {
    const [only, another] = neighbours.map((n) => this.#block[n]);
    if (another || only?.kind !== "compute" || only.op !== arrange.name || only.blocks) return undefined;
    const { attrs } = arrangement(this.#parts.mesh, from, to, []);
    return JSON.stringify(only.attrs) === JSON.stringify(attrs) ? only : undefined;
  }

  /** Returns instructions if they are products of x, and nothing but each other and `own` stands between `place` and them. */
  #productsAt(users: readonly number[], place: number, own: readonly number[], x: string): Compute[] | undefined {
    const found: Compute[] = [];
    for (const n of users) {
      const i = this.#block[n];
      const isProduct = i?.kind === "compute" && products.has(i.op) && i.reads.x === x && i.reads.w !== x && !i.accumulates;
      const isFree = [...(this.#dependencies.before[n] ?? [])].every((b) => b < place || own.includes(b) || users.includes(b));
      if (!isProduct || !isFree || i.waits || this.#isBeside[n] || this.#replaced.has(i)) return undefined;
      found.push(i);
    }
    return found.length > 0 ? found : undefined;
  }

  #gather(at: number, i: Collective): void {
    const { after } = this.#dependencies;
    const orders = this.#wholeOrders(i, i.from);
    const users = [...(after[at] ?? [])];
    const copy = isSameMemory(orders.parts, orders.sequence) ? undefined : this.#copyOf(users, orders.parts, orders.sequence);
    const whole = copy?.writes.y ?? i.to;
    const tokens = this.#tokensOf(i, i.from, whole);
    const place = copy ? this.#block.indexOf(copy) : at;
    const own = this.#productsAt([...(after[place] ?? [])], at, [at, place], whole);
    if (!tokens || !own || this.#buffers.get(whole).kind !== "workspace") return;
    const rows = tokens.rows * tokens.ranks;
    const outputs = own.flatMap((p) => Object.values(p.writes));
    const gates = own.flatMap((p) => p.reads.gate ?? []);
    if (!gates.every((id) => outputs.includes(id)) || !this.#parts.isAligned(i.from, tokens.rows)) return;
    if (!outputs.every((id) => this.#parts.isAligned(id, rows))) return;
    const written = outputs.map((id) => this.#parts.written(id, tokens));
    const bufferOf = (id: string, n: number): string =>
      id === whole
        ? this.#parts.workspace(`${whole}.part${n}`, whole, rows)
        : this.#parts.part(written[outputs.indexOf(id)]?.id ?? id, n, rows);
    const numbers = Array.from({ length: this.#count }, (_, n) => n);
    this.#gathers.push({
      ...{ at, exchange: i, tokens, replaced: [i, ...(copy ? [copy] : []), ...own] },
      ...{ users: own.map((p) => this.#block.indexOf(p)), own: [at, place], copies: written.flatMap(({ copy }) => copy) },
      gathers: numbers.map((n) => this.#parts.exchanged(i, n, this.#parts.part(i.from, n, tokens.rows), bufferOf(whole, n))),
      products: numbers.map((n) => own.map((p) => this.#parts.computed(p, `${p.id}.part${n}`, rows, (id) => bufferOf(id, n)))),
    });
  }

  #scatter(at: number, i: Collective): void {
    const { after, before } = this.#dependencies;
    const orders = this.#wholeOrders(i, i.to);
    const writerOf = (id: string, n: number): number => [...(before[n] ?? [])].find((b) => writes(this.#block[b], id)) ?? -1;
    const isPacked = !isSameMemory(orders.parts, orders.sequence);
    const source = writerOf(i.from, at);
    const copy = isPacked ? this.#copyOf([source], orders.sequence, orders.parts) : undefined;
    if (isPacked && !copy) return;
    const whole = copy?.reads.x ?? i.from;
    const place = copy ? writerOf(whole, source) : source;
    const product = this.#block[place];
    const tokens = this.#tokensOf(i, i.to, whole);
    if (product?.kind !== "compute" || !tokens || product.writes.y !== whole || product.op !== "gemm") return;
    const x = product.reads.x ?? "";
    const [p] = this.#productsAt([place], place, [], x) ?? [];
    const isOnly = (n: number, user: number): boolean => [...(after[n] ?? [])].every((a) => a === user);
    const isFree = [...(before[at] ?? [])].every((b) => b < place || b === place || b === source);
    if (!p || !isFree || !isOnly(place, copy ? source : at) || (copy && !isOnly(source, at))) return;
    const rows = tokens.rows * tokens.ranks;
    if (!this.#parts.isAligned(i.to, tokens.rows) || !this.#parts.isAligned(x, rows)) return;
    const input = this.#parts.read(p, x, tokens);
    const sentOf = (n: number): string => this.#parts.workspace(`${whole}.part${n}`, whole, rows);
    const bufferOf = (id: string, n: number): string => (id === whole ? sentOf(n) : this.#parts.part(input.id, n, rows));
    this.#scatters.push({
      ...{ at, place, exchange: i, tokens, copies: input.copy, replaced: [p, i, ...(copy ? [copy] : [])], own: [place, source] },
      steps: Array.from({ length: this.#count }, (_, n) => [
        this.#parts.computed(p, `${p.id}.part${n}`, rows, (id) => bufferOf(id, n)),
        this.#parts.exchanged(i, n, sentOf(n), this.#parts.part(i.to, n, tokens.rows)),
      ]),
    });
  }

  /** Lets an op on each element compute on rows that lie part by part, as the products before it write them. */
  #activate(i: Compute): void {
    const last = this.#gathers.at(-1);
    const y = i.writes.y;
    const inputs = this.#parts.rowBuffers(i).filter((id) => id !== y);
    if (!last || y === undefined || i.waits || inputs.some((id) => this.#parts.known(id, last.tokens) === undefined)) return;
    if (inputs.every((id) => this.#parts.known(id, last.tokens) === id)) return;
    const written = this.#parts.written(y, last.tokens);
    const renamed = (id: string): string => (id === y ? written.id : (this.#parts.known(id, last.tokens) ?? id));
    const rows = last.tokens.sequences * last.tokens.positions * last.tokens.ranks;
    this.#replaced.set(i, [this.#parts.computed(i, i.id, rows, renamed), ...written.copy]);
  }
}

const writes = (i: Instruction | undefined, id: string): boolean => i?.kind === "compute" && Object.values(i.writes).includes(id);
