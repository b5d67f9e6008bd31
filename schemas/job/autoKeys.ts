/** The keys of a job that may be `auto`: rankc chooses their values by the estimated time of a step (`rankc search`). */

/** The short name of such a key, and its path. */
export const autoKeys = {
  tensor: "parallel.tensor",
  pipeline: "parallel.pipeline",
  virtual_pipeline: "parallel.virtual_pipeline",
  context: "parallel.context",
  expert: "parallel.expert",
  expert_tensor: "parallel.expert_tensor",
  micro_batch: "train.micro_batch",
  recompute: "train.recompute.mode",
} as const;
/** The short name of a key that may be `auto`. */
export type AutoKey = keyof typeof autoKeys;

/** The names of the keys that may be `auto`. */
export const autoNames = Object.keys(autoKeys) as readonly AutoKey[];
