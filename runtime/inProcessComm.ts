/**
 * Comm among ranks that are coroutines of one process: a collective is performed when the last of its group has come, and a
 * letter waits for its receiver. How values move is for those who hold them.
 */

import type { Buffer, Move, Plan } from "../schemas/plan.ts";
import { membersOf, numberInStage, rankAt, stageOfRank } from "../schemas/sharding.ts";
import type { Comm } from "./backend.ts";

export interface Carrier<Letter> {
  /** All members of the group, ascending, stand at the move. */
  perform(group: readonly number[], i: Move, slot: number): void;
  /** A copy of what a rank sends. */
  post(rank: number, buffer: Buffer, slot: number): Letter;
  take(rank: number, buffer: Buffer, slot: number, letter: Letter): void;
}
export interface Ranks {
  stageOf(rank: number): number;
  bufferOf(rank: number, id: string): Buffer;
  /** Who takes part in a move of this rank's, ascending. */
  groupOf(rank: number, i: Move): readonly number[];
}

export function ranksOf({ mesh, programs }: Plan): Ranks {
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const everyone = Array.from({ length: mesh.world }, (_, r) => r);
  const stageOf = (rank: number): number => stageOfRank(mesh, rank);
  const find = (rank: number, i: Move): readonly number[] =>
    i.world ? everyone : membersOf(mesh, numberInStage(mesh, rank), i.factors).map((m) => rankAt(mesh, stageOf(rank), m));
  /** By rank: asked for every time that a rank looks whether the others are there. */
  const known = everyone.map(() => new Map<Move, readonly number[]>());
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

export function meetHere<Letter>({ mesh }: Plan, { stageOf, bufferOf, groupOf }: Ranks, { perform, post, take }: Carrier<Letter>): Comm {
  const waiting = new Map<string, Set<number>>();
  const done = new Map<string, Set<number>>();
  const mail = new Map<string, Letter[]>();
  const peerOf = (rank: number, stage: number): number => rankAt(mesh, stage, numberInStage(mesh, rank));

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
      const key = `${rank}>${peerOf(rank, i.peer)}|${i.tag}|${at.microbatch}`;
      mail.set(key, [...(mail.get(key) ?? []), post(rank, bufferOf(rank, i.buffer), at.slot)]);
    },
    recv(rank, i, at) {
      const key = `${peerOf(rank, i.peer)}>${rank}|${i.tag}|${at.microbatch}`;
      const letters = mail.get(key);
      if (!letters) return false;
      take(rank, bufferOf(rank, i.buffer), at.slot, letters.shift()!);
      if (!letters.length) mail.delete(key);
      return true;
    },
  };
}
