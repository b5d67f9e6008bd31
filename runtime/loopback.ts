/**
 * Comm in one process: ranks are coroutines that meet at collectives. Buffers are contiguous blocks; sums run in the order of
 * the group's members, so the same plan gives the same bits.
 */
import { membersOf } from "../schemas/layout.ts";
import type { Buffer, How, Move, Plan } from "../schemas/plan.ts";
import type { Comm, HostData, OpenBackend } from "./backend.ts";

export function loopback(plan: Plan, backends: readonly OpenBackend[]): Comm {
  const { mesh, programs } = plan;
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const stageOf = (rank: number) => Math.floor(rank / mesh.per_stage);
  const bufferOf = (rank: number, id: string): Buffer => buffers[stageOf(rank)]!.get(id)!;
  const waiting = new Map<string, Set<number>>();
  const done = new Map<string, Set<number>>();
  const mail = new Map<string, HostData[]>();

  const groupOf = (rank: number, i: Move): number[] => {
    if (i.world) return backends.map((_, r) => r);
    const base = stageOf(rank) * mesh.per_stage;
    return membersOf(mesh, rank - base, i.factors).map((m) => m + base);
  };

  function perform(group: readonly number[], i: Move, slot: number): void {
    const held = group.map((rank) => backends[rank]!.peek(bufferOf(rank, i.from), slot));
    const made = group.map((_, member) => collective[i.how](held, member));
    // written last: source and destination may be the same bytes
    for (const [member, rank] of group.entries()) backends[rank]!.write(bufferOf(rank, i.to), slot, made[member]!);
  }

  return {
    move(rank, i, at) {
      const group = groupOf(rank, i);
      const key = `${i.id}|${at.tag}|${i.world ? "world" : stageOf(rank)}|${group[0]}`;
      const ready = done.get(key);
      if (ready?.delete(rank)) {
        if (ready.size === 0) done.delete(key);
        return true;
      }
      const here = (waiting.get(key) ?? new Set()).add(rank);
      waiting.set(key, here);
      if (here.size < group.length) return false;
      waiting.delete(key);
      perform(group, i, at.slot);
      if (group.length > 1) done.set(key, new Set(group.filter((r) => r !== rank)));
      return true;
    },
    send(rank, i, at) {
      const peer = i.peer * mesh.per_stage + (rank % mesh.per_stage);
      const key = `${rank}>${peer}|${i.tag}|${at.tag}`;
      mail.set(key, [...(mail.get(key) ?? []), backends[rank]!.peek(bufferOf(rank, i.buffer), at.slot).slice()]);
    },
    recv(rank, i, at) {
      const peer = i.peer * mesh.per_stage + (rank % mesh.per_stage);
      const key = `${peer}>${rank}|${i.tag}|${at.tag}`;
      const letter = mail.get(key)?.shift();
      if (!letter) return false;
      if (!mail.get(key)!.length) mail.delete(key);
      backends[rank]!.write(bufferOf(rank, i.buffer), at.slot, letter);
      return true;
    },
  };
}

/** What a member gets, from what all members hold. */
const collective: Readonly<Record<How, (held: readonly HostData[], member: number) => HostData>> = {
  all_gather: (held) => blocks(held),
  all_to_all: (held, member) => blocks(held.map((h) => blockOf(h, member, held.length))),
  reduce_scatter: (held, member) =>
    held.map((h) => blockOf(h, member, held.length)).reduce(sum, new Float32Array(held[0]!.length / held.length)),
  all_reduce: (held) => held.reduce(sum, new Float32Array(held[0]!.length)),
  all_reduce_max: (held) => held.reduce<HostData>((out, x) => out.map((y, i) => Math.max(y, x[i]!)), held[0]!.slice()),
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
