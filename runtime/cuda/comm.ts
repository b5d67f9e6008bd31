/**
 * Communication over NCCL, one rank per process. All ranks split their communicators from the world's in the same order, so they share only
 * one NCCL id. Collectives run on one stream in the plan's order. Each channel between two stages has its own communicator and stream; a
 * send copies its buffer first, so that it does not block.
 */

import type { Collective, CollectiveKind, Plan, Transfer } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { bytesOf, groupMembers, numberInStage, rankAt, stageOfRank } from "../../schemas/sharding.ts";
import type { Comm } from "../backend.ts";
import { type DeviceRange, offsetPointer } from "./arenas.ts";
import type { Context, Stream } from "./driver.ts";
import { type Communicator, joinCommunicator, uniqueId } from "./nccl.ts";
import type { Label, RankStreams, Touch } from "./streams.ts";

/** Sends bytes from the first member of a group to the others. */
export type Share = (name: string, members: readonly number[], make: () => Uint8Array) => Promise<Uint8Array>;

/** The communicators of a rank: the world, each group of its collectives, and each channel to and from a stage. */
interface Communicators {
  readonly world: Communicator;
  readonly groups: ReadonlyMap<string, Communicator>;
  readonly channels: ReadonlyMap<string, Communicator>;
  /** In creation order, which is equal on all ranks: the ranks of a node must destroy them together. */
  readonly made: readonly Communicator[];
}
/** The NCCL communication of a rank. */
export interface CudaComm extends Comm {
  /** Throws if a rank has failed. */
  check(): void;
  /** Aborts pending communication after a failure; see `Communicator.abort`. */
  abort(): Promise<void>;
  /** Destroys the communicators; graphs that contain their calls must be destroyed before. */
  close(): void;
}

/** Returns the bytes that communication needs in addition to the plan: copies of sends, and space for in-place exchanges. */
export function bytesBeside(plan: Plan, rank: number): number {
  const { sends, spare } = besides(plan, stageOfRank(plan.mesh, rank));
  return [...sends.values()].reduce((sum, n) => sum + n, spare);
}
function besides(plan: Plan, stage: number): { sends: Map<string, number>; spare: number } {
  const program = plan.programs[stage]!;
  const { offsets } = plan.memory[stage]!;
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const bytes = (id: string): number => aligned(buffers.get(id)!.shape.reduce((n, x) => n * x, bytesOf[buffers.get(id)!.dtype]));
  const sends = new Map<string, number>();
  let spare = 0;
  for (const i of instructionsOf(program)) {
    if (i.kind === "send") for (let n = 0; n < (i.in_flight ?? 1); n++) sends.set(mailbox(i, n), bytes(i.buffer));
    if (
      i.kind === "collective" &&
      (i.how === "all_to_all" || i.how === "shift") &&
      buffers.get(i.from)!.kind === buffers.get(i.to)!.kind &&
      offsets[i.from] === offsets[i.to]
    )
      spare = Math.max(spare, bytes(i.from));
  }
  return { sends, spare };
}
/** A ring of buffers for messages in flight. */
const mailbox = (i: Transfer, microbatch: number): string => `${i.peer} ${i.tag} ${Math.max(0, microbatch) % (i.in_flight ?? 1)}`;
const aligned = (bytes: number): number => Math.ceil(bytes / 256) * 256;

/** What openComm needs of a rank. */
export interface CommNeeds {
  readonly plan: Plan;
  readonly rank: number;
  readonly context: Context;
  readonly streams: RankStreams;
  readonly place: (id: string, copy: number) => DeviceRange;
  readonly share: Share;
  /** Waits until all issued work is complete. */
  readonly settled: () => Promise<void>;
}

