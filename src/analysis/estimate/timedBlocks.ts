/** The blocks of a stage with the time, the stream and the memory of each instruction: what the simulation needs to know of a plan. */

import type { DeviceProfile, KernelFamily } from "../../../schemas/deviceProfile.ts";
import { bytesOf } from "../../../schemas/dtypes.ts";
import { pairsOf, visitTouched, writesOf } from "../../../schemas/effects.ts";
import { rowsSent } from "../../../schemas/experts.ts";
import type { Collective, Compute, Instruction, Memory, Plan, Program, StreamName } from "../../../schemas/plan.ts";
import { activationStart, type Block, blocksOf, runsIn } from "../../../schemas/program.ts";
import { elementsOf, rankAt } from "../../../schemas/sharding.ts";
import { Repeats } from "../../repeats.ts";
import { type BufferTable, buffersOf } from "../bufferTable.ts";
import { besideOf } from "./besideLaw.ts";
import { asFirst, type KernelShape, kernelShape } from "./kernelShape.ts";
import { KernelTimes, type SourcedTime, type TimeSource } from "./kernelTime.ts";
import { collectiveSeconds, type RowCopies, transferSeconds } from "./linkTime.ts";
import { type GroupTopology, topologyOf } from "./topology.ts";

/** The parts of a stage's time that kernels take. */
export const kernelParts = ["products", "attention", "other kernels", "optimizer"] as const;
/** The name of such a part. */
export type KernelPart = (typeof kernelParts)[number];

/** Bytes of memory, [begin, end), in one numbering of all arenas. */
export type MemorySpan = readonly [number, number];

/** The memory that an instruction reads and writes. */
export interface MemoryTouch {
  readonly reads: readonly MemorySpan[];
  readonly writes: readonly MemorySpan[];
}

/** Collectives and transfers of one kind. */
export interface CommunicationClass {
  readonly name: string;
  readonly axes: string;
  /** Of asynchronous collectives. */
  readonly stream?: StreamName;
}

/** An instruction with its time. */
export interface TimedInstruction {
  readonly instruction: Instruction;
  /** Of the kernel or the collective alone; of a message, once both sides are there. */
  readonly seconds: number;
  readonly source: TimeSource | "link";
  /** As the runtime names it in a profile. */
  readonly stream: string;
  /** Of a kernel. */
  readonly part?: KernelPart;
  /** Of a collective or a transfer: its axes. */
  readonly axes?: string;
  /** Of a collective or a transfer: the class that it is counted in, by name, axes and stream. */
  readonly communication?: CommunicationClass;
  /** Of a collective or a transfer: the share of its rate that a kernel loses beside it. */
  readonly slowdown?: number;
  /** Whether the ranks of a group are on more than one node. */
  readonly isAcross?: boolean;
  readonly touch: MemoryTouch;
}

/** A block with timed instructions. */
export interface TimedBlock {
  readonly kind: Block["kind"];
  readonly chunk: number;
  /** Whether this is the block of the first microbatch, whose gradients are written and not added to. */
  readonly isFirst: boolean;
  /** Whether this is the block of the last microbatch, in which gradients are reduced in buckets. */
  readonly isLast: boolean;
  readonly instructions: readonly TimedInstruction[];
  /** Launches of kernels. */
  readonly launches: number;
}

/** What other software does and a plan does not say. */
export interface Assumptions {
  /** Whether a row is sent once to each node that has experts of it, and not once for each expert. */
  readonly sendsPerNode?: boolean;
  /** Whether launches are captured in graphs, so that the host delays no kernel. */
  readonly captured?: boolean;
  /** Whether the host waits for no count of rows, so that it prepares launches ahead of the device. */
  readonly runsAhead?: boolean;
  /** Whether an event stands before and behind each instruction, as in `run --profile`. */
  readonly timed?: boolean;
  /** Communication that runs beside kernels: the share that this hides stands in the profile. */
  readonly hidden?: readonly ("experts" | "data" | "tensor")[];
}

/** What the times depend on, beside the plan. */
export interface TimingOptions {
  readonly profile: DeviceProfile;
  /** Rows of the busiest rank of an expert group over the mean; 1: the router is balanced. */
  readonly imbalance: number;
  readonly assumed?: Assumptions;
}

