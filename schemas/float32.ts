/** The bounds of float32. */

/** The largest finite float32. Kernels receive float32 attributes, and larger numbers would be infinite. */
export const LARGEST = (2 - 2 ** -23) * 2 ** 127;
/** The smallest float32 that no device flushes to zero. */
export const SMALLEST = 2 ** -126;