/** Opens the communicators of a rank. */
export async function openComm({ plan, rank, context, streams, place, share, settled }: CommNeeds): Promise<CudaComm> {
  const { mesh } = plan;
  const stage = stageOfRank(mesh, rank);
  const local = numberInStage(mesh, rank);
  const { sends, spare } = besides(plan, stage);
  verify(plan, stage, place);
  const communicators = mesh.world > 1 ? await connect() : undefined;
  const mailboxes = new Map([...sends].map(([key, bytes]) => [key, context.alloc(bytes)]));
  const aside = spare > 0 ? context.alloc(spare) : undefined;
  const collectives = streams.rankStream("comm");

  async function connect(): Promise<Communicators> {
    const everyone = Array.from({ length: mesh.world }, (_, r) => r);
    const world = joinCommunicator(await share("world", everyone, uniqueId), rank, mesh.world);
    const groups = new Map<string, Communicator>();
    const made = [world];
    const split = (members: readonly number[] | undefined): Communicator | undefined => {
      const own = world.split(members);
      if (own) made.push(own);
      return own;
    };
    // all ranks split in the same order, including ranks whose stage does not use the group
    for (const { key, subAxes, stages } of groupings(plan)) {
      const group = split(stages.has(stage) ? groupMembers(mesh, local, subAxes).map((m) => rankAt(mesh, stage, m)) : undefined);
      if (group) groups.set(key, group);
    }
    const channels = new Map<string, Communicator>();
    for (const { key, source, target } of channelsOf(plan)) {
      const pair = split(
        stage === source || stage === target ? [source, target].sort((a, b) => a - b).map((s) => rankAt(mesh, s, local)) : undefined,
      );
      if (pair) channels.set(key, pair);
    }
    await warmUpChannels(channels);
    return { world, groups, channels, made };
  }

  /** Connects the ranks now and in one order: NCCL otherwise connects at the first exchange and blocks the host. */
  async function warmUpChannels(channels: ReadonlyMap<string, Communicator>): Promise<void> {
    const word = context.alloc(256);
    for (const { key, source, target } of channelsOf(plan)) {
      if (stage === source) channels.get(key)!.send(word, 1, peerOf(source, target), streams.compute.stream, "i32");
      else if (stage === target) channels.get(key)!.recv(word, 1, peerOf(target, source), streams.compute.stream, "i32");
      else continue;
      await settled();
    }
    context.free(word);
  }

  const perform: Record<CollectiveKind, (group: Communicator, from: DeviceRange, to: DeviceRange, stream: Stream) => void> = {
    all_reduce: (group, from, to, stream) => group.allReduce(from.at, to.at, from.count, stream, from.dtype, "sum"),
    all_reduce_max: (group, from, to, stream) => group.allReduce(from.at, to.at, from.count, stream, from.dtype, "max"),
    // NCCL supports in-place exchange only at the rank's own offset
    all_gather(group, from, to, stream) {
      const own = from.at === to.at ? offsetPointer(to.at, group.rank * from.bytes) : from.at;
      if (own !== from.at) context.copy(own, from.at, from.bytes, stream);
      group.allGather(own, to.at, from.count, stream, from.dtype);
    },
    reduce_scatter(group, from, to, stream) {
      const own = from.at === to.at ? offsetPointer(from.at, group.rank * to.bytes) : to.at;
      group.reduceScatter(from.at, own, to.count, stream, from.dtype);
      if (own !== to.at) context.copy(to.at, own, to.bytes, stream);
    },
    all_to_all(group, from, to, stream) {
      const source = from.at === to.at ? aside! : from.at;
      if (source !== from.at) context.copy(source, from.at, from.bytes, stream);
      group.allToAll(source, to.at, from.count / group.ranks, stream, from.dtype);
    },
    shift(group, from, to, stream) {
      const source = from.at === to.at ? aside! : from.at;
      if (source !== from.at) context.copy(source, from.at, from.bytes, stream);
      group.shift(source, to.at, from.count, stream, from.dtype);
    },
  };
  const labelOf = (i: Collective | Transfer): Label => ({ id: i.id, op: i.kind === "collective" ? i.how : i.kind, kernel: "" });

  return {
    collective(_, i, { copy }) {
      const [from, to] = [place(i.from, copy), place(i.to, copy)];
      const touch: Touch = { reads: [from.span], writes: i.how === "reduce_scatter" && from.at === to.at ? [from.span] : [to.span] };
      const group = i.world ? communicators?.world : communicators?.groups.get(keyOf(mesh, i.subAxes));
      if (group) streams.beside(collectives, touch, labelOf(i), (stream) => perform[i.how](group, from, to, stream));
      else if (from.at !== to.at) streams.run(touch, labelOf(i), (stream) => context.copy(to.at, from.at, from.bytes, stream));
      return true;
    },
    send(_, i, { copy, microbatch }) {
      const from = place(i.buffer, copy);
      const at = mailboxes.get(mailbox(i, microbatch))!;
      const box = [Number(at), Number(at) + from.bytes] as const;
      streams.run({ reads: [from.span], writes: [box] }, undefined, (stream) => context.copy(at, from.at, from.bytes, stream));
      streams.beside(streams.rankStream(`send ${i.peer} ${i.channel}`), { reads: [box], writes: [] }, labelOf(i), (stream) =>
        communicators!.channels.get(channelKey(stage, i.peer, i))!.send(at, from.count, peerOf(stage, i.peer), stream, from.dtype),
      );
    },
    recv(_, i, { copy }) {
      const to = place(i.buffer, copy);
      streams.beside(streams.rankStream(`recv ${i.peer} ${i.channel}`), { reads: [], writes: [to.span] }, labelOf(i), (stream) =>
        communicators!.channels.get(channelKey(i.peer, stage, i))!.recv(to.at, to.count, peerOf(stage, i.peer), stream, to.dtype),
      );
      return true;
    },
    check() {
      for (const c of communicators?.made ?? []) c.check();
    },
    async abort() {
      await Promise.all(communicators?.made.map((c) => c.abort()) ?? []);
    },
    close() {
      for (const c of communicators?.made.toReversed() ?? []) c.close();
      for (const at of [...mailboxes.values(), ...(aside === undefined ? [] : [aside])]) context.free(at);
    },
  };
}

