/** Layers in ids and in texts about them: an id has a part for its layer (`layers.3.wq`), and which layer that is stands in a field of the plan. */
import { layerPart } from "../model/positions.ts";

/** Replaces the name of a layer in ids and texts about it: `layers.3.wq` becomes `layers.*.wq`. */
export const anyLayer = (text: string, layer: number | null | undefined): string =>
  layer === undefined || layer === null ? text : text.replaceAll(layerPart(layer), "layers.*.");

/** Replaces the name of a layer by its distance from `base`, because equal layers share their texts: `layers.4.wq` from 3 becomes `layers.+1.wq`. */
export const fromLayer = (text: string, layer: number | undefined, base: number): string =>
  layer === undefined ? text : text.replaceAll(layerPart(layer), `layers.${layer < base ? "" : "+"}${layer - base}.`);
