/** Positions of a model: 0 the embedding, then the layers, the depths of multi-token prediction, and last the head. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";

type Model = Pick<Job["model"], "layers" | "mtp">;
/** Returns the position of a layer, `layer` from 0. */
export const layerAt = (layer: number): number => 1 + layer;
/** Returns the layer at a position; undefined for the embedding, multi-token prediction and the head. */
export const layerAtPosition = ({ layers }: Pick<Model, "layers">, position: number): number | undefined =>
  position >= 1 && position <= layers ? position - 1 : undefined;
/** Returns the part of an id that names its layer. */
export const layerPart = (layer: number): string => `layers.${layer}.`;
/** Returns the part of an id that names a depth of multi-token prediction, `depth` from 0. */
export const depthPart = (depth: number): string => `mtp.${depth}.`;
/** Returns the position of depth `k` of multi-token prediction, `k` from 1. */
export const depthAt = ({ layers }: Model, k: number): number => layers + k;
/** Returns the position of the head. */
export const headAt = (model: Model): number => model.layers + depthsOf(model) + 1;