/** Returns the rank in a channel's communicator: 0 for the lower stage. */
const peerOf = (stage: number, peer: number): number => (peer < stage ? 0 : 1);

/** Returns whether the sub-axes form groups of more than one rank. */
const keyOf = ({ subAxes }: Plan["mesh"], fs: readonly number[]): string =>
  fs
    .filter((f) => subAxes[f]!.size > 1)
    .sort((a, b) => a - b)
    .join();

/** Lists the sub-axis sets of collectives with their stages, in an order that is equal on all ranks. */
function groupings(plan: Plan): { key: string; subAxes: number[]; stages: Set<number> }[] {
  const found = new Map<string, Set<number>>();
  for (const p of plan.programs)
    for (const i of instructionsOf(p)) {
      if (i.kind !== "collective" || i.world) continue;
      const key = keyOf(plan.mesh, i.subAxes);
      if (key) found.set(key, (found.get(key) ?? new Set()).add(p.stage));
    }
  return [...found].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, stages]) => ({ key, subAxes: key.split(",").map(Number), stages }));
}

interface Channel {
  readonly key: string;
  readonly source: number;
  readonly target: number;
}
const channelKey = (source: number, target: number, { channel }: Pick<Transfer, "channel">): string => `${source}>${target} ${channel}`;

/** Lists the channels between stages, in an order that is equal on all ranks. */
function channelsOf(plan: Plan): Channel[] {
  const found = new Map<string, Channel>();
  for (const p of plan.programs)
    for (const i of instructionsOf(p)) {
      if (i.kind !== "send") continue;
      const key = channelKey(p.stage, i.peer, i);
      found.set(key, { key, source: p.stage, target: i.peer });
    }
  return [...found.values()].sort((a, b) => a.source - b.source || a.target - b.target || (a.key < b.key ? -1 : 1));
}

/** Verifies that source and destination of a collective have matching lengths and equal types. */
function verify(plan: Plan, stage: number, place: CommNeeds["place"]): void {
  const { mesh } = plan;
  for (const i of instructionsOf(plan.programs[stage]!)) {
    if (i.kind !== "collective") continue;
    const [from, to] = [place(i.from, 0), place(i.to, 0)];
    const g = i.world ? mesh.world : i.subAxes.reduce((n, f) => n * mesh.subAxes[f]!.size, 1);
    const [a, b] =
      i.how === "all_gather"
        ? [from.count * g, to.count]
        : i.how === "reduce_scatter"
          ? [from.count, to.count * g]
          : [from.count, to.count];
    if (a !== b || from.dtype !== to.dtype || (i.how === "all_to_all" && a % g !== 0))
      throw new Error(`rankc: ${i.id}: ${i.how} over ${g} from ${from.dtype}[${from.count}] to ${to.dtype}[${to.count}]`);
  }
}
