/** What a model declares about the uses of ops and their values: how mesh axes shard them, and how many rows there may be. */

/** Per dim the mesh axes that shard it, outermost first. */
export type DimAxes = readonly (readonly string[])[];

/** The largest number of `rows` per expert in each group of `sequences` × `positions` tokens. */
export interface Quota {
  readonly rows: number;
  readonly sequences: number;
  readonly positions: number;
}

/** The largest and the mean number of rows per token, and the largest per expert. */
interface RowLimits {
  readonly fanout: number;
  readonly meanFanout?: number;
  readonly quota?: Quota;
}
/** Returns the limits on the rows that an op makes from its attributes. */
export function limitsOf({ k = 0, mean, quota, sequences = 1, positions = 1 }: Readonly<Record<string, number>>): RowLimits {
  return { fanout: k, ...(mean !== undefined && { meanFanout: mean }), ...(quota ? { quota: { rows: quota, sequences, positions } } : {}) };
}

/** The dim that a mesh axis must shard, and the job key that says so. Without a dim the axis shards none: its ranks repeat the work. */
export interface Pin {
  readonly dim?: string;
  readonly axis: string;
  /** Only the sub-axes of the axis along which ranks are on different nodes. */
  readonly across?: "nodes";
  readonly path: string;
}

/**
 * The dim `dim` may be sharded more finely than it has elements: then neighbouring ranks, those along the axis `axis`, have copies of one
 * element, and each computes a part of the inner dim `inner`. All ranks of the axis `within` shard the dim.
 */
export interface Sharing {
  readonly dim: string;
  readonly inner: string;
  readonly axis: string;
  readonly within: string;
  readonly path: string;
}

/** Per dim the mesh axes that shard it, outermost first, before and after a regrid: all axes of one grid, then all of the other. */
export interface Regrid {
  readonly from: DimAxes;
  readonly to: DimAxes;
}
