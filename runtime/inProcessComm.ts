/**
 * Communication among ranks that are coroutines of one process. A collective is performed when the last rank of its group arrives; a
 * message waits for its receiver. Asynchronous collectives are those of asyncCollectives.ts. The transport moves the values.
 */

import type { Buffer, Collective, Plan } from "../schemas/plan.ts";
import { groupMembers, numberInStage, rankAt, stageOfRank } from "../schemas/sharding.ts";
import { AsyncCollectives, type AsyncNeeds, membersOf } from "./asyncCollectives.ts";
import type { Comm } from "./backend.ts";
import { RankPrograms } from "./rankPrograms.ts";

/** Moves values between local ranks. */
export interface Transport<Message> {
  /** Performs a collective when all members of the group (ascending) have arrived. */
  perform(group: readonly number[], i: Collective, copy: number): void;
  /** Returns a copy of the buffer that a rank sends. */
  send(rank: number, buffer: Buffer, copy: number): Message;
  receive(rank: number, buffer: Buffer, copy: number, message: Message): void;
}
/** Lookups of stages, buffers and groups by rank. */
export interface RankTable {
  stageOf(rank: number): number;
  bufferOf(rank: number, id: string): Buffer;
  /** Returns the group of a rank in a collective, ascending. */
  groupOf(rank: number, i: Collective): readonly number[];
}

/** Returns the lookups of a plan. */
export function rankTable(plan: Plan): RankTable {
  const { mesh } = plan;
  const programs = new RankPrograms(plan);
  const everyone = Array.from({ length: mesh.world }, (_, r) => r);
  const stageOf = (rank: number): number => stageOfRank(mesh, rank);
  const find = (rank: number, i: Collective): readonly number[] =>
    i.world ? everyone : groupMembers(mesh, numberInStage(mesh, rank), i.subAxes).map((m) => rankAt(mesh, stageOf(rank), m));
  /** Cache by collective and rank: `groupOf` is called on every retry of a collective. */
  const known = new Map<Collective, Map<number, readonly number[]>>();
  return {
    stageOf,
    bufferOf: programs.buffer,
    groupOf(rank, i) {
      const groups = known.get(i) ?? new Map<number, readonly number[]>();
      known.set(i, groups);
      const group = groups.get(rank) ?? find(rank, i);
      groups.set(rank, group);
      return group;
    },
  };
}

/** Returns the communication of all ranks of a plan over a transport. `isHeld`: see `AsyncNeeds`. */
export function inProcessComm<Message>(
  { mesh }: Plan,
  { stageOf, bufferOf, groupOf }: RankTable,
  { perform: performOne, send, receive }: Transport<Message>,
  isHeld?: AsyncNeeds["isHeld"],
): Comm {
  const perform: AsyncNeeds["perform"] = (group, i, copy) => {
    for (const member of membersOf(i)) performOne(group, member, copy);
  };
  const streams = new AsyncCollectives({ groupOf, perform, isHeld });
  const waiting = new Map<string, Set<number>>();
  const done = new Map<string, Set<number>>();
  const messages = new Map<string, Message[]>();
  const peerOf = (rank: number, stage: number): number => rankAt(mesh, stage, numberInStage(mesh, rank));

  return {
    collective(rank, i, at) {
      if (i.stream) {
        streams.begin(rank, i, at.copy);
        return true;
      }
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
    wait: (rank, id) => streams.wait(rank, id),
    send(rank, i, at) {
      const key = `${rank}>${peerOf(rank, i.peer)}|${i.tag}|${at.microbatch}`;
      messages.set(key, [...(messages.get(key) ?? []), send(rank, bufferOf(rank, i.buffer), at.copy)]);
    },
    recv(rank, i, at) {
      const key = `${peerOf(rank, i.peer)}>${rank}|${i.tag}|${at.microbatch}`;
      const queue = messages.get(key);
      if (!queue) return false;
      receive(rank, bufferOf(rank, i.buffer), at.copy, queue.shift()!);
      if (!queue.length) messages.delete(key);
      return true;
    },
  };
}
