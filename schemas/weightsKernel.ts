/** The op of the kernel that the runtime itself launches: it writes initial weights. Only plans for CUDA have it. Apart from the schema of plans, which is slow to load. */
export const WEIGHTS = "weights";
