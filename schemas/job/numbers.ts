/** Numbers that several sections of a job share. */
import { z } from "zod";
import { LARGEST } from "../float32.ts";

/** The largest number of layers: a bound on the size of a plan, far above any model. */
export const MOST_LAYERS = 4096;

/** A number of things, at least 1. */
export const count = z.int().min(1);
/** A number that float32 holds. */
export const real = z.number().min(-LARGEST).max(LARGEST);
/** A factor that is multiplied by counts or normal draws before conversion to float32; the bound keeps products finite. */
export const factor = z.number().min(-1e30).max(1e30);
