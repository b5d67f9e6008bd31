/** Writes `parallel.layout`: from the layers of each part, or for parts of equal length. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";

/** Returns a layout: part i has `counts[i]` layers; neighbours of one size are a group, `(tt|)*7`. `depths`: those of multi-token prediction. */
export function layoutText(counts: readonly number[], depths: number): string {
  const block = (count: number): string => (count > 4 ? `t*${count}` : "t".repeat(count));
  const inner = counts.slice(1, -1);
  const runs: { readonly count: number; readonly times: number }[] = [];
  for (const count of inner) {
    const before = runs.at(-1);
    if (before?.count === count) runs[runs.length - 1] = { count, times: before.times + 1 };
    else runs.push({ count, times: 1 });
  }
  const middle = runs.map(({ count, times }) => (times > 2 ? `(${block(count)}|)*${times}` : `${block(count)}|`.repeat(times))).join("");
  const [first = 0] = counts;
  const end = counts.length > 1 ? block(counts.at(-1) ?? 0) : "";
  return `E${block(first)}${counts.length > 1 ? "|" : ""}${middle}${end}${"m".repeat(depths)}L`;
}

/**
 * Returns a layout of `parts` parts in which embedding and head count as a layer each, and so does each depth of multi-token prediction, which
 * stays with the head; null if the layers are spread evenly without one, undefined if there are more parts than these. Parts in the middle are the longer ones: the
 * first have the embedding and most activation copies, the last one the head.
 */
export function evenLayout(model: Job["model"], parts: number): string | null | undefined {
  const depths = depthsOf(model);
  if (parts === 1 || (model.layers % parts === 0 && depths === 0)) return null;
  const places = model.layers + depths + 2;
  const longer = places % parts;
  const from = Math.floor((parts - longer) / 2);
  const counts = Array.from({ length: parts }, (_, i) => Math.floor(places / parts) + (i >= from && i < from + longer ? 1 : 0));
  // what the embedding takes of the first part, and head and depths of the last, others have to make room for
  const own = counts.map((count, i) => count - (i === 0 ? 1 : 0) - (i === parts - 1 ? 1 + depths : 0));
  let lacking = 0;
  for (const i of own.keys()) {
    const at = parts - 1 - i;
    const count = (own[at] ?? 0) - lacking;
    lacking = Math.max(0, -count);
    own[at] = Math.max(0, count);
  }
  return lacking > 0 ? undefined : layoutText(own, depths);
}
