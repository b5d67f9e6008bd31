/** The grid of a persistent kernel that shares the device with collectives. */

/** The most thread blocks for each multiprocessor, and the fewest tiles of one. */
const [MOST, LEAST_TILES] = [8, 2];

/**
 * Returns the thread blocks of a persistent kernel beside collectives. With one thread block for each multiprocessor, those of the multiprocessors
 * that a collective occupies begin when all others are complete: the kernel takes twice as long, however few they are. So each block gets a
 * share of the tiles, and the device gives the next block to the multiprocessor that is free first. A collective also begins sooner, because it waits
 * for a block and not for a kernel. Each share costs the fill and the drain of the pipeline of loads once more. `blocks`: those of the whole device;
 * `tiles`: the most tiles. Which block computes a tile changes no bit.
 */
export function dividedGrid(blocks: number, tiles: number, multiprocessors: number): number {
  const most = Math.min(MOST, Math.floor(tiles / (LEAST_TILES * multiprocessors)));
  if (blocks < multiprocessors || most < 2) return blocks;
  const shares = Array.from({ length: most - Math.floor(most / 2) + 1 }, (_, n) => most - n);
  /** Tiles of a multiprocessor, where none is occupied. */
  const rounds = (share: number): number => share * Math.ceil(tiles / (share * multiprocessors));
  return multiprocessors * shares.reduce((best, share) => (rounds(share) < rounds(best) ? share : best));
}
