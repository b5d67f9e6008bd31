/** Returns the index file of a Megatron data set: PREFIX.idx for PREFIX.bin; undefined for any other name. */
export const indexPath = (path: string): string | undefined => (path.endsWith(".bin") ? `${path.slice(0, -".bin".length)}.idx` : undefined);
