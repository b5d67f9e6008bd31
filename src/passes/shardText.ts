/** Text of the sharded graph, for `compile --emit sharded`. */

import type { Value } from "../ops/op.ts";
import { idOf } from "./backward.ts";
import { pairs, type ShardedValue } from "./layout.ts";
import { axesName, type Mesh } from "./mesh.ts";
import type { ShardedGraph, ShardStep } from "./sharding/steps.ts";

/** Prints one line per instruction of a microbatch, then one per deferred reduction at the end of the step and per instruction of the updates. */
export function printSharded({ steps, deferred, updates }: ShardedGraph, mesh: Mesh): string {
  const axes = (fs: readonly number[], v: Value) => axesName(mesh, fs, v.ragged > 0);
  const shape = ({ value: v, layout }: ShardedValue) =>
    `[${pairs(v.sizes, layout.shardedBy)
      .map(([n, fs]) => `${n}${fs.length ? `@${axes(fs, v)}` : ""}`)
      .join(
        v.ragged ? " " : ",",
      )}]${layout.partialSum.length ? ` partial over ${axes(layout.partialSum, v)}` : ""}${layout.partialMax.length ? ` partial maximum over ${axes(layout.partialMax, v)}` : ""}`;
  const line = (s: ShardStep): string =>
    s.kind === "compute"
      ? `${s.stage} ${s.node.id} = ${s.node.op.name}(${s.ins.map((p) => idOf(p.value)).join(", ")}) -> ${s.outs.map(shape).join(", ")}`
      : s.kind === "collective"
        ? `${s.stage}   ${s.how}${s.subAxes.length ? ` over ${axes(s.subAxes, s.from.value)}` : ""}: ${idOf(s.from.value)} ${shape(s.from)} -> ${s.how === "regrid" ? `${idOf(s.to.value)} ` : ""}${shape(s.to)}  for ${s.why.op}: ${s.why.because} (${s.why.path})`
        : s.kind === "send"
          ? `${s.stage}   send to ${s.to}: ${idOf(s.shardedValue.value)} ${shape(s.shardedValue)}`
          : `${s.stage}   accumulate ${idOf(s.shardedValue.value)} into the gradient of ${idOf(s.parameter)}`;
  return [...steps.map(line), "end of step", ...deferred.map(line), "updates", ...updates.map(line), ""].join("\n");
}
