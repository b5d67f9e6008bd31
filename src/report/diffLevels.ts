/** The levels of a comparison, apart from what compares, so that the command line starts fast. */
export const diffLevels = ["job", "placement", "summary", "program"] as const;
/** The name of a level. */
export type DiffLevel = (typeof diffLevels)[number];
