/** Depths of multi-token prediction. Not in job.ts, because the page in a browser loads no schema. */

/** Returns the number of depths of multi-token prediction; 0 without it. */
export const depthsOf = ({ mtp }: { readonly mtp?: { readonly layers: number } | null }): number => mtp?.layers ?? 0;
