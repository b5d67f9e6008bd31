import type { Job } from "./job.ts";

/** Returns whether losses of tokens have weights: some labels are ignored. */
export const hasTokenWeights = ({ data }: Pick<Job, "data">): boolean => data.labels !== null || data.documents?.loss === true;
