/**
 * Positions of tokens in their sequences. The cost of causal attention grows with the position, so contiguous shards of a sequence would give
 * ranks unequal work. In zigzag order a sequence of chunk·2·ranks tokens is divided into 2·ranks blocks; rank r holds the r-th block from the
 * front and the r-th from the back, adjacent in memory.
 */

/** Returns the position in its sequence of the token at the global `index`; chunk 0 means plain order. */
export function positionOf(index: number, chunk: number, ranks: number): number {
  if (chunk === 0) return index;
  const block = Math.floor(index / chunk);
  const rank = block >> 1;
  return (block % 2 ? 2 * ranks - 1 - rank : rank) * chunk + (index % chunk);
}
