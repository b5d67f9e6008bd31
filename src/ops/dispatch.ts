/**
 * Dispatch once per rank (`model.moe.dispatch: once`). The experts of one rank are a group: a token has one row for each group that has
 * experts of it. The row carries the weights of the group's K experts. On the rank of the group, rows are a list of tokens: `permute_rows`
 * and its like copy them to the experts, as `permute` copies tokens. A place in the list is a number of this rank alone, so an index that they
 * make has (start of b + place, start of s, expert) instead of (b, s, expert), and such rows are local: collectives send them to the rank of
 * their expert, and back to where they were, and nowhere else.
 *
 * Once per node (`once_per_node`) the experts of a node are a group, and a row carries the weights of all of them. In the node that receives it
 * the ranks are groups in turn: the same ops copy each row of the list to the ranks that have experts of it, whose lists make rows of experts.
 */
import { greater, rowMax, select } from "./formula.ts";
import { invariant } from "./invariant.ts";
import { pack, packGrad, permute, unpermute } from "./moe.ts";
import { formulaOp, type Grads, op, type ShardContext } from "./op.ts";

// -- where the tokens are: groups of K experts

/** Marks the groups that have an expert of a token. */
export const groupMask = formulaOp({
  name: "group_mask",
  sig: "c[B,S,G*K] -> g[B,S,G]",
  formula: ({ c }) => ({ g: rowMax("any", c) }),
});

/** The weight that stands for "not chosen". Weights are 0 or more. */
const ABSENT = -1;

/** The weights of chosen experts, and −1 for the others: weights and mask in one. */
export const markWeights = formulaOp({
  name: "mark_weights",
  sig: "p[B,S,E] c[B,S,E] -> y[B,S,E]",
  formula: ({ p, c }) => ({ y: select(greater(c, 0), p, ABSENT) }),
  grad: ({ c }, { dy }): Grads => ({ p: markWeightsGrad.of({ dy, c }) }),
});
/** Gradient of mark_weights with respect to p. */
export const markWeightsGrad = formulaOp({
  name: "mark_weights_grad",
  sig: "dy[B,S,E] c[B,S,E] -> dp[B,S,E]",
  formula: ({ dy, c }) => ({ dp: select(greater(c, 0), dy, 0) }),
});

/** Gathers the K values of the group of each row; E counts groups. */
export const packGroups = op({
  name: "pack_groups",
  sig: "p[B,S,E*K] c[B,S,E] -> r[B~S~E,K]",
  rows: ({ c }, d, place, rows, bound) => permute.rows?.({ x: c, c }, { ...d, D: d.K }, place, rows, bound) ?? 0,
  cpu({ p, r }, { S, E, K }, { start, rows }) {
    eachGroup({ S, E, K }, start, rows, (row, at) => r.set(p.subarray(at, at + K), row * K));
  },
  grad: ({ c }, { dy }, a): Grads => ({ p: packGroupsGrad.of({ dy, c }, a) }),
});
/** Gradient of pack_groups with respect to p; only the shape of `c` is read. */
export const packGroupsGrad = op({
  name: "pack_groups_grad",
  sig: "dy[B~S~E,K] c[B,S,E] -> dp[B,S,E*K]",
  cpu({ dy, dp }, { S, E, K }, { start, rows }) {
    eachGroup({ S, E, K }, start, rows, (row, at) => dp.set(dy.subarray(row * K, row * K + K), at));
  },
});
/** Visits each row with the first local index of the values of its group. */
function eachGroup(
  { S, E, K }: Readonly<Record<"S" | "E" | "K", number>>,
  start: (dim: string) => number,
  rows: Int32Array,
  visit: (row: number, at: number) => void,
): void {
  for (let row = 0; row < (rows[0] ?? 0); row++) {
    const [b = 0, s = 0, e = 0] = rows.subarray(1 + 3 * row, 4 + 3 * row);
    visit(row, (((b - start("B")) * S + s - start("S")) * E + e - start("E")) * K);
  }
}

// -- where the experts are: lists of tokens

/**
 * Marks the groups of K experts that have an expert of each row, from its weights; with K = 1 the experts themselves. Places without a row
 * have none: they are 0 up to the bound.
 */
export const rowChoices = op({
  name: "row_choices",
  sig: "v[B~S~E,N*K] -> c[B~S~E,N]",
  localRows: true,
  cpu({ v, c }, { N, K = 1 }, { rows }) {
    for (let i = 0; i < (rows[0] ?? 0) * N; i++) c[i] = Number(v.subarray(i * K, i * K + K).some((weight) => weight >= 0));
  },
});

