/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute, and beside it the experts that all tokens share.
 * Dispatch and combine are moves that `shard` inserts between them.
 */

import { add, gemm, groupedGemm } from "../ops/linear.ts";
import { gated, pack, permute, swigluRows, unpermute } from "../ops/moe.ts";
import type { Value } from "../ops/op.ts";
import { folded } from "../ops/regrid.ts";
import { areApart, buildMesh } from "../passes/mesh.ts";
import { type Part, streamCut } from "./builder.ts";
import { dense } from "./feedForward.ts";
import { logitsOf, type Moe, type Routing, route } from "./router.ts";

/** `h` normalised [B,S,D] → what is added to the residual stream [B,S,D]. */
export function experts(part: Part, h: Value, moe: Moe): Value {
  const { weight } = part;
  const at = (name: string) => part.at(`moe.${name}`);
  const routing = route(part, moe, logitsOf(part, h, moe));
  if (moe.latent === null) return withShared(part, h, moe, routed(part, h, moe, routing, "D"));
  const down = gemm.of({ x: h, w: weight("latent.down", "D,L") }, {}, at("latent_down"));
  const up = gemm.of({ x: routed(part, down, moe, routing, "L"), w: weight("latent.up", "L,D") }, {}, at("latent_up"));
  return withShared(part, h, moe, up);
}

/** Tokens as the experts' grid cuts them, and back. Where the grids nest that is how they lie; else each rank keeps those it has (P104). */
function seamOf({ job, at }: Part): Readonly<Record<"enter" | "leave", (v: Value, name: string) => Value>> {
  const mesh = buildMesh(job);
  if (!areApart(mesh)) return { enter: (v) => v, leave: (v) => v };
  const { train, parallel, model } = job;
  const stream = streamCut(job);
  const there = [["edp", "ep", "etp"], [], []];
  const count = [train.micro_batch * mesh.per_stage, model.seq / (parallel.context * parallel.tensor)];
  const whole = [train.micro_batch * parallel.data, model.seq];
  return {
    enter: (v, name) => folded(v, count, { from: stream, to: there }, at(`moe.${name}`)),
    leave: (v, name) => folded(v, whole, { from: there, to: stream }, at(`moe.${name}`)),
  };
}

/** The chosen experts of tokens of a width. */
function routed(part: Part, h: Value, moe: Moe, { map, weights: chosen, rows: limits }: Routing, width: "D" | "L"): Value {
  const at = (name: string) => part.at(`moe.${name}`);
  const { enter, leave } = seamOf(part);
  const [x, c, p] = [enter(h, "tokens"), enter(map, "map"), enter(chosen, "weights")];
  // the dispatcher `all_gather`: tokens are gathered over ep, and each rank permutes those of its own experts
  const pin = (v: Value) => {
    if (moe.dispatch === "all_gather") v.node!.pin = { dim: "E", axis: "ep", path: "model.moe.dispatch" };
    return v;
  };
  const rows = pin(permute.of({ x, c }, limits, at("permute")));
  const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: part.weight(name, dims) }, {}, at(name));
  // the router's weight travels beside the row and is applied inside the activation, as Megatron Core does
  const weights = pin(pack.of({ p, c }, limits, at("pack")));
  const into = `E@ep,${width},F@etp`;
  const act = swigluRows.of({ gate: w("w1", into, rows), up: w("w3", into, rows), p: weights }, {}, at("swiglu"));
  return leave(pin(unpermute.of({ r: w("w2", `E@ep,F@etp,${width}`, act), c }, limits, at("unpermute"))), "combined");
}

function withShared(part: Part, h: Value, { shared }: Moe, y: Value): Value {
  if (shared === null) return y;
  const at = (name: string) => part.at(`moe.shared.${name}`);
  const all = dense(part, h, "X", "shared.", "moe.shared");
  const weighed = () => {
    const gate = gemm.of({ x: h, w: part.weight("shared.gate", "D,1") }, {}, at("gate"));
    return gated.of({ x: all, gate }, { C: part.job.model.hidden }, at("gated"));
  };
  return add.of({ a: y, b: shared.gate ? weighed() : all }, {}, at("sum"));
}