const parts: Readonly<Record<KernelFamily, KernelPart>> = {
  product: "products",
  product_wgrad: "products",
  grouped: "products",
  grouped_wgrad: "products",
  product_f32: "products",
  attention: "attention",
  attention_grad: "attention",
  streaming: "other kernels",
  rows: "other kernels",
  optimizer: "optimizer",
};

/** The arenas in one numbering: far enough apart that none reaches the next. */
const ARENA = 2 ** 46;
const arenas = ["parameter", "gradient", "optimizer", "activation", "workspace"] as const;

/** Returns a function that times the blocks of a stage. It times equal kernels once over all stages. */
export function blockTimer(
  plan: Pick<Plan, "job" | "mesh" | "kernels">,
  { profile, imbalance, assumed = {} }: TimingOptions,
): (program: Program, memory: Memory) => TimedBlock[] {
  const kernels = new KernelTimes(profile);
  const [inOrder, asynchronous] = [besideOf(profile.overlap, "none"), besideOf(profile.overlap, plan.job.parallel.communication_sms)];
  const launchesOf = new Map(plan.kernels.map(({ id, launches }) => [id, Math.max(1, launches.length)]));
  const known = new Map<string, SourcedTime & { readonly part: KernelPart }>();
  return (program, memory) => {
    const buffers = buffersOf(program);
    const spanOf = spansOf(program, memory, buffers);
    const groupOf = topologyOf(plan.mesh, program.stage);
    const secondsOf = collectiveTimer(plan, { profile, imbalance, assumed });
    const classes = new Map<string, CommunicationClass>();
    /** Returns one object for each class. */
    const classOf = (own: CommunicationClass): CommunicationClass => {
      const key = `${own.name} ${own.axes} ${own.stream}`;
      return madeOnce(classes, key, () => own);
    };
    const powerClock = profile.kernels.power ? kernels.clockOf(shapesOf(program, (i) => kernelShape(i, plan.mesh, buffers))) : 1;
    const kernelTime = (i: Compute) => {
      const key = `${i.kernel} ${Object.keys(i.reads).length} ${powerClock}`;
      const before = known.get(key);
      if (before) return before;
      const shape = kernelShape(i, plan.mesh, buffers);
      const time = kernels.timeOf(shape, powerClock);
      const launches = launchesOf.get(i.kernel) ?? 1;
      const { launch_us, event_us } = profile.kernels;
      const gaps = 1e-6 * (launch_us * launches + (assumed.timed ? event_us : 0));
      const seconds = time.seconds * (isOfExperts(i, buffers) ? imbalance : 1) + gaps;
      const timed = { seconds, source: time.source, part: parts[shape.family] };
      known.set(key, timed);
      return timed;
    };
    const timed = (written: Instruction, isStep: boolean, isFirst: boolean): TimedInstruction => {
      const i = isFirst && written.kind === "compute" ? asFirst(written) : written;
      const touch = new LazyTouch(i, buffers, spanOf);
      if (i.kind === "compute") {
        const { part, ...time } = kernelTime(i);
        return { instruction: i, ...time, part: isStep ? "optimizer" : part, stream: "compute", touch };
      }
      const common = { instruction: i, source: "link" as const, touch };
      if (i.kind === "collective") {
        const group: GroupTopology = groupOf(i);
        const communication = classOf({ name: i.name, axes: i.axes, ...(i.stream && { stream: i.stream }) });
        const bytes = pairsOf(i).reduce((sum, { from, to }) => sum + Math.max(buffers.bytesOf(from), buffers.bytesOf(to)), 0);
        const seconds = secondsOf(i, bytes, { group, isStep });
        const { slowdown } = i.stream ? asynchronous : inOrder;
        return { ...common, seconds, slowdown, stream: i.stream ?? "comm", axes: i.axes, isAcross: group.nodes > 1, communication };
      }
      const isAcross = crosses(plan, program.stage, i.peer);
      return {
        ...common,
        seconds: transferSeconds(profile.links, i.bytes, isAcross),
        stream: `${i.kind} ${i.peer} ${i.channel}`,
        slowdown: inOrder.slowdown,
        ...{ axes: "pp", isAcross, communication: classOf({ name: "transfers", axes: "pp" }) },
      };
    };
    // blocks of the first, the last and the other microbatches share most instructions
    const shared = new Map<Instruction, TimedInstruction>();
    const block = ({ kind, chunk, ...b }: Block, isFirst: boolean, isLast: boolean): TimedBlock => {
      const instructions = b.instructions.filter((i) => runsIn(i, { first: isFirst, last: isLast }));
      return {
        ...{ kind, chunk, isFirst, isLast },
        instructions: instructions.map((i) =>
          isFirst && hasFirst(i) ? timed(i, kind === "step", true) : madeOnce(shared, i, () => timed(i, kind === "step", false)),
        ),
        launches: instructions.reduce((sum, i) => sum + (i.kind === "compute" ? (launchesOf.get(i.kernel) ?? 1) : 1), 0),
      };
    };
    return blocksOf(program)
      .filter(({ kind }) => !kind.startsWith("evaluation"))
      .flatMap((b) => {
        const firsts = b.instructions.some(hasFirst) ? [true, false] : [false];
        const lasts = b.instructions.some(({ only }) => only === "last") ? [true, false] : [false];
        return firsts.flatMap((isFirst) => lasts.map((isLast) => block(b, isFirst, isLast)));
      });
  };
}

