/**
 * The CUDA backend: one rank of a plan on one device. Calls are asynchronous and execute in the plan's order; communication overlaps with
 * kernels. From the third step on, a step is one launch of a CUDA graph (graph.ts).
 */
import { setImmediate, setTimeout } from "node:timers/promises";
import { encoded, storeValues, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Compute, Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { LocalRanks, RankDevice } from "../backend.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import { openArenas } from "./arenas.ts";
import { bytesBeside, openComm, type Share } from "./comm.ts";
import { driver, type Event, type Pinned } from "./driver.ts";
import { openSteps } from "./graph.ts";
import { archFor, type KernelFiles, loadKernels } from "./kernels.ts";
import { type Bound, binder } from "./launches.ts";
import { type Label, openStreams, type Timed } from "./streams.ts";

/** Settings of `openCuda`. */
export interface CudaSettings {
  readonly rank: number;
  /** The ordinal among the devices of this process. */
  readonly device: number;
  readonly files: KernelFiles;
  readonly share: Share;
  /** Replay steps as a CUDA graph. Only without it can values be read within a step. */
  readonly graph?: boolean;
  /** Record the times of every instruction of the last step; disables the graph. */
  readonly profile?: boolean;
  /** Aborted when another rank fails: pending communication then ends immediately. */
  readonly signal?: AbortSignal;
}
/** The local rank of a CUDA process. */
export interface CudaRanks extends LocalRanks {
  /** Begins a step of `microbatches`. Returns true if the step is replayed: only writes have an effect; other calls do nothing and may be omitted. */
  beginStep(microbatches: number): boolean;
  /** Returns the fraction of the time between the last two replays in which the device waited for the host. */
  idle(): number | undefined;
  /** With `profile`: the instructions of the last step in issue order, times in µs from its begin. */
  profile(): (Timed & { readonly rank: number })[];
  /** With `profile`: the first instruction of this step that the device has not completed. */
  underWay(): Label | undefined;
}

/** Opens one rank on a CUDA device. Throws a Trouble if the device or the plan is not suitable. */
export async function openCuda(plan: Plan, settings: CudaSettings): Promise<CudaRanks> {
  const { rank, files, share, profile = false, signal } = settings;
  const { devices, open } = driver();
  const device = devices[settings.device];
  if (!device)
    throw new Trouble(
      `rank ${rank} is to use device ${settings.device}, and this process sees ${devices.length}`,
      "start as many ranks on each machine as it has GPUs, and see that CUDA_VISIBLE_DEVICES hides none",
      3,
    );
  archFor(plan, device);
  const program = plan.programs[stageOfRank(plan.mesh, rank)]!;
  const context = open(device);
  const streams = openStreams(context);
  const stream = streams.compute.stream;
  const arenas = openArenas(context, plan, rank, bytesBeside(plan, rank), stream);
  const ids = new Set(
    instructionsOf(program).flatMap((i) => (i.kind === "compute" ? [i.kernel, ...(i.first_kernel ? [i.first_kernel] : [])] : [])),
  );
  const kernels = await loadKernels(context, { plan, ids, files, rank });
  const done = context.createEvent("order");
  let check = (): void => signal?.throwIfAborted();

  /** Waits until the event is complete; the failure of another rank ends the wait. */
  async function happens(event: Event): Promise<void> {
    const begun = performance.now();
    for (let asked = 0; !context.happened(event); asked++) {
      if (asked % 256 === 0) check();
      // poll less often for long steps
      await (performance.now() - begun < 1000 ? setImmediate() : setTimeout(1));
    }
  }
  async function settled(): Promise<void> {
    context.record(done, stream);
    await happens(done);
  }
  const comm = await openComm({ plan, rank, context, streams, place: arenas.place, share, settled });
  check = () => {
    signal?.throwIfAborted();
    comm.check();
  };
  const steps = openSteps(context, stream, { graph: settings.graph !== false && !profile });
  const bind = binder({ plan, rank, context, arenas, kernels });
  const bound = new Map<Compute, Bound[]>();
  const limits = program.bounds.map((limit, n) => ({ limit, at: 4 * n, place: arenas.place(limit.needed, 0) }));
  const found = limits.length ? context.pin(4 * limits.length) : undefined;
  const idle: Pinned[] = [];
  /** A step has begun and not completed: pending work may never complete. */
  let broken = false;

  /** Returns pinned memory of at least this size; the caller returns it to `idle`. */
  function borrow(bytes: number): Pinned {
    const at = idle.findIndex((p) => p.bytes.byteLength >= bytes);
    return at >= 0 ? idle.splice(at, 1)[0]! : context.pin(Math.max(bytes, 4096));
  }

  const backend: RankDevice = {
    zeroGradients() {
      const { at, bytes, span } = arenas.zeroed;
      if (steps.mode() === "replay" || bytes === 0) return;
      streams.run({ reads: [], writes: [span] }, undefined, (s) => context.fillIn(at, 0, bytes, s));
    },
    compute(i, copy, first = false) {
      if (steps.mode() === "replay") return;
      const copies = bound.get(i) ?? [];
      bound.set(i, copies);
      const isFirst = first && i.first_kernel !== undefined;
      const { touch, issue, kernel } = (copies[2 * copy + Number(isFirst)] ??= bind(i, copy, isFirst));
      streams.run(touch, { id: i.id, op: i.op, kernel }, issue);
    },
    write(buffer, copy, data) {
      const { at, bytes, span, count } = arenas.place(buffer.id, copy);
      if (data.length !== count) throw new Error(`rankc: ${data.length} values are written to ${buffer.id}, which holds ${count}`);
      const mode = steps.mode();
      const staged = mode && steps.write(buffer, copy, bytes);
      if (staged) storeValues(typedMemory(buffer.dtype, staged.memory, staged.offset, count), data);
      if (mode === "replay") return;
      const from = staged?.at ?? encoded(buffer.dtype, data).words;
      streams.run({ reads: [], writes: [span] }, undefined, (s) => context.copyIn(at, from, bytes, s));
    },
    async read(buffer, copy) {
      if (steps.mode() === "capture" || steps.mode() === "replay")
        throw new Error(`rankc: ${buffer.id} is read within a step that is a graph: open with graph: false`);
      const { at, bytes, span, count } = arenas.place(buffer.id, copy);
      const pinned = borrow(bytes);
      const copied = context.createEvent("order");
      streams.run({ reads: [span], writes: [] }, undefined, (s) => {
        context.copyOut(pinned.at, at, bytes, s);
        context.record(copied, s);
      });
      await happens(copied);
      context.destroyEvent(copied);
      const memory = typedMemory(buffer.dtype, pinned.bytes, 0, count);
      const data = memory.codec ? valuesIn(memory) : memory.words.slice();
      idle.push(pinned);
      return data;
    },
  };

  return {
    ranks: [rank],
    rankDevice: () => backend,
    comm: {
      collective: (r, i, at) => steps.mode() === "replay" || comm.collective(r, i, at),
      send: (r, i, at) => void (steps.mode() === "replay" || comm.send(r, i, at)),
      recv: (r, i, at) => steps.mode() === "replay" || comm.recv(r, i, at),
    },
    beginStep(microbatches) {
      broken = true;
      streams.join();
      const mode = steps.begin(microbatches);
      streams.begin(profile);
      return mode === "replay";
    },
    async finish() {
      const mode = steps.mode();
      if (mode !== "replay") {
        streams.join();
        for (const { place, at } of limits)
          streams.run({ reads: [place.span], writes: [] }, undefined, (s) => context.copyOut(found!.at + BigInt(at), place.at, 4, s));
      }
      if (mode) steps.end();
      await settled();
      check();
      broken = false;
      const counts = found && new Int32Array(found.bytes);
      for (const [n, { limit }] of limits.entries()) if (counts![n]! > limit.bound) throw capacityExceeded(limit, rank, counts![n]!);
    },
    idle: () => steps.idle(),
    profile: () => streams.timed().map((t) => ({ rank, ...t })),
    underWay: () => streams.underWay(),
    async close(error) {
      if (error || broken || signal?.aborted) {
        const aborted = comm.abort();
        context.record(done, stream);
        // if pending work does not end, skip the cleanup: the process ends soon and the driver frees its memory
        if (!(await within(PATIENCE, () => context.happened(done)))) return;
        steps.close();
        await Promise.race([aborted, setTimeout(PATIENCE)]);
      } else {
        // destroy graphs first: NCCL waits for graphs that contain its calls
        steps.close();
        comm.close();
      }
      for (const p of [...idle, ...(found ? [found] : [])]) context.unpin(p);
      context.destroyEvent(done);
      streams.close();
      kernels.close();
      arenas.close();
      context.close();
    },
  };
}

/** Time limit in milliseconds for the abort of pending work. */
const PATIENCE = 2000;
async function within(milliseconds: number, asked: () => boolean): Promise<boolean> {
  const last = performance.now() + milliseconds;
  for (;;) {
    try {
      if (asked()) return true;
    } catch {
      return false;
    }
    if (performance.now() > last) return false;
    await setTimeout(1);
  }
}
