/**
 * Comm among ranks that are coroutines of one process: a collective is performed when the last of its group has come, and a
 * letter waits for its receiver. How values move is for those who hold them.
 */

import type { Buffer, Collective, Plan } from "../schemas/plan.ts";
import { groupMembers, numberInStage, rankAt, stageOfRank } from "../schemas/sharding.ts";
import type { Comm } from "./backend.ts";

export interface Transport<Message> {
  /** All members of the group, ascending, stand at the move. */
  perform(group: readonly number[], i: Collective, copy: number): void;
  /** A copy of what a rank sends. */
  send(rank: number, buffer: Buffer, copy: number): Message;
  receive(rank: number, buffer: Buffer, copy: number, message: Message): void;
}
export interface RankTable {
  stageOf(rank: number): number;
  bufferOf(rank: number, id: string): Buffer;
  /** Who takes part in a move of this rank's, ascending. */
  groupOf(rank: number, i: Collective): readonly number[];
}

export function rankTable({ mesh, programs }: Plan): RankTable {
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const everyone = Array.from({ length: mesh.world }, (_, r) => r);
  const stageOf = (rank: number): number => stageOfRank(mesh, rank);
  const find = (rank: number, i: Collective): readonly number[] =>
    i.world ? everyone : groupMembers(mesh, numberInStage(mesh, rank), i.subAxes).map((m) => rankAt(mesh, stageOf(rank), m));
  /** By rank: asked for every time that a rank looks whether the others are there. */
  const known = everyone.map(() => new Map<Collective, readonly number[]>());
  return {
    stageOf,
    bufferOf: (rank, id) => buffers[stageOf(rank)]!.get(id)!,
    groupOf(rank, i) {
      let group = known[rank]!.get(i);
      if (!group) known[rank]!.set(i, (group = find(rank, i)));
      return group;
    },
  };
}

export function inProcessComm<Message>(
  { mesh }: Plan,
  { stageOf, bufferOf, groupOf }: RankTable,
  { perform, send, receive }: Transport<Message>,
): Comm {
  const waiting = new Map<string, Set<number>>();
  const done = new Map<string, Set<number>>();
  const mail = new Map<string, Message[]>();
  const peerOf = (rank: number, stage: number): number => rankAt(mesh, stage, numberInStage(mesh, rank));

  return {
    collective(rank, i, at) {
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
      perform(group, i, at.copy);
      if (group.length > 1) done.set(key, new Set(group.filter((r) => r !== rank)));
      return true;
    },
    send(rank, i, at) {
      const key = `${rank}>${peerOf(rank, i.peer)}|${i.tag}|${at.microbatch}`;
      mail.set(key, [...(mail.get(key) ?? []), send(rank, bufferOf(rank, i.buffer), at.copy)]);
    },
    recv(rank, i, at) {
      const key = `${peerOf(rank, i.peer)}>${rank}|${i.tag}|${at.microbatch}`;
      const letters = mail.get(key);
      if (!letters) return false;
      receive(rank, bufferOf(rank, i.buffer), at.copy, letters.shift()!);
      if (!letters.length) mail.delete(key);
      return true;
    },
  };
}
