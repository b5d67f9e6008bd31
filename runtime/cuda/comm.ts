/**
 * Communication over NCCL, one rank per process. Collectives run on one stream in the plan's order; asynchronous ones on the stream that the plan names. Each channel between two stages has its own communicator and stream; a
 * send copies its buffer first, so that it does not block.
 */

import { bytesOf } from "../../schemas/dtypes.ts";
import { pairsOf } from "../../schemas/effects.ts";
import type { Collective, CollectiveKind, Plan, Program, Transfer } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import type { BlockPosition, Comm } from "../backend.ts";
import { RankPrograms, type StageProgram } from "../rankPrograms.ts";
import { type DeviceRange, offsetPointer } from "./arenas.ts";
import { Communicators, type Share } from "./communicators.ts";
import type { Context, DevicePointer, Stream } from "./driver.ts";
import type { Communicator } from "./nccl.ts";
import type { Label, RankStream, RankStreams, Touch } from "./streams.ts";

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
  const { sends, spare } = besides(new RankPrograms(plan).of(rank));
  return [...sends.values()].reduce((sum, n) => sum + n, spare);
}
function besides(stage: StageProgram): { sends: Map<string, number>; spare: number } {
  const bytes = (id: string): number => {
    const { shape, dtype } = stage.buffer(id);
    return aligned(elementsOf(shape) * bytesOf[dtype]);
  };
  const sends = new Map<string, number>();
  let spare = 0;
  for (const i of instructionsOf(stage.program)) {
    if (i.kind === "send") for (let n = 0; n < (i.in_flight ?? 1); n++) sends.set(mailbox(i, n), bytes(i.buffer));
    if (
      i.kind === "collective" &&
      (i.how === "all_to_all" || i.how === "shift") &&
      stage.buffer(i.from).kind === stage.buffer(i.to).kind &&
      stage.offset(i.from) === stage.offset(i.to)
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

/** Opens the communication of a rank. */
export async function openComm(needs: CommNeeds): Promise<CudaComm> {
  const { plan, rank, context, streams, place, share, settled } = needs;
  verify(plan, new RankPrograms(plan).of(rank).program, place);
  const connect = () => Communicators.connect({ plan, rank, context, stream: streams.compute.stream, share, settled });
  return new NcclComm(needs, plan.mesh.world > 1 ? await connect() : undefined);
}

class NcclComm implements CudaComm {
  readonly #context: Context;
  readonly #streams: RankStreams;
  readonly #place: CommNeeds["place"];
  readonly #communicators: Communicators | undefined;
  /** Copies of sends, by mailbox. */
  readonly #mailboxes: ReadonlyMap<string, DevicePointer>;
  /** Space for in-place exchanges. */
  readonly #spare: DevicePointer | undefined;
  readonly #collectives: RankStream;

  constructor({ plan, rank, context, streams, place }: CommNeeds, communicators: Communicators | undefined) {
    const { sends, spare } = besides(new RankPrograms(plan).of(rank));
    this.#context = context;
    this.#streams = streams;
    this.#place = place;
    this.#communicators = communicators;
    this.#mailboxes = new Map([...sends].map(([key, bytes]) => [key, context.alloc(bytes)]));
    this.#spare = spare > 0 ? context.alloc(spare) : undefined;
    this.#collectives = streams.rankStream("comm");
  }

  collective(_: number, i: Collective, { copy }: BlockPosition): boolean {
    const moves = pairsOf(i).map(({ from, to }): Move => ({ from: this.#place(from, copy), to: this.#place(to, copy) }));
    const touch: Touch = {
      reads: moves.map(({ from }) => from.span),
      writes: moves.map(({ from, to }) => (i.how === "reduce_scatter" && from.at === to.at ? from.span : to.span)),
    };
    const group = this.#communicators?.group(i);
    const on = i.stream ? this.#streams.rankStream(i.stream) : this.#collectives;
    const id = i.stream && i.id;
    if (group) this.#streams.beside(on, touch, labelOf(i), (stream) => this.#perform(i.how, group, moves, stream), id);
    else
      for (const { from, to } of moves)
        if (from.at !== to.at) this.#streams.run(touch, labelOf(i), (stream) => this.#context.copy(to.at, from.at, from.bytes, stream));
    return true;
  }

  wait(_: number, id?: string): boolean {
    if (id === undefined) this.#streams.join();
    else this.#streams.await(id);
    return true;
  }

  send(_: number, i: Transfer, { copy, microbatch }: BlockPosition): void {
    const from = this.#place(i.buffer, copy);
    const at = this.#mailboxes.get(mailbox(i, microbatch));
    if (at === undefined) throw new Error(`rankc: ${i.id} has no mailbox`);
    const box = [Number(at), Number(at) + from.bytes] as const;
    this.#streams.run({ reads: [from.span], writes: [box] }, undefined, (stream) => this.#context.copy(at, from.at, from.bytes, stream));
    const rankStream = this.#streams.rankStream(`send ${i.peer} ${i.channel}`);
    this.#streams.beside(rankStream, { reads: [box], writes: [] }, labelOf(i), (stream) => {
      const { channel, peer } = this.#channel(i);
      channel.send(at, from.count, peer, stream, from.dtype);
    });
  }

  recv(_: number, i: Transfer, { copy }: BlockPosition): boolean {
    const to = this.#place(i.buffer, copy);
    const rankStream = this.#streams.rankStream(`recv ${i.peer} ${i.channel}`);
    this.#streams.beside(rankStream, { reads: [], writes: [to.span] }, labelOf(i), (stream) => {
      const { channel, peer } = this.#channel(i);
      channel.recv(to.at, to.count, peer, stream, to.dtype);
    });
    return true;
  }

  check(): void {
    this.#communicators?.check();
  }

  async abort(): Promise<void> {
    await this.#communicators?.abort();
  }

  close(): void {
    this.#communicators?.close();
    for (const at of this.#mailboxes.values()) this.#context.free(at);
    if (this.#spare !== undefined) this.#context.free(this.#spare);
  }

  #channel(i: Transfer): ReturnType<Communicators["channel"]> {
    if (!this.#communicators) throw new Error(`rankc: ${i.id} needs another rank, and the plan has one`);
    return this.#communicators.channel(i);
  }

  /** Performs a collective; the tensors of a bucket in one launch. */
  #perform(how: CollectiveKind, group: Communicator, moves: readonly Move[], stream: Stream): void {
    const [only, ...others] = moves;
    if (only && others.length === 0) {
      this.#performOne(how, group, only, stream);
      return;
    }
    if (moves.some(({ from, to }) => from.at === to.at && !isInPlace.has(how)))
      throw new Error(`rankc: a bucket of ${how} is exchanged in place`);
    // a call of NCCL begins when the group is complete: what follows it on the stream waits for the whole group
    const after: (() => void)[] = [];
    group.together(() => {
      for (const move of moves) this.#performOne(how, group, move, stream, (copy) => after.push(copy));
    });
    for (const copy of after) copy();
  }

  /** `follow` runs a copy that needs the result of the collective. */
  #performOne(
    how: CollectiveKind,
    group: Communicator,
    { from, to }: Move,
    stream: Stream,
    follow: (copy: () => void) => void = (copy) => copy(),
  ): void {
    switch (how) {
      case "all_reduce":
        group.allReduce(from.at, to.at, from.count, stream, from.dtype, "sum");
        break;
      case "all_reduce_max":
        group.allReduce(from.at, to.at, from.count, stream, from.dtype, "max");
        break;
      case "all_gather": {
        // NCCL supports in-place exchange only at the rank's own offset
        const own = from.at === to.at ? offsetPointer(to.at, group.rank * from.bytes) : from.at;
        if (own !== from.at) this.#context.copy(own, from.at, from.bytes, stream);
        group.allGather(own, to.at, from.count, stream, from.dtype);
        break;
      }
      case "reduce_scatter": {
        const own = from.at === to.at ? offsetPointer(from.at, group.rank * to.bytes) : to.at;
        group.reduceScatter(from.at, own, to.count, stream, from.dtype);
        if (own !== to.at) follow(() => this.#context.copy(to.at, own, to.bytes, stream));
        break;
      }
      case "all_to_all":
        group.allToAll(this.#source(from, to, stream), to.at, from.count / group.ranks, stream, from.dtype);
        break;
      case "shift":
        group.shift(this.#source(from, to, stream), to.at, from.count, stream, from.dtype);
        break;
      default:
        how satisfies never;
    }
  }

  /** Returns the source of an exchange; of one in place, a copy. */
  #source(from: DeviceRange, to: DeviceRange, stream: Stream): DevicePointer {
    if (from.at !== to.at) return from.at;
    if (this.#spare === undefined) throw new Error("rankc: an exchange in place has no space for its source");
    this.#context.copy(this.#spare, from.at, from.bytes, stream);
    return this.#spare;
  }
}

/** The collectives that a bucket may exchange in place: they read no bytes that a copy before them has to set. */
const isInPlace: ReadonlySet<CollectiveKind> = new Set(["all_reduce", "all_reduce_max", "reduce_scatter"] as const);

/** The source and the destination of a collective. */
interface Move {
  readonly from: DeviceRange;
  readonly to: DeviceRange;
}

const labelOf = (i: Collective | Transfer): Label => ({ id: i.id, op: i.kind === "collective" ? i.how : i.kind, kernel: "" });

/** Verifies that source and destination of a collective have matching lengths and equal types. */
function verify({ mesh }: Plan, program: Program, place: CommNeeds["place"]): void {
  for (const i of instructionsOf(program)) {
    if (i.kind !== "collective") continue;
    const g = i.world ? mesh.world : shardCount(mesh, i.subAxes);
    for (const pair of pairsOf(i)) {
      const [from, to] = [place(pair.from, 0), place(pair.to, 0)];
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
}
