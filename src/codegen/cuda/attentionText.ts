/** Text that all CUDA sources of attention share: the scale of scores, the causal mask, and the starts of shards. */
import { render } from "../../../templates/bindings.ts";
import { runtimeAttrs } from "../../ops/dropout.ts";
import type { AttentionSizes } from "../attentionSizes.ts";
import { attributeOf, startOf } from "../launchArgs.ts";
import { f32 } from "./text.ts";

/** Returns the scale of scores as text: for exponents of e (`scale`) and of 2 (`scale2`). */
export const scales = ({ scale }: AttentionSizes) => ({ scale: scale.toPrecision(9), scale2: (Math.LOG2E * scale).toPrecision(9) });

/** Returns the text of dropout, or nothing without dropout. */
export const randomText = ({ drops, chunk, M }: AttentionSizes): string =>
  drops
    ? render("cuda/attention_random.cuh", {
        ...{ philox: render("cuda/philox.cuh", {}), zigzag: chunk > 0, inBlocksOf16: flag(drops.inBlocksOf16) },
        ...{ threshold: `${drops.threshold}u`, factor: f32(drops.factor), group: M },
      })
    : "";

/** Returns the text of the causal mask. */
export const causalMaskText = ({ chunk, ranks, part, documents }: AttentionSizes): string =>
  render("cuda/attention_mask.cuh", {
    ...{ zigzag: chunk > 0, part: flag(part || documents), plain: flag(!part && !documents && chunk === 0) },
    ...{ chunk, ranks, documents },
  });
const flag = (yes: boolean): string => (yes ? "true" : "false");

/**
 * Returns the text of the parameters of an entry that give the starts of the shards of queries and keys, the random words of dropout, and the
 * documents: its parameters, the arguments of `randomOf` and `causalMaskOf`, and the arguments of a launch.
 */
export const startTexts = ({ part, drops, documents }: AttentionSizes) => ({
  params: [
    part ? "int start, int keyStart" : "int start",
    ...(drops ? ["const int* sample, int headStart, u32 key0, u32 key1"] : []),
    ...(documents ? ["const int* documents"] : []),
  ].join(", "),
  names: [
    part ? "start, keyStart" : "start",
    ...(drops ? ["sample, headStart, key0, key1"] : []),
    ...(documents ? ["documents"] : []),
  ].join(", "),
  starts: part ? "start, keyStart" : "start, 0",
  maskArgs: `${part ? "start, keyStart" : "start, 0"}${documents ? ", documents" : ""}`,
  keyStart: part ? "keyStart" : "0",
  drops: drops !== undefined,
  documents,
  args: [
    ...(part ? [startOf("S"), startOf("U")] : [startOf("S")]),
    ...(drops ? ["sample", startOf("G"), ...runtimeAttrs.map((name) => attributeOf(name))] : []),
    ...(documents ? ["documents"] : []),
  ],
});
