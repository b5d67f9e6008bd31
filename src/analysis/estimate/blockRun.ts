/** Simulates one block of a stage: the times of its instructions from the start of the block, and where its time goes. */
import { type PendingWork, StageClock } from "./stageClock.ts";
import type { CommunicationClass, KernelPart, TimedBlock, TimedInstruction } from "./timedBlocks.ts";

/** Where seconds of a stage go. Communication counts where the compute stream waits for it, by its axes. */
export interface TimeParts {
  readonly kernels: Readonly<Record<KernelPart, number>>;
  readonly exposed: ReadonlyMap<string, number>;
  /** The same by class. */
  readonly exposedBy: ReadonlyMap<CommunicationClass, number>;
  /** Waiting for the host to launch kernels. */
  readonly launches: number;
  /** Waiting for other stages. */
  readonly bubble: number;
}

/** Sums of parts, to which runs are added. */
export class PartSums implements TimeParts {
  readonly kernels: Record<KernelPart, number> = { products: 0, attention: 0, "other kernels": 0, optimizer: 0 };
  readonly exposed = new Map<string, number>();
  readonly exposedBy = new Map<CommunicationClass, number>();
  launches = 0;
  bubble = 0;

  addKernel(part: KernelPart, seconds: number): void {
    this.kernels[part] += seconds;
  }
  addExposed(axes: string, seconds: number, by?: CommunicationClass): void {
    if (seconds <= 0) return;
    this.exposed.set(axes, (this.exposed.get(axes) ?? 0) + seconds);
    if (by) this.exposedBy.set(by, (this.exposedBy.get(by) ?? 0) + seconds);
  }
  addAll(parts: TimeParts): void {
    for (const [part, seconds] of Object.entries(parts.kernels) as [KernelPart, number][]) this.kernels[part] += seconds;
    for (const [axes, seconds] of parts.exposed) this.addExposed(axes, seconds);
    for (const [by, seconds] of parts.exposedBy) this.exposedBy.set(by, (this.exposedBy.get(by) ?? 0) + seconds);
    this.launches += parts.launches;
    this.bubble += parts.bubble;
  }
  get total(): number {
    return sumOfParts(this);
  }
}

/** Returns the sum of all parts in seconds. */
export const sumOfParts = ({ kernels, exposed, launches, bubble }: TimeParts): number =>
  [...Object.values(kernels), ...exposed.values()].reduce((a, b) => a + b, launches + bubble);

/** A message of a block. */
export interface BlockMessage {
  readonly kind: "send" | "recv";
  readonly channel: string;
  readonly peer: number;
  readonly seconds: number;
  /** Of a send: when it may leave. Of a receive: when it is posted. */
  readonly ready: number;
  readonly index: number;
}

/** A simulated block, on a clock that begins with it. */
export interface BlockRunTimes {
  readonly seconds: number;
  readonly parts: TimeParts;
  readonly messages: readonly BlockMessage[];
  /** Communication that later blocks run beside. */
  readonly tail: readonly PendingWork[];
  /** Start and end of each instruction; of messages, of the time from their being ready. */
  readonly times: Float64Array;
}

/** How a stack runs blocks. */
export interface BlockOptions {
  readonly slowdown: number;
  /** Seconds of the host for each launch; 0: launches are captured in a graph. */
  readonly hostSeconds: number;
}

/**
 * Simulates a block whose messages are there when it needs them; the pipeline shifts the block if they are not. `pending`: communication of
 * earlier blocks, on the clock of this one.
 */
export function runBlock({ instructions, launches }: TimedBlock, pending: readonly PendingWork[], options: BlockOptions): BlockRunTimes {
  const clock = new StageClock(options.slowdown, 0, pending);
  const parts = new PartSums();
  const messages: BlockMessage[] = [];
  const times = new Float64Array(2 * instructions.length);
  for (const [index, i] of instructions.entries()) {
    const [start, end] = runInstruction(clock, i, parts, (message) => messages.push({ ...message, index }));
    times[2 * index] = start;
    times[2 * index + 1] = end;
  }
  const gap = Math.max(0, launches * options.hostSeconds - clock.compute);
  parts.launches += gap;
  const seconds = clock.compute + gap;
  const tail = clock.pending.filter(({ end }) => end > seconds);
  return { seconds, parts, messages, tail, times };
}

/** Runs one instruction and adds its time to the parts. Returns its start and end. */
export function runInstruction(
  clock: StageClock,
  i: TimedInstruction,
  parts: PartSums,
  post: (message: Omit<BlockMessage, "index">) => void,
): readonly [number, number] {
  const { instruction, seconds, stream, axes = "", part } = i;
  awaitCollectives(clock, i, parts);
  if (instruction.kind === "compute") {
    const { start, end, exposed, axes: waited, communication, idle } = clock.run(i, seconds);
    parts.addExposed(waited, exposed, communication);
    parts.bubble += idle;
    parts.addKernel(part ?? "other kernels", end - start);
    return [start, end];
  }
  const ready = clock.readyAt(i, stream);
  if (instruction.kind === "collective") {
    const id = instruction.stream && instruction.id;
    if (seconds > 0) clock.add({ ...i, stream, axes, start: ready, end: ready + seconds, late: 0, ...(id && { id }) });
    return [ready, ready + seconds];
  }
  const { kind, peer, channel } = instruction;
  post({ kind, peer, channel, seconds, ready: kind === "send" ? clock.readyAt(i, stream) : clock.compute });
  return [ready, ready + seconds];
}

/** Makes the compute stream wait for the asynchronous collectives that an instruction waits for; a second call waits for nothing. */
export function awaitCollectives(clock: StageClock, { instruction: { waits = [] } }: TimedInstruction, parts: PartSums): void {
  for (const id of waits) {
    const { exposed, axes, communication, idle } = clock.await(id);
    parts.addExposed(axes, exposed, communication);
    parts.bubble += idle;
  }
}
