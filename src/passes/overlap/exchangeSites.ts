/**
 * The order of exchanges in parts. A reduce-scatter, the sums and norms behind it and the all-gather of their result are one chain: a part of
 * the all-gather begins when that of the reduce-scatter has ended and its rows are normed, beside the products of other parts.
 */
import type { OpName } from "../../../schemas/opNames.ts";
import type { Collective, Compute, Instruction } from "../../../schemas/plan.ts";
import type { Dependencies } from "./expertOverlap.ts";
import type { RowParts, TokenParts } from "./rowParts.ts";

/** What both kinds of exchanges in parts have: the collective with its index in the block, and all instructions that parts stand for. */
interface Site {
  readonly at: number;
  readonly exchange: Collective;
  readonly tokens: TokenParts;
  readonly replaced: readonly Instruction[];
  /** The indices of what only the site needs. */
  readonly own: readonly number[];
  /** The copies before or after all parts. */
  readonly copies: readonly Instruction[];
}
/** An all-gather with the products that read it, whose indices are `users`. */
export interface GatherSite extends Site {
  readonly users: readonly number[];
  readonly gathers: readonly Collective[];
  readonly products: readonly (readonly Compute[])[];
}
/** A product, whose index is `place`, with its reduce-scatter. */
export interface ScatterSite extends Site {
  readonly place: number;
  readonly steps: readonly (readonly Instruction[])[];
}

/** A block with what its parts depend on. */
export interface BlockOfSites {
  readonly block: readonly Instruction[];
  readonly dependencies: Dependencies;
  readonly isBeside: readonly boolean[];
  readonly parts: RowParts;
}

/** Ops on the row of each token alone. */
const rowOps: ReadonlySet<OpName> = new Set(["add", "add_bias", "rmsnorm", "layernorm"] as const);

/** Returns per replaced instruction what stands in its place. */
export function inOrder(
  sites: BlockOfSites,
  scatters: readonly ScatterSite[],
  gathers: readonly GatherSite[],
): Map<Instruction, readonly Instruction[]> {
  const replaced = new Map<Instruction, readonly Instruction[]>();
  const put = (at: number, by: readonly Instruction[], gone: readonly Instruction[]): void => {
    for (const i of gone) replaced.set(i, []);
    for (const i of sites.block.slice(at, at + 1)) replaced.set(i, by);
  };
  const chained = new Set<GatherSite>();
  for (const s of scatters) {
    const g = gathers.find(({ at }) => at > s.at);
    const chain = g && chainOf(sites, s, g);
    if (!g || !chain) {
      put(s.place, [...s.copies, ...s.steps.flat()], s.replaced);
      continue;
    }
    chained.add(g);
    const links = g.gathers.map((gather, n) => [...chain.map((i) => linkOf(sites, i, g.tokens, n)), gather]);
    put(s.place, [...s.copies, ...interleaved(s, links, g), ...g.copies], [...s.replaced, ...chain, ...g.replaced]);
  }
  for (const g of gathers) if (!chained.has(g)) put(g.at, [...g.gathers, ...g.products.flat(), ...g.copies], g.replaced);
  return replaced;
}

/** How many parts of a chain begin before the products behind it: one that is exchanged while another is computed. */
const AHEAD = 2;

/**
 * Returns the parts of a chain. A link waits for the reduce-scatter of its part, so it stands behind the product of the next one. The links
 * that follow the first stand between the products behind the chain, each `AHEAD` parts before the products that need it.
 */
function interleaved({ steps }: ScatterSite, links: readonly (readonly Instruction[])[], { products }: GatherSite): Instruction[] {
  const early = Math.min(steps.length, AHEAD);
  const within = (n: number): readonly Instruction[] => (n > 0 && n <= early ? (links[n - 1] ?? []) : []);
  return [
    ...steps.flatMap((step, n) => [...step, ...within(n)]),
    ...links.slice(Math.min(early, steps.length - 1), early).flat(),
    ...products.flatMap((own, n) => [...own, ...(links[early + n] ?? [])]),
  ];
}

/** Returns the instructions between a reduce-scatter and an all-gather if each computes on the row of each token alone. */
function chainOf({ block, dependencies, isBeside, parts }: BlockOfSites, s: ScatterSite, g: GatherSite): Compute[] | undefined {
  if (JSON.stringify(s.tokens) !== JSON.stringify(g.tokens)) return undefined;
  const beforeOf = (at: number): readonly number[] => [...(dependencies.before[at] ?? [])].filter((b) => b >= s.place);
  const needed = new Set<number>();
  const visit = (at: number): void => {
    for (const b of beforeOf(at)) {
      if (needed.has(b)) continue;
      needed.add(b);
      visit(b);
    }
  };
  visit(g.at);
  if (!needed.has(s.at)) return undefined;
  const chain: Compute[] = [];
  for (const at of [...needed].sort((a, b) => a - b)) {
    if (at === s.at || s.own.includes(at)) continue;
    const i = block[at];
    const isLink = i?.kind === "compute" && rowOps.has(i.op) && !i.accumulates && !i.waits && !isBeside[at] && at > s.at;
    if (!isLink || !parts.rowBuffers(i).every((id) => hasParts(parts, id, s.tokens))) return undefined;
    chain.push(i);
  }
  const isFree = g.users.every((at) => beforeOf(at).every((b) => g.own.includes(b) || g.users.includes(b)));
  return isFree ? chain : undefined;
}

/** Returns whether a buffer is a shard of tokens of which parts can be taken. */
function hasParts(parts: RowParts, id: string, { sequences, positions, rows }: TokenParts): boolean {
  const { shape, ragged, within, part } = parts.buffers.get(id);
  const isShard = shape.length === 3 && shape[0] === sequences && shape[1] === positions && ragged === 0;
  return isShard && within === undefined && part === undefined && parts.isAligned(id, rows);
}

const linkOf = ({ parts }: BlockOfSites, i: Compute, { rows }: TokenParts, n: number): Compute =>
  parts.computed(i, `${i.id}.part${n}`, rows, (id) => parts.part(id, n, rows));
