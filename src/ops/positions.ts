/**
 * Where a token stands in its sequence. Causal attention costs a token as much as it has tokens before it, so ranks with equal
 * pieces of the plain order would not have equal work. In zigzag order a sequence of chunk·2·ranks tokens is 2·ranks blocks, of which
 * rank r holds two side by side: the r-th from the front and the r-th from the back.
 */

/** The position in its sequence of the token that lies at `index`, a global one; chunk 0 is plain order. */
export function positionOf(index: number, chunk: number, ranks: number): number {
  if (chunk === 0) return index;
  const block = Math.floor(index / chunk);
  const rank = block >> 1;
  return (block % 2 ? 2 * ranks - 1 - rank : rank) * chunk + (index % chunk);
}
