/** Returns the prefix of a data set that is named by its prefix or by one of its files PREFIX.bin and PREFIX.idx. */
export const datasetPrefix = (name: string): string => name.replace(/\.(bin|idx)$/, "");

/** Returns the index file of a Megatron data set: PREFIX.idx for PREFIX.bin; undefined for any other name. */
export const indexPath = (path: string): string | undefined => (path.endsWith(".bin") ? `${path.slice(0, -".bin".length)}.idx` : undefined);