/** Returns the kernels of a step of a rank, with how often each runs: in the step block once, else once for each microbatch, the first of which writes. */
function shapesOf(program: Program, shapeOf: (i: Compute) => KernelShape): { readonly shape: KernelShape; readonly times: number }[] {
  const forwards = program.order.reduce((n, { kind }) => n + Number(kind === "forward"), 0);
  const microbatches = forwards / program.chunks.length;
  const found = new Map<string, { shape: KernelShape; times: number }>();
  const count = (i: Compute, times: number): void => {
    const key = `${i.kernel} ${Object.keys(i.reads).length}`;
    const known = found.get(key);
    if (known) known.times += times;
    else found.set(key, { shape: shapeOf(i), times });
  };
  for (const { kind, instructions } of blocksOf(program)) {
    if (kind.startsWith("evaluation")) continue;
    for (const i of instructions) {
      if (i.kind !== "compute") continue;
      const times = kind === "step" || i.only !== undefined ? 1 : microbatches;
      count(asFirst(i), 1);
      if (times > 1) count(i, times - 1);
    }
  }
  return [...found.values()];
}

/** Returns a function that finds the seconds of collectives of a stage; equal ones once. `bytes`: the largest buffer on a rank. */
function collectiveTimer(
  { job }: Pick<Plan, "job">,
  { profile, assumed = {} }: TimingOptions,
): (i: Collective, bytes: number, at: { readonly group: GroupTopology; readonly isStep: boolean }) => number {
  const known = new Repeats<number>();
  const asynchronous = besideOf(profile.overlap, job.parallel.communication_sms);
  const hiddenShare = (i: Collective, isStep: boolean): number => {
    if (isOfRows(i)) return assumed.hidden?.includes("experts") ? profile.overlap.hidden.experts : 0;
    if (i.axes === "tp") return assumed.hidden?.includes("tensor") ? profile.overlap.hidden.tensor : 0;
    const isOfData = isStep && /\b(dp|edp)\b/.test(i.axes);
    return isOfData && assumed.hidden?.includes("data") ? profile.overlap.hidden.data : 0;
  };
  return (i, bytes, { group, isStep }) =>
    known.of(`${i.how} ${i.name} ${i.axes} ${i.subAxes} ${i.world} ${i.stream} ${bytes} ${isStep}`, () => {
      const copies = isOfRows(i) && assumed.sendsPerNode ? copiesOf(job, group.ranks) : undefined;
      const alone = collectiveSeconds(profile.links, i.how, bytes, group, copies) * (1 - hiddenShare(i, isStep));
      return alone * (i.stream ? asynchronous.collective_factor : 1);
    });
}

/** Returns the value of a key, which is made when it is first asked for. */
function madeOnce<K, V>(known: Map<K, V>, key: K, make: () => V): V {
  const value = known.get(key) ?? make();
  known.set(key, value);
  return value;
}

const hasFirst = (i: Instruction): boolean => i.only === "first" || (i.kind === "compute" && i.first_kernel !== undefined);

