/** Numbers that several sections of a job share. */
import { z } from "zod";

/** The largest finite float32. Kernels receive float32 attributes, and larger numbers would be infinite. */
export const LARGEST = (2 - 2 ** -23) * 2 ** 127;
/** The smallest float32 that no device flushes to zero. */
export const SMALLEST = 2 ** -126;

/** The largest number of layers: a bound on the size of a plan, far above any model. */
export const MOST_LAYERS = 4096;

/** A number of things, at least 1. */
export const count = z.int().min(1);
/** A number that float32 holds. */
export const real = z.number().min(-LARGEST).max(LARGEST);
/** A factor that is multiplied by counts or normal draws before conversion to float32; the bound keeps products finite. */
export const factor = z.number().min(-1e30).max(1e30);
