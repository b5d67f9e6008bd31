/** Where the time of a start goes, from the begin of the process to the end of the first step. */

/** The parts of a start, in their order: reading the plan, opening devices, kernels, weights, and the first step. */
export const startupParts = ["plan", "device", "kernels", "weights", "first_step"] as const;
/** One of `startupParts`. */
export type StartupPart = (typeof startupParts)[number];

/** Seconds of each part. */
export type StartupSeconds = Readonly<Record<StartupPart, number>>;