type ListSizes = Readonly<Record<"E" | "K", number>>;
/** Returns the sizes by which the ops of dense tokens see a list. Throws a BrokenInvariant unless this rank has one group of experts. */
function tokensOf({ length }: Float32Array, { E, K }: ListSizes) {
  invariant(E === K, () => `a rank has ${E} experts, and a row the weights of ${K}`);
  return { B: length / K, S: 1, E };
}

/** Writes the index of the rows of a list. Returns the number of rows. */
const rowsOfList = (c: Float32Array, d: ListSizes, place: ShardContext, rows: Int32Array, bound: number): number =>
  permute.rows?.({ x: c, c }, { ...tokensOf(c, d), D: d.K }, place, rows, bound) ?? 0;

/** Copies the vector of each place of a list once per expert of the place. */
export const permuteRows = op({
  name: "permute_rows",
  sig: "x[B~S~E/K,D] c[B~S~E/K,K] -> r[B~S~E,D]",
  attrs: ["K"],
  localRows: true,
  rows: ({ c }, d, place, rows, bound) => rowsOfList(c, d, place, rows, bound),
  cpu({ x, c, r }, d, place) {
    permute.cpu({ x, c, r }, { ...tokensOf(c, d), D: d.D }, place);
  },
  grad: ({ c }, { dy }, a): Grads => ({ x: unpermuteRows.of({ r: dy, c }, a) }),
});
/** Sums the rows of each place of a list; only the shape of `c` is read. */
export const unpermuteRows = op({
  name: "unpermute_rows",
  sig: "r[B~S~E,D] c[B~S~E/K,K] -> x[B~S~E/K,D]",
  attrs: ["K"],
  rowsLike: "c",
  linearIn: "r",
  cpu({ r, c, x }, d, place) {
    unpermute.cpu({ r, c, x }, { ...tokensOf(c, d), D: d.D }, place);
  },
  grad: ({ c }, { dy }, a): Grads => ({ r: permuteRows.of({ x: dy, c }, a) }),
});
/** Gathers the combine weight of each row from the weights of its place. */
export const packRows = op({
  name: "pack_rows",
  sig: "p[B~S~E/K,K] c[B~S~E/K,K] -> r[B~S~E]",
  attrs: ["K"],
  localRows: true,
  rows: ({ c }, d, place, rows, bound) => rowsOfList(c, d, place, rows, bound),
  cpu({ p, c, r }, d, place) {
    pack.cpu({ p, c, r }, tokensOf(c, d), place);
  },
  grad: ({ c }, { dy }, a): Grads => ({ p: packRowsGrad.of({ dy, c }, a) }),
});
/** Gradient of pack_rows with respect to p; only the shape of `c` is read. */
export const packRowsGrad = op({
  name: "pack_rows_grad",
  sig: "dy[B~S~E] c[B~S~E/K,K] -> dp[B~S~E/K,K]",
  attrs: ["K"],
  rowsLike: "c",
  linearIn: "dy",
  cpu({ dy, c, dp }, d, place) {
    packGrad.cpu({ dy, c, dp }, tokensOf(c, d), place);
  },
});
/** Gathers the W values of the group of each row from those of its place. */
export const packRowGroups = op({
  name: "pack_row_groups",
  sig: "p[B~S~E/K,K*W] c[B~S~E/K,K] -> r[B~S~E,W]",
  attrs: ["K"],
  localRows: true,
  rows: ({ c }, d, place, rows, bound) => rowsOfList(c, d, place, rows, bound),
  cpu({ p, c, r }, d, place) {
    packGroups.cpu({ p, c, r }, { ...tokensOf(c, d), K: d.W }, place);
  },
  grad: ({ c }, { dy }, a): Grads => ({ p: packRowGroupsGrad.of({ dy, c }, a) }),
});
/** Gradient of pack_row_groups with respect to p; only the shape of `c` is read. */
export const packRowGroupsGrad = op({
  name: "pack_row_groups_grad",
  sig: "dy[B~S~E,W] c[B~S~E/K,K] -> dp[B~S~E/K,K*W]",
  attrs: ["K"],
  rowsLike: "c",
  linearIn: "dy",
  cpu({ dy, c, dp }, d, place) {
    packGroupsGrad.cpu({ dy, c, dp }, { ...tokensOf(c, d), K: d.W }, place);
  },
});
