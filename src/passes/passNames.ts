/** The stages of the compiler that have a text form, in the order in which they run. */
export const stages = ["mesh", "graph", "sharded", "schedule", "program", "memory", "kernels"] as const;
/** The name of a compiler stage, as `--emit` takes it. */
export type Stage = (typeof stages)[number];
