/** Formats ranks as ranges: `0-2, 5, 7-9`. */
export function rankList(ranks: readonly number[]): string {
  const sorted = [...ranks].sort((a, b) => a - b);
  const runs: [number, number][] = [];
  for (const rank of sorted) {
    const last = runs.at(-1);
    if (last && rank === last[1] + 1) last[1] = rank;
    else runs.push([rank, rank]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}-${to}`)).join(", ");
}

/** Formats ranks with the noun: `rank 3`, `ranks 0-2, 5`. */
export const ranksText = (ranks: readonly number[]): string => `rank${ranks.length === 1 ? "" : "s"} ${rankList(ranks)}`;
