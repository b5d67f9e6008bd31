/**
 * Copies before and after a collective: they arrange a shard as blocks for the ranks of a group, and put received blocks in place. Rows are
 * sent in lists of fixed capacity, so that the host needs no count. Unused entries are −1.
 */
import { op } from "./op.ts";

type Sizes = Readonly<Record<string, number>>;

/** Returns the number of attributes `prefix0`, `prefix1`, … */
const countOf = (d: Sizes, prefix: string): number => {
  let n = 0;
  while (d[`${prefix}${n}`] !== undefined) n++;
  return n;
};

/** y[i0, i1, …] = x[block + i0·s0 + i1·s1 + …] over sizes n0, n1, …: reorders, repeats or selects blocks. */
export const arrange = op({
  name: "arrange",
  sig: "x[I!] -> y[O!]",
  linear: true,
  cpu({ x, y }, d: Sizes, { block = 0 }) {
    const dims = countOf(d, "n");
    const visit = (dim: number, from: number, to: number): void => {
      const [n, s] = [d[`n${dim}`]!, d[`s${dim}`]!];
      if (dim === dims - 1) {
        if (s === 1) y.set(x.subarray(from, from + n), to);
        else for (let i = 0; i < n; i++) y[to + i] = x[from + i * s]!;
        return;
      }
      let inner = 1;
      for (let j = dim + 1; j < dims; j++) inner *= d[`n${j}`]!;
      for (let i = 0; i < n; i++) visit(dim + 1, from + i * s, to + i * inner);
    };
    visit(0, block, 0);
  },
});

/** y row i = x row from[i], of `width` elements; rows with from[i] < 0 keep their value. */
export const takeRows = op({
  name: "take_rows",
  sig: "x[I!] from[N!] -> y[O!]",
  attrs: ["width"],
  cpu({ x, from, y }, { N, width }) {
    for (let i = 0; i < N; i++) if (from[i]! >= 0) y.set(x.subarray(from[i]! * width, (from[i]! + 1) * width), i * width);
  },
});

/** Inverts an index: to[from[i]] = i, and −1 for values that `from` does not contain. */
export const invertRows = op({
  name: "invert_rows",
  sig: "from[I!] -> to[N!]",
  types: { to: "i32" },
  cpu({ from, to }, { I }) {
    to.fill(-1);
    for (let i = 0; i < I; i++) if (from[i]! >= 0) to[from[i]!] = i;
  },
});

/**
 * Divides the rows of `index` by destination and keeps their order: list d is [count, b, s, e, …] of `cap` rows, and from[d·cap + j] is the
 * row at its place j. The destination of a row is the sum over f of (coordinate[slot_f] / div_f % mod_f) · mul_f. `needed` becomes
 * max(needed, length of the longest list).
 */
export const splitRows = op({
  name: "split_rows",
  sig: "index[I!] -> lists[O!] from[N!] needed[]",
  attrs: ["cap"],
  types: { lists: "i32", from: "i32", needed: "i32" },
  inPlace: ["needed"],
  cpu({ index, lists, from, needed }, d) {
    const cap = d.cap;
    const factors = countOf(d, "slot");
    const length = 1 + 3 * cap;
    const counts = new Int32Array(lists.length / length);
    lists.fill(-1);
    from.fill(-1);
    for (let r = 0; r < index[0]!; r++) {
      let to = 0;
      for (let f = 0; f < factors; f++)
        to += (Math.floor(index[1 + 3 * r + d[`slot${f}`]!]! / d[`div${f}`]!) % d[`mod${f}`]!) * d[`mul${f}`]!;
      const j = counts[to]!++;
      if (j >= cap) continue;
      lists.set(index.subarray(1 + 3 * r, 4 + 3 * r), to * length + 1 + 3 * j);
      from[to * cap + j] = r;
    }
    for (const [to, n] of counts.entries()) lists[to * length] = Math.min(n, cap);
    require(needed, Math.max(...counts));
  },
});

/**
 * Merges `count` lists into one index of `bound` rows, sorted by (e, b, s); of equal rows those of the first list come first. The lists are
 * sorted likewise, have stride `length` and hold at most `cap` rows. The index ends with the row offsets of the local experts, the first of which is start(E). from[i] = list · cap + j is
 * the origin of row i. `B0` and `S0` are the global sizes.
 */
export const mergeRows = op({
  name: "merge_rows",
  sig: "lists[I!] -> index[O!] from[N!] needed[]",
  attrs: ["count", "length", "cap", "bound", "E", "B0", "S0"],
  types: { index: "i32", from: "i32", needed: "i32" },
  inPlace: ["needed"],
  cpu({ lists, index, from, needed }, d, place) {
    const { count, length, cap, bound, E } = d;
    // places of lists, in the order of tokens, may be beyond the sizes of b
    const all: { e: number; token: number; at: number; from: number }[] = [];
    for (let g = 0; g < count; g++) {
      const list = (place.block ?? 0) + g * length;
      for (let j = 0; j < lists[list]!; j++) {
        const at = list + 1 + 3 * j;
        all.push({ e: lists[at + 2]!, token: lists[at]! * d.S0 + lists[at + 1]!, at, from: g * cap + j });
      }
    }
    all.sort((x, y) => x.e - y.e || x.token - y.token);
    index.fill(-1);
    from.fill(-1);
    const kept = all.slice(0, bound);
    for (const [i, row] of kept.entries()) {
      index.set(lists.subarray(row.at, row.at + 3), 1 + 3 * i);
      from[i] = row.from;
    }
    index[0] = kept.length;
    markExperts(index, bound, place.start("E"), E);
    require(needed, all.length);
  },
});

const require = (needed: Float32Array | undefined, count: number): void => {
  if (needed) needed[0] = Math.max(needed[0]!, count);
};

/** Writes the tail of an index of `bound` rows: the first row of each local expert, and the end of the last one. */
export function markExperts(index: Int32Array | Float32Array, bound: number, first: number, experts: number): void {
  let r = 0;
  for (let e = 0; e <= experts; e++) {
    while (r < index[0]! && index[3 + 3 * r]! < first + e) r++;
    index[1 + 3 * bound + e] = r;
  }
}
/** Returns the number of elements of an index: count, rows, offsets of local experts. */
export const indexLength = (bound: number, experts: number): number => 1 + 3 * bound + experts + 1;
