/**
 * Steps as CUDA graphs. The first step is issued call by call, so that NCCL connects and modules load; the second is captured; later steps
 * launch the graph. The host writes inputs to pinned memory, one block per write of a step, which the graph's copies read. Another number
 * of microbatches replaces the graph, because batch sizes only grow.
 */
import type { Buffer } from "../../schemas/plan.ts";
import type { Context, Event, ExecutableGraph, Pinned, Stream } from "./driver.ts";

/** issue: calls execute on the device. capture: calls are recorded into the graph. replay: the graph contains the calls. */
export type Mode = "issue" | "capture" | "replay";

/** The smallest allocation of pinned memory in bytes: page-locking costs far more than a write. */
const pinnedAtOnce = 1 << 20;

/** Returns the step controller of a rank. */
export function openSteps(context: Context, stream: Stream, { graph: wanted }: { readonly graph: boolean }) {
  let steps = 0;
  let mode: Mode | undefined;
  let graph: ExecutableGraph | undefined;
  let microbatches: number | undefined;
  /** Whether `writes` are of an earlier step, whose sequence this step must repeat. */
  let known = false;
  let writes: {
    readonly buffer: Buffer;
    readonly copy: number;
    readonly bytes: number;
    readonly at: bigint;
    readonly staged: ArrayBuffer;
    readonly from: number;
  }[] = [];
  let next = 0;
  const pinned: Pinned[] = [];
  let used = 0;
  /** Events of the begin and the end of the last two replays. */
  const replays: { readonly began: Event; readonly ended: Event }[] = [];

  function stage(bytes: number): { at: bigint; staged: ArrayBuffer; from: number } {
    const aligned = Math.ceil(bytes / 16) * 16;
    if (!pinned.length || used + aligned > pinned.at(-1)!.bytes.byteLength) {
      pinned.push(context.pin(Math.max(aligned, pinnedAtOnce)));
      used = 0;
    }
    const { at, bytes: staged } = pinned.at(-1)!;
    used += aligned;
    return { at: at + BigInt(used - aligned), staged, from: used - aligned };
  }

  /** Destroys the graph when no step uses it, and recycles its pinned memory. */
  function forget(): void {
    if (graph) context.destroyGraph(graph);
    graph = undefined;
    writes = [];
    known = false;
    const [first, ...others] = pinned.splice(0);
    for (const memory of others) context.unpin(memory);
    if (first) pinned.push(first);
    used = 0;
  }

  return {
    /** The mode of the current step; undefined between steps. */
    mode: (): Mode | undefined => mode,
    begin(of: number): Mode {
      steps++;
      next = 0;
      if (of !== microbatches) forget();
      microbatches = of;
      mode = graph ? "replay" : wanted && known ? "capture" : "issue";
      if (mode === "capture") context.beginCapture(stream);
      return mode;
    },
    /** Returns the pinned memory of the next write. Every step must make the same writes. */
    write(buffer: Buffer, copy: number, bytes: number): { readonly at: bigint; readonly memory: ArrayBuffer; readonly offset: number } {
      const before = writes[next];
      if (before && (before.buffer !== buffer || before.copy !== copy || before.bytes !== bytes))
        throw new Error(
          `rankc: write ${next} of step ${steps} is ${buffer.id} (slot ${copy}), and was ${before.buffer.id} (slot ${before.copy})`,
        );
      if (!before && known) throw new Error(`rankc: step ${steps} writes ${buffer.id}, and steps before it did not`);
      const write = before ?? { buffer, copy, bytes, ...stage(bytes) };
      if (!before) writes.push(write);
      next++;
      return { at: write.at, memory: write.staged, offset: write.from };
    },
    /** Ends the step; all its work is then issued. */
    end(): void {
      if (next !== writes.length) throw new Error(`rankc: step ${steps} wrote ${next} of ${writes.length} inputs`);
      known = true;
      if (mode === "capture") graph = context.endCapture(stream);
      mode = undefined;
      if (!graph) return;
      const span = replays.length > 1 ? replays.shift()! : { began: context.createEvent(), ended: context.createEvent() };
      replays.push(span);
      context.record(span.began, stream);
      context.replay(graph, stream);
      context.record(span.ended, stream);
    },
    /** Returns the fraction of the time between two completed replays in which the device waited for the host. */
    idle(): number | undefined {
      const [before, now] = replays;
      if (!before || !now) return undefined;
      const period = context.elapsed(before.began, now.began);
      return 1 - context.elapsed(before.began, before.ended) / period;
    },
    close(): void {
      for (const { began, ended } of replays) for (const event of [began, ended]) context.destroyEvent(event);
      if (graph) context.destroyGraph(graph);
      for (const memory of pinned) context.unpin(memory);
    },
  };
}
