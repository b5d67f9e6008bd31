/**
 * Pairs: the instructions of a forward alternate with those of the backward of an earlier microbatch, so that the exchanges of rows of one
 * run under the kernels of the other. Both blocks keep their order, so all numbers stay; the pair states the turns. The two microbatches
 * have activation copies of their own, and workspace side by side (memory.ts).
 *
 * The turns come from a simulation with the peaks and the links of the job's device. The block whose next instruction need not wait runs on; of two that
 * may run, the one with the larger share of its work left, so that the work of both is spread over the exchanges of both. A block keeps its
 * turn until it begins an exchange, must wait, or the other, which had to wait, may run again. A block sends after the other has received:
 * a send may wait until the next stage has received the message before, and that stage may wait for room, too, at a stage that receives
 * after it has sent.
 */
import { deviceOf } from "../../../schemas/devices.ts";
import { readsOf } from "../../../schemas/effects.ts";
import type { Job } from "../../../schemas/job.ts";
import { itemOf } from "../../../schemas/lookup.ts";
import type { Buffer, Chunk, Instruction, Pair, Program } from "../../../schemas/plan.ts";
import { groupsOf } from "../../../schemas/program.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { costOf } from "../../analysis/cost.ts";
import { topologyOf } from "../../analysis/estimate/topology.ts";
import type { Mesh } from "../mesh.ts";

type Timed = Pick<Job, "train" | "cluster">;

/** Returns a program that states how the forwards and backwards of its paired block runs alternate. */
export function interleave(program: Program, job: Timed, mesh: Mesh): Program {
  const kinds = new Map<string, Omit<Pair, "turns">>();
  for (const [forward, backward] of groupsOf(program.order))
    if (backward && forward) kinds.set(`${forward.chunk} ${backward.chunk}`, { forward: forward.chunk, backward: backward.chunk });
  if (kinds.size === 0) return program;
  const apart = withOwnInputs(program);
  const seconds = secondsOn(apart, job, mesh);
  const pairs = [...kinds.values()].map(({ forward, backward }): Pair => {
    const [first, second] = [itemOf(apart.chunks, forward, "chunk").forward, itemOf(apart.chunks, backward, "chunk").backward];
    return { forward, backward, turns: new Turns(first, second, seconds).all() };
  });
  return { ...apart, pairs };
}

/** The end of the ids of inputs that backwards have of their own. */
const OWN = ".of_backward";

/**
 * Returns a program whose forwards and backwards read different workspace inputs: the host fills those of both blocks of a pair before it
 * begins. Inputs of one chunk are activations, of which each microbatch has its own.
 */
function withOwnInputs(program: Program): Program {
  const workspace = new Map(program.buffers.flatMap((b) => (b.kind === "workspace" ? [[b.id, b] as const] : [])));
  const read = (kind: "forward" | "backward"): Set<string> => new Set(program.chunks.flatMap((c) => c[kind].flatMap(readsOf)));
  const [forwards, backwards] = [read("forward"), read("backward")];
  const both = program.inputs.filter(({ buffer }) => workspace.has(buffer) && forwards.has(buffer) && backwards.has(buffer));
  if (both.length === 0) return program;
  const own = new Map(both.map(({ buffer }) => [buffer, buffer + OWN]));
  const renamed = (i: Instruction): Instruction =>
    i.kind === "compute" ? { ...i, reads: Object.fromEntries(Object.entries(i.reads).map(([name, id]) => [name, own.get(id) ?? id])) } : i;
  return {
    ...program,
    buffers: [...program.buffers, ...both.flatMap(({ buffer }): Buffer[] => copyOf(workspace.get(buffer), own.get(buffer)))],
    inputs: [...program.inputs, ...both.map((input) => ({ ...input, buffer: own.get(input.buffer) ?? input.buffer }))],
    chunks: program.chunks.map((c): Chunk => ({ ...c, backward: c.backward.map(renamed) })),
  };
}
const copyOf = (b: Buffer | undefined, id: string | undefined): Buffer[] => (b && id !== undefined ? [{ ...b, id }] : []);

/** Seconds that a kernel needs at least, and that a collective needs beside its bytes. */
const LEAST = { kernel: 3e-6, collective: 20e-6 } as const;
/** A rate where the table of devices has none: only the order of instructions depends on it. */
const UNKNOWN = 1e12;

