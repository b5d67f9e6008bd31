/** Text of the pieces, the moves between them and the transfers between stages, for `compile --emit sharded`. */

import type { Value } from "../ops/op.ts";
import { idOf } from "./backward.ts";
import type { Piece } from "./layout.ts";
import { axesName, type Mesh } from "./mesh.ts";
import type { Sharded, Step } from "./shard.ts";

/** A line for each step: those of a microbatch, then those at the end of a step. */
export function printSharded({ steps, deferred }: Sharded, mesh: Mesh): string {
  const axes = (fs: readonly number[], v: Value) => axesName(mesh, fs, v.ragged > 0);
  const shape = ({ value: v, layout }: Piece) =>
    `[${v.sizes.map((n, slot) => `${n}${layout.cuts[slot]!.length ? `@${axes(layout.cuts[slot]!, v)}` : ""}`).join(v.ragged ? " " : ",")}]${layout.sum.length ? ` owes ${axes(layout.sum, v)}` : ""}${layout.max.length ? ` owes max ${axes(layout.max, v)}` : ""}`;
  const line = (s: Step): string =>
    s.kind === "compute"
      ? `${s.stage} ${s.node.id} = ${s.node.op.name}(${s.ins.map((p) => idOf(p.value)).join(", ")}) -> ${s.outs.map(shape).join(", ")}`
      : s.kind === "move"
        ? `${s.stage}   ${s.how}${s.factors.length ? ` over ${axes(s.factors, s.from.value)}` : ""}: ${idOf(s.from.value)} ${shape(s.from)} -> ${s.how === "fold" ? `${idOf(s.to.value)} ` : ""}${shape(s.to)}  for ${s.why.op}: ${s.why.because} (${s.why.path})`
        : s.kind === "send"
          ? `${s.stage}   send to ${s.to}: ${idOf(s.piece.value)} ${shape(s.piece)}`
          : `${s.stage}   accumulate ${idOf(s.piece.value)} into the gradient of ${idOf(s.parameter)}`;
  return [...steps.map(line), "end of step", ...deferred.map(line), ""].join("\n");
}
