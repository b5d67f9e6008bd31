/** Positions of a model: 0 the embedding, then the layers, the depths of multi-token prediction, and last the head. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";

type Model = Pick<Job["model"], "layers" | "mtp">;
/** Returns the position of a layer, `layer` from 0. */
export const layerAt = (layer: number): number => 1 + layer;
/** Returns the position of depth `k` of multi-token prediction, `k` from 1. */
export const depthAt = ({ layers }: Model, k: number): number => layers + k;
/** Returns the position of the head. */
export const headAt = (model: Model): number => model.layers + depthsOf(model) + 1;
