/** Writes `parallel.layout` from the layers of each part. */

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
