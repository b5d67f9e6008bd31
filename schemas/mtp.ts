/** Multi-token prediction in a model, apart from the job's schema: the page in a browser has no schema. */

/** The layers of multi-token prediction; 0 without it. */
export const depthsOf = ({ mtp }: { readonly mtp?: { readonly layers: number } | null }): number => mtp?.layers ?? 0;
