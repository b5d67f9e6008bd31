/**
 * Collectives on host memory. Sums run in the order of the group's members, so equal plans give equal bits.
 */
import { itemOf } from "../../schemas/lookup.ts";
import type { CollectiveKind, Plan } from "../../schemas/plan.ts";
import type { AsyncNeeds } from "../asyncCollectives.ts";
import type { Comm, HostData, HostRankDevice } from "../backend.ts";
import { inProcessComm, rankTable, type Transport } from "../inProcessComm.ts";

/** Returns the communication of all ranks on the CPU. `isHeld`: see `AsyncNeeds`. */
export function cpuComm(plan: Plan, deviceOf: (rank: number) => HostRankDevice, isHeld?: AsyncNeeds["isHeld"]): Comm {
  const ranks = rankTable(plan);
  const { bufferOf } = ranks;
  const transport: Transport<HostData> = {
    perform(group, i, copy) {
      const held = group.map((rank) => deviceOf(rank).peek(bufferOf(rank, i.from), copy));
      const made = group.map((rank, member) => ({ rank, data: collective[i.how](held, member) }));
      // write after all reads: source and destination may overlap
      for (const { rank, data } of made) deviceOf(rank).write(bufferOf(rank, i.to), copy, data);
    },
    send: (rank, b, copy) => deviceOf(rank).peek(b, copy).slice(),
    receive: (rank, b, copy, message) => deviceOf(rank).write(b, copy, message),
  };
  return inProcessComm(plan, ranks, transport, isHeld);
}

/** The result of a member, from the buffers of all members. */
const collective: Readonly<Record<CollectiveKind, (held: readonly HostData[], member: number) => HostData>> = {
  all_gather: (held) => blocks(held),
  all_to_all: (held, member) => blocks(held.map((h) => blockOf(h, member, held.length))),
  reduce_scatter: (held, member) =>
    held.map((h) => blockOf(h, member, held.length)).reduce(sum, new Float32Array(itemOf(held, 0, "member").length / held.length)),
  all_reduce: (held) => held.reduce(sum, new Float32Array(itemOf(held, 0, "member").length)),
  shift: (held, member) => itemOf(held, (member + held.length - 1) % held.length, "member").slice(),
  all_reduce_max: (held) => held.reduce<HostData>((out, x) => out.map((y, i) => Math.max(y, x[i]!)), itemOf(held, 0, "member").slice()),
};
const blockOf = (x: HostData, block: number, of: number): HostData => x.subarray((block * x.length) / of, ((block + 1) * x.length) / of);

function blocks(all: readonly HostData[]): HostData {
  const length = all.reduce((n, x) => n + x.length, 0);
  const out = all[0] instanceof Int32Array ? new Int32Array(length) : new Float32Array(length);
  let at = 0;
  for (const x of all) {
    out.set(x, at);
    at += x.length;
  }
  return out;
}
function sum(out: HostData, x: HostData): HostData {
  for (let i = 0; i < out.length; i++) out[i]! += x[i]!;
  return out;
}
