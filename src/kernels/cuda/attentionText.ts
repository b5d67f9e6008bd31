/** What all CUDA sources of attention say alike: how scores are scaled, which keys a query sees, and where a piece begins. */
import { render } from "../../../templates/bindings.ts";
import type { AttentionSizes } from "../attention.ts";

/** What a product of a query and a key is multiplied by, for a natural exponent and for one of 2. */
export const scales = ({ scale }: AttentionSizes) => ({ scale: scale.toPrecision(9), scale2: (Math.LOG2E * scale).toPrecision(9) });

export const sightText = ({ chunk, ranks, part }: AttentionSizes): string =>
  render("cuda/attention_sight.cuh", { zigzag: chunk > 0, part: flag(part), plain: flag(!part && chunk === 0), chunk, ranks });
const flag = (yes: boolean): string => (yes ? "true" : "false");

/** How an entry is told where queries begin, and keys where they are a piece: its parameters, what `sightOf` takes of them, a launch's arguments. */
export const beginnings = ({ part }: AttentionSizes) => ({
  params: part ? "int start, int keyStart" : "int start",
  starts: part ? "start, keyStart" : "start, 0",
  keyStart: part ? "keyStart" : "0",
  args: part ? ["start(S)", "start(U)"] : ["start(S)"],
});
