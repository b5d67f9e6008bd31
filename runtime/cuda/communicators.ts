/**
 * The NCCL communicators of a rank: the world, each group of its collectives, and each channel to and from a stage. All ranks split their
 * communicators from the world's in the same order, so they share only one NCCL id.
 */
import type { Collective, Plan, Transfer } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { groupMembers, numberInStage, rankAt, stageOfRank } from "../../schemas/sharding.ts";
import type { Context, Stream } from "./driver.ts";
import { type Communicator, joinCommunicator, uniqueId } from "./nccl.ts";

/** Sends bytes from the first member of a group to the others. */
export type Share = (name: string, members: readonly number[], make: () => Uint8Array) => Promise<Uint8Array>;

/** What the communicators need of a rank. */
export interface CommunicatorNeeds {
  readonly plan: Plan;
  readonly rank: number;
  readonly context: Context;
  readonly stream: Stream;
  readonly share: Share;
  /** Waits until all work issued to the stream is complete. */
  readonly settled: () => Promise<void>;
}

/** The open communicators of a rank. */
export class Communicators {
  readonly #plan: Plan;
  readonly #rank: number;
  readonly #stage: number;
  readonly #world: Communicator;
  readonly #groups = new Map<string, Communicator>();
  readonly #channels = new Map<string, Communicator>();
  /** In creation order, which is equal on all ranks: the ranks of a node must destroy them together. */
  readonly #made: Communicator[];

  /** Joins the world, splits the groups and channels, and connects the channels. All ranks call it. */
  static async connect(needs: CommunicatorNeeds): Promise<Communicators> {
    const { plan, rank, share } = needs;
    const everyone = Array.from({ length: plan.mesh.world }, (_, r) => r);
    const world = joinCommunicator(await share("world", everyone, uniqueId), rank, plan.mesh.world);
    const communicators = new Communicators(plan, rank, world);
    await communicators.#warmUpChannels(needs);
    return communicators;
  }

  private constructor(plan: Plan, rank: number, world: Communicator) {
    const { mesh } = plan;
    const stage = stageOfRank(mesh, rank);
    const local = numberInStage(mesh, rank);
    this.#plan = plan;
    this.#rank = rank;
    this.#stage = stage;
    this.#world = world;
    this.#made = [world];
    // all ranks split in the same order, including ranks whose stage does not use the group
    for (const { key, subAxes, stages, multiprocessors } of groupings(plan)) {
      const members = stages.has(stage) ? groupMembers(mesh, local, subAxes).map((m) => rankAt(mesh, stage, m)) : undefined;
      const group = this.#split(members, multiprocessors);
      if (group) this.#groups.set(key, group);
    }
    for (const { key, source, target } of channelsOf(plan)) {
      const pair = this.#split(
        stage === source || stage === target ? [source, target].sort((a, b) => a - b).map((s) => rankAt(mesh, s, local)) : undefined,
      );
      if (pair) this.#channels.set(key, pair);
    }
  }

  /** Returns the communicator of a collective; undefined if its group is this rank alone. */
  group(i: Collective): Communicator | undefined {
    return i.world ? this.#world : this.#groups.get(keyOf(this.#plan.mesh, i));
  }

  /** Returns the channel of a send or a receive of this rank, and the rank of the other side in it. */
  channel(i: Transfer): { readonly channel: Communicator; readonly peer: number } {
    const [source, target] = i.kind === "send" ? [this.#stage, i.peer] : [i.peer, this.#stage];
    return { channel: this.#channel(channelKey(source, target, i)), peer: peerOf(this.#stage, i.peer) };
  }

  check(): void {
    for (const c of this.#made) c.check();
  }

  async abort(): Promise<void> {
    await Promise.all(this.#made.map((c) => c.abort()));
  }

  close(): void {
    for (const c of this.#made.toReversed()) c.close();
  }

  #split(members: readonly number[] | undefined, multiprocessors?: number): Communicator | undefined {
    const own = this.#world.split(members, multiprocessors);
    if (own) this.#made.push(own);
    return own;
  }

  #channel(key: string): Communicator {
    const found = this.#channels.get(key);
    if (!found) throw new Error(`rankc: rank ${this.#rank} has no channel ${key}`);
    return found;
  }

  /** Connects the ranks now and in one order: NCCL otherwise connects at the first exchange and blocks the host. */
  async #warmUpChannels({ context, stream, settled }: CommunicatorNeeds): Promise<void> {
    const word = context.alloc(256);
    for (const { key, source, target } of channelsOf(this.#plan)) {
      if (this.#stage === source) this.#channel(key).send(word, 1, peerOf(source, target), stream, "i32");
      else if (this.#stage === target) this.#channel(key).recv(word, 1, peerOf(target, source), stream, "i32");
      else continue;
      await settled();
    }
    context.free(word);
  }
}

/** Returns the rank in a channel's communicator: 0 for the lower stage. */
const peerOf = (stage: number, peer: number): number => (peer < stage ? 0 : 1);

/** Returns the sub-axes of a collective along which there is more than one rank, ascending. */
const spanOf = ({ subAxes }: Plan["mesh"], { subAxes: own }: Collective): number[] =>
  own.filter((f) => subAxes[f]!.size > 1).sort((a, b) => a - b);
/** Returns the key of a communicator: its stream, because a communicator runs on one, and its sub-axes; empty for groups of one rank. */
function keyOf(mesh: Plan["mesh"], i: Collective): string {
  const span = spanOf(mesh, i);
  return span.length === 0 ? "" : `${i.stream ?? ""} ${span.join()}`;
}

/** The collectives of one communicator on each rank. */
interface Grouping {
  readonly key: string;
  readonly subAxes: number[];
  readonly stages: Set<number>;
  /** The most multiprocessors that one of them occupies. */
  readonly multiprocessors: number | undefined;
}

/** Lists the streams and sub-axis sets of collectives with their stages, in an order that is equal on all ranks. */
function groupings(plan: Plan): Grouping[] {
  const found = new Map<string, Grouping>();
  for (const p of plan.programs)
    for (const i of instructionsOf(p)) {
      if (i.kind !== "collective" || i.world) continue;
      const key = keyOf(plan.mesh, i);
      const grouping = found.get(key) ?? {
        ...{ key, subAxes: spanOf(plan.mesh, i), stages: new Set<number>() },
        multiprocessors: p.streams?.find(({ name }) => name === i.stream)?.multiprocessors,
      };
      grouping.stages.add(p.stage);
      if (key) found.set(key, grouping);
    }
  return [...found.values()].sort((a, b) => (a.key < b.key ? -1 : 1));
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
