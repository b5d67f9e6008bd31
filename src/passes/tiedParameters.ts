/** Parameters that several stages use: gradients of the copies go to the owner's stage, and the updated parameter comes back. */
import { headAt } from "../model/positions.ts";
import { accumulate } from "../ops/gemm.ts";
import { invariant, type Value } from "../ops/op.ts";
import { type Graph, idOf } from "./backward.ts";
import type { ProgramBuilder } from "./programBuilder.ts";
import type { Reason } from "./sharding/steps.ts";

/** Returns the tied copies of parameters with their owner, the origin of their transfers, and a name that is unique per owner. */
function tiedPairs({ job, placement }: ProgramBuilder, graph: Graph) {
  const stageOf = (v: Value): number => {
    const placed = placement.get(v);
    invariant(placed !== undefined, `${idOf(v)} has no placement`);
    return placed.stage;
  };
  const owners: Value[] = [];
  return graph.parameters.flatMap((copy) => {
    const { tiedTo: owner, position = 0 } = copy.leaf ?? {};
    if (!owner) return [];
    const nth = owners.filter((other) => other === owner).length;
    owners.push(owner);
    const isMtp = position < headAt(job.model);
    const origin = isMtp
      ? { op: "mtp.0.embedding", because: "the embedding is used on the first stage and by multi-token prediction", path: "model.mtp" }
      : { op: "logits", because: "the embedding is used on the first and on the last stage", path: "model.tie_embeddings" };
    const why: Reason = { ...origin, position };
    return [{ copy, owner, name: `tied${nth > 0 ? nth + 1 : ""}`, why, copyAt: stageOf(copy), ownerAt: stageOf(owner) }];
  });
}

/** Emits the transfer of the gradient of each tied copy to the stage of its owner, and its addition there. */
export function shareTied(role: ProgramBuilder, graph: Graph, gradientOf: (p: Value) => string): void {
  for (const { copy, owner, name, why, copyAt: from, ownerAt: to } of tiedPairs(role, graph)) {
    const tag = `${idOf(owner)}.grad.${name}`;
    const ends = { from, to };
    if (role.isMine(from)) role.transfer(role.blocks.step, "send", gradientOf(copy), ends, why, tag);
    if (!role.isMine(to)) continue;
    const gradient = role.buffers.get(gradientOf(owner));
    invariant(gradient !== undefined && !gradient.partial?.length, `${tag}: the gradient of the owner is missing or partial`);
    const { within: _, ...own } = gradient;
    const received = role.add({ ...own, id: tag, kind: "workspace" });
    role.transfer(role.blocks.step, "recv", received, ends, why, tag);
    role.emit(role.blocks.step, role.elementwise(accumulate, `${tag}.accumulate`, { x: received }, { y: own.id }));
  }
}

/** Emits the transfer of the updated parameter from its owner to each tied copy. */
export function returnTied(role: ProgramBuilder, graph: Graph): void {
  for (const { copy, owner, name, why, ownerAt: from, copyAt: to } of tiedPairs(role, graph)) {
    const tag = `${idOf(owner)}.${name}`;
    if (role.isMine(from)) role.transfer(role.blocks.step, "send", idOf(owner), { from, to }, why, tag);
    if (role.isMine(to)) role.transfer(role.blocks.step, "recv", idOf(copy), { from, to }, why, tag);
  }
}
