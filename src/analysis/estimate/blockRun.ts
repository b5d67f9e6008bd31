/** Simulates one block of a stage: the times of its instructions from the start of the block, and where its time goes. */
import { type PendingWork, StageClock } from "./stageClock.ts";
import type { TimedBlock, TimedInstruction } from "./timedBlocks.ts";
import { PartSums, type TimeParts } from "./timeParts.ts";

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

/**
 * Simulates a block whose messages are there when it needs them; the pipeline shifts the block if they are not. `pending`: communication of
 * earlier blocks, on the clock of this one. `hostSeconds`: of the host for each launch; 0: launches are captured in a graph.
 */
export function runBlock({ instructions, launches }: TimedBlock, pending: readonly PendingWork[], hostSeconds: number): BlockRunTimes {
  const parts = new PartSums();
  const clock = new StageClock(parts, 0, pending);
  const messages: BlockMessage[] = [];
  const times = new Float64Array(2 * instructions.length);
  for (const [index, i] of instructions.entries()) {
    const [start, end] = runInstruction(clock, i, (message) => messages.push({ ...message, index }));
    times[2 * index] = start;
    times[2 * index + 1] = end;
  }
  clock.waitForHost(Math.max(0, launches * hostSeconds - clock.compute));
  const seconds = clock.compute;
  const tail = clock.pending.filter(({ end }) => end > seconds);
  return { seconds, parts, messages, tail, times };
}

/** Runs one instruction. Returns its start and end. */
export function runInstruction(
  clock: StageClock,
  i: TimedInstruction,
  post: (message: Omit<BlockMessage, "index">) => void,
): readonly [number, number] {
  const { instruction, seconds, stream, axes = "" } = i;
  awaitCollectives(clock, i);
  if (instruction.kind === "compute") return clock.run(i);
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
export function awaitCollectives(clock: StageClock, { instruction: { waits = [] } }: TimedInstruction): void {
  for (const id of waits) clock.await(id);
}
