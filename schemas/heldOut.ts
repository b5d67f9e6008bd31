/** The data that a job holds out from training; apart from the schema of jobs, which is slow to load. */
import type { Job } from "./job.ts";

type Data = Job["data"];

/** The data that an evaluation may read. */
export const heldOutParts = ["validation", "test"] as const;
/** One of `heldOutParts`. */
export type HeldOutPart = (typeof heldOutParts)[number];

/** Returns the sources of the data held out from training; undefined if the job has none. With data.path, that is the one source. */
export function heldOutSources(data: Data, part: HeldOutPart): NonNullable<Data["sources"]> | undefined {
  const own = data[part];
  if (own) return own;
  const share = data.split?.[part === "validation" ? 1 : 2] ?? 0;
  return share > 0 ? (data.sources ?? [{ path: data.path, weight: 1 }]) : undefined;
}

/** Returns the largest number of sources of an evaluation. */
export const mostHeldOut = (data: Data): number => Math.max(1, ...heldOutParts.map((part) => heldOutSources(data, part)?.length ?? 0));