/** Returns whether a collective sends rows to experts or back. */
const isOfRows = ({ how, name }: Collective): boolean =>
  how === "all_to_all" && (name.startsWith("dispatch") || name.startsWith("combine"));

/** Returns the experts of a token and the rows that a plan sends for it to a group of ranks; undefined without experts. */
function copiesOf({ model }: Plan["job"], ranks: number): RowCopies | undefined {
  const { moe } = model;
  if (moe === null) return undefined;
  return { experts: moe.top_k, rows: rowsSent(moe, ranks) };
}

/** Returns whether an instruction computes rows that are sharded by experts. */
const isOfExperts = (i: Compute, buffers: BufferTable): boolean =>
  [...Object.values(i.reads), ...Object.values(i.writes)].some((id) => {
    const { ragged, shardedBy } = buffers.get(id);
    return ragged > 0 && (shardedBy[2] ?? []).length > 0;
  });

/** Returns whether any rank of a stage is on another node than its peer: the slowest message decides. */
export function crosses({ mesh }: Pick<Plan, "mesh">, stage: number, peer: number): boolean {
  const nodeOf = (of: number, n: number): number => Math.floor(rankAt(mesh, of, n) / mesh.gpus_per_node);
  for (let n = 0; n < mesh.per_stage; n++) if (nodeOf(stage, n) !== nodeOf(peer, n)) return true;
  return false;
}

/** Finds the memory of an instruction when it is asked for: most instructions run while no communication is under way. */
class LazyTouch implements MemoryTouch {
  // not `#`: private names take longer to write, and there is one object for each instruction
  private readonly instruction: Instruction;
  private readonly buffers: BufferTable;
  private readonly spanOf: (id: string) => MemorySpan;
  private known: MemoryTouch | undefined;

  constructor(instruction: Instruction, buffers: BufferTable, spanOf: (id: string) => MemorySpan) {
    this.instruction = instruction;
    this.buffers = buffers;
    this.spanOf = spanOf;
  }

  get reads(): readonly MemorySpan[] {
    return this.found().reads;
  }
  get writes(): readonly MemorySpan[] {
    return this.found().writes;
  }
  private found(): MemoryTouch {
    const { instruction, buffers, spanOf } = this;
    if (this.known) return this.known;
    const reads: MemorySpan[] = [];
    visitTouched(instruction, buffers, (id) => reads.push(spanOf(id)));
    this.known = { reads, writes: writesOf(instruction, buffers).map(spanOf) };
    return this.known;
  }
}

/** Returns an instruction that works on another activation copy: in a pair, the microbatches have different ones. */
export const inOtherCopy = (i: TimedInstruction): TimedInstruction => ({ ...i, touch: new OtherCopy(i.touch) });

/** The memory of an instruction in another activation copy, behind all arenas. */
class OtherCopy implements MemoryTouch {
  private readonly own: MemoryTouch;

  constructor(own: MemoryTouch) {
    this.own = own;
  }
  get reads(): readonly MemorySpan[] {
    return moved(this.own.reads);
  }
  get writes(): readonly MemorySpan[] {
    return moved(this.own.writes);
  }
}
const activations = ARENA * (1 + arenas.indexOf("activation"));
const behind = ARENA * (1 + arenas.length);
const moved = (spans: readonly MemorySpan[]): MemorySpan[] =>
  spans.map(([from, to]) => (from >= activations && from < activations + ARENA ? [from + behind, to + behind] : [from, to]));

/** Returns a function from the id of a buffer to its place in memory. */
function spansOf(program: Program, memory: Memory, buffers: BufferTable): (id: string) => MemorySpan {
  const known = new Map<string, MemorySpan>();
  const starts = program.chunks.map((_, chunk) => activationStart(program, memory, { chunk }, 0));
  return (id) => {
    const before = known.get(id);
    if (before) return before;
    const b = buffers.find(id);
    // the index of the rows of a ragged value is not always a buffer of its own
    if (!b) return [-1, -1];
    const start = ARENA * (1 + arenas.indexOf(b.kind)) + (b.kind === "activation" ? (starts[b.chunk ?? 0] ?? 0) : 0);
    const at = start + (memory.offsets[b.within ?? id] ?? 0);
    const span: MemorySpan = [at, at + elementsOf(b.shape) * bytesOf[b.dtype]];
    known.set(id, span);
    return span;
  };
}