/** Returns the seconds of an instruction at the peaks and the bandwidths of the job's device. */
function secondsOn(program: Program, { train, cluster }: Timed, mesh: Mesh): (i: Instruction) => number {
  const { peak, bandwidth, links } = deviceOf(cluster.device);
  const { host, network } = links ?? { host: UNKNOWN, network: UNKNOWN };
  const flopsPerSecond = peak[({ fp32: "f32", bf16: "bf16", fp16: "f16" } as const)[train.precision]] ?? UNKNOWN;
  const buffers = new BufferTable(program.buffers);
  const groupOf = topologyOf(mesh, program.stage);
  return (i) => {
    const { flops, bytes } = costOf(i, mesh, buffers);
    if (i.kind === "compute") return LEAST.kernel + Math.max(flops / flopsPerSecond, bytes / bandwidth);
    // a transfer is on its way while the stage computes
    if (i.kind !== "collective") return 0;
    return LEAST.collective + bytes / (groupOf(i).nodes > 1 ? network : host);
  };
}

/** A block of a pair while its turns are simulated. */
class PairedBlock {
  #next = 0;
  /** When the collectives that this block has begun end, by id. */
  readonly #ends = new Map<string, number>();
  /** When a collective in order, which what follows needs, ends. */
  #inOrder = 0;
  /** Per instruction, the seconds of those from it on. */
  readonly #left: Float64Array;
  readonly #lastReceive: number;

  constructor(
    readonly instructions: readonly Instruction[],
    readonly seconds: readonly number[],
  ) {
    this.#lastReceive = instructions.findLastIndex(({ kind }) => kind === "recv");
    this.#left = new Float64Array(instructions.length + 1);
    for (let at = instructions.length - 1; at >= 0; at--) this.#left[at] = (this.#left[at + 1] ?? 0) + (seconds[at] ?? 0);
  }

  get next(): Instruction | undefined {
    return this.instructions[this.#next];
  }
  /** The share of its work that is left. */
  get share(): number {
    return (this.#left[this.#next] ?? 0) / Math.max(Number.MIN_VALUE, this.#left[0] ?? 0);
  }
  /** Whether it sends next, and the other block of the pair has not received all that it needs. */
  sendsBefore(other: PairedBlock): boolean {
    return this.next?.kind === "send" && other.#next <= other.#lastReceive;
  }
  /** Returns when the next instruction may begin. */
  readyAt(now: number): number {
    return (this.next?.waits ?? []).reduce((latest, id) => Math.max(latest, this.#ends.get(id) ?? 0), Math.max(now, this.#inOrder));
  }
  /** Runs the next instruction; `begin` places a collective on its stream and returns its end. Returns when the compute stream is free. */
  run(now: number, begin: (stream: string, now: number, seconds: number) => number): number {
    const i = itemOf(this.instructions, this.#next, "instruction");
    const seconds = this.seconds[this.#next++] ?? 0;
    if (i.kind !== "collective") return now + seconds;
    const end = begin(i.stream ?? "in_order", now, seconds);
    if (i.stream) this.#ends.set(i.id, end);
    else this.#inOrder = end;
    return now;
  }
}

/** The simulation of a pair. */
class Turns {
  readonly #blocks: readonly [PairedBlock, PairedBlock];
  readonly #streams = new Map<string, number>();

  constructor(forward: readonly Instruction[], backward: readonly Instruction[], seconds: (i: Instruction) => number) {
    this.#blocks = [new PairedBlock(forward, forward.map(seconds)), new PairedBlock(backward, backward.map(seconds))];
  }

  /** Returns how many instructions of the forward, of the backward, and so on, follow one another. */
  all(): number[] {
    const turns = [0];
    let now = 0;
    // backward first: its exchanges take longer, and the stage before waits for it
    let [turn, other] = [this.#blocks[1], this.#blocks[0]];
    let otherWaits = false;
    let mayChange = false;
    while (turn.next || other.next) {
      const [own, others] = [turn.readyAt(now), other.readyAt(now)];
      const isFree = otherWaits && others <= now;
      if (isFree) otherWaits = false;
      const [isEarly, isOtherEarly] = [turn.sendsBefore(other), other.sendsBefore(turn)];
      const changes =
        isEarly !== isOtherEarly
          ? isEarly
          : other.next !== undefined &&
            (turn.next === undefined ||
              (own > now && others < own) ||
              ((mayChange || isFree) && own <= now && others <= now && other.share > turn.share));
      if (changes) {
        otherWaits = turn.next !== undefined && own > now;
        [turn, other] = [other, turn];
      }
      const length = turns.length % 2 === (turn === this.#blocks[0] ? 1 : 0) ? (turns.pop() ?? 0) : 0;
      turns.push(length + 1);
      const i = turn.next;
      now = turn.run(turn.readyAt(now), (stream, at, seconds) => {
        const end = Math.max(at, this.#streams.get(stream) ?? 0) + seconds;
        this.#streams.set(stream, end);
        return end;
      });
      mayChange = i?.kind === "collective";
    }
    return turns;
  }
}
