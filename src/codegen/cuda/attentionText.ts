/** What all CUDA sources of attention say alike: how scores are scaled, which keys a query sees, and where a piece begins. */
import { render } from "../../../templates/bindings.ts";
import { runtimeAttrs } from "../../ops/dropout.ts";
import type { AttentionSizes } from "../attentionSizes.ts";
import { attributeOf, startOf } from "../launchArgs.ts";
import { f32 } from "./text.ts";

/** What a product of a query and a key is multiplied by, for a natural exponent and for one of 2. */
export const scales = ({ scale }: AttentionSizes) => ({ scale: scale.toPrecision(9), scale2: (Math.LOG2E * scale).toPrecision(9) });

/** Which weights are dropped, where some are. */
export const randomText = ({ drops, chunk, M }: AttentionSizes): string =>
  drops
    ? render("cuda/attention_random.cuh", {
        ...{ philox: render("cuda/philox.cuh", {}), zigzag: chunk > 0, keysAligned4: flag(drops.keysAligned4) },
        ...{ threshold: `${drops.threshold}u`, factor: f32(drops.factor), group: M },
      })
    : "";

export const causalMaskText = ({ chunk, ranks, part }: AttentionSizes): string =>
  render("cuda/attention_mask.cuh", { zigzag: chunk > 0, part: flag(part), plain: flag(!part && chunk === 0), chunk, ranks });
const flag = (yes: boolean): string => (yes ? "true" : "false");

/**
 * How an entry is told where queries begin, keys where they are a piece, and whose bits drop weights: its parameters, what `sightOf` takes
 * of them, a launch's arguments.
 */
export const startTexts = ({ part, drops }: AttentionSizes) => ({
  params: [part ? "int start, int keyStart" : "int start", ...(drops ? ["const int* sample, int headStart, u32 key0, u32 key1"] : [])].join(
    ", ",
  ),
  names: [part ? "start, keyStart" : "start", ...(drops ? ["sample, headStart, key0, key1"] : [])].join(", "),
  starts: part ? "start, keyStart" : "start, 0",
  keyStart: part ? "keyStart" : "0",
  drops: drops !== undefined,
  args: [
    ...(part ? [startOf("S"), startOf("U")] : [startOf("S")]),
    ...(drops ? ["sample", startOf("G"), ...runtimeAttrs.map((name) => attributeOf(name))] : []),
  ],
});
