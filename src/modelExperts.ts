/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute. Dispatch and combine are moves that `shard`
 * inserts between them.
 */
import type { Part } from "./modelParts.ts";
import { logitsOf, type Moe, route } from "./modelRouter.ts";
import { groupedGemm } from "./ops/linear.ts";
import { pack, permute, swigluRows, unpermute } from "./ops/moe.ts";
import type { Value } from "./ops/op.ts";

/** `h` normalised [B,S,D] → what is added to the residual stream [B,S,D]. */
export function experts(part: Part, h: Value, moe: Moe): Value {
  const at = (name: string) => part.at(`moe.${name}`);
  const { map: c, weights: p, rows: routing } = route(part, moe, logitsOf(part, h, moe));
  // the dispatcher `all_gather`: tokens are gathered over ep, and each rank permutes those of its own experts
  const pin = (v: Value) => {
    if (moe.dispatch === "all_gather") v.node!.pin = { dim: "E", axis: "ep", path: "model.moe.dispatch" };
    return v;
  };
  const rows = pin(permute.of({ x: h, c }, routing, at("permute")));
  const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: part.weight(name, dims) }, {}, at(name));
  // the router's weight travels beside the row and is applied inside the activation, as Megatron Core does
  const weights = pin(pack.of({ p, c }, routing, at("pack")));
  const act = swigluRows.of({ gate: w("w1", "E@ep,D,F@etp", rows), up: w("w3", "E@ep,D,F@etp", rows), p: weights }, {}, at("swiglu"));
  return pin(unpermute.of({ r: w("w2", "E@ep,F@etp,D", act), c }, routing, at("unpermute")));
}
