/** Who sends how much to whom: the bytes of a step between ranks, from the flows of each stage. */
import { numberInStage, rankAt, stageOfRank } from "../../schemas/sharding.ts";
import type { TrafficFlow } from "../report/view/planView.ts";
import type { PlanModel } from "./planModel.ts";

/** Calls `send` with each peer of a rank in a flow of its stage, and the bytes that go there. */
function peersOf(model: PlanModel, flow: TrafficFlow, rank: number, send: (to: number, bytes: number) => void): void {
  const { mesh } = model.view;
  if (flow.pattern === "send") {
    send(rankAt(mesh, flow.peer ?? 0, numberInStage(mesh, rank)), flow.bytes);
    return;
  }
  if (flow.world) {
    send((rank + 1) % mesh.world, flow.bytes);
    return;
  }
  const members = model.members(rank, flow.subAxes);
  if (members.length < 2) return;
  if (flow.pattern === "ring") {
    send(members[(members.indexOf(rank) + 1) % members.length] ?? rank, flow.bytes);
    return;
  }
  for (const to of members) if (to !== rank) send(to, flow.bytes / (members.length - 1));
}

/** Adds to `into` [world × world] the bytes that each rank sends to each other in a step, over the axes of `isShown`. */
export function addTraffic(model: PlanModel, into: Float32Array, isShown: (axes: string) => boolean): void {
  const { mesh } = model.view;
  const byStage = new Map<number, TrafficFlow[]>();
  for (const flow of model.view.flows) if (isShown(flow.axes)) byStage.set(flow.stage, [...(byStage.get(flow.stage) ?? []), flow]);
  for (let rank = 0; rank < mesh.world; rank++)
    for (const flow of byStage.get(stageOfRank(mesh, rank)) ?? [])
      peersOf(model, flow, rank, (to, bytes) => {
        into[rank * mesh.world + to] = (into[rank * mesh.world + to] ?? 0) + bytes;
      });
}

/** Returns the flows over which a rank sends to another, and the bytes of each in a step. */
export function flowsBetween(model: PlanModel, from: number, to: number): { readonly axes: string; readonly bytes: number }[] {
  const found: { axes: string; bytes: number }[] = [];
  const stage = model.stageOf(from);
  for (const flow of model.view.flows.filter((f) => f.stage === stage))
    peersOf(model, flow, from, (peer, bytes) => {
      if (peer === to) found.push({ axes: flow.axes, bytes });
    });
  return found.sort((a, b) => b.bytes - a.bytes);
}

/** Returns the bytes that a rank sends to another in a step. */
export const bytesBetween = (model: PlanModel, from: number, to: number): number =>
  flowsBetween(model, from, to).reduce((sum, { bytes }) => sum + bytes, 0);
