/**
 * The CUDA backend: one rank of a plan on one device. Calls are asynchronous and execute in the plan's order; communication overlaps with
 * kernels. From the third step on, a step is one launch of a CUDA graph (graph.ts).
 */
import { setTimeout } from "node:timers/promises";
import type { Plan, Program } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { WEIGHTS } from "../../schemas/weightsKernel.ts";
import type { HostMemory, LocalRanks, StepKind } from "../backend.ts";
import { RankPrograms } from "../rankPrograms.ts";
import type { StartupClock } from "../startup.ts";
import { openArenas } from "./arenas.ts";
import { bytesBeside, openComm } from "./comm.ts";
import type { Share } from "./communicators.ts";
import { type Context, type CudaDevice, driver } from "./driver.ts";
import { Steps } from "./graph.ts";
import { archFor, type KernelFiles, loadKernels } from "./kernels.ts";
import { binder } from "./launches.ts";
import { CudaRankDevice } from "./rankDevice.ts";
import { RowBounds } from "./rowBounds.ts";
import { type Label, RankStreams, type Timed, type TimedWork } from "./streams.ts";
import { Waits } from "./waits.ts";
import { Weights } from "./weights.ts";

/** Settings of `openCuda`. */
export interface CudaSettings {
  readonly rank: number;
  /** The ordinal among the devices of this process. */
  readonly device: number;
  readonly files: KernelFiles;
  readonly share: Share;
  /** Replay steps as a CUDA graph. Only without it can values be read within a step. */
  readonly graph?: boolean;
  /** The instructions of the last step whose times are recorded; anything but false disables the graph. Default: none. */
  readonly profile?: TimedWork;
  readonly startup?: StartupClock;
  readonly onProgress?: (line: string) => void;
  /** Aborted when another rank fails: pending communication then ends immediately. */
  readonly signal?: AbortSignal;
}
/** The local rank of a CUDA process. */
export interface CudaRanks extends LocalRanks {
  /** Begins a step of `microbatches`. Returns true if the step is replayed: only writes have an effect; other calls do nothing and may be omitted. */
  beginStep(microbatches: number, kind?: StepKind): boolean;
  /** Returns the fraction of the time between the last two replays in which the device waited for the host. */
  idle(): number | undefined;
  /** With `profile`: the timed instructions of the last step in issue order, times in µs from its begin. */
  profile(): (Timed & { readonly rank: number })[];
  /** With `profile`: the first timed instruction of this step that the device has not completed. */
  underWay(): Label | undefined;
}

/** Opens one rank on a CUDA device. Throws a Trouble if the device or the plan is not suitable. */
export async function openCuda(plan: Plan, settings: CudaSettings): Promise<CudaRanks> {
  const { rank, files, share, profile = false, signal, startup, onProgress } = settings;
  const device = deviceOf(settings);
  archFor(plan, device);
  const { program } = new RankPrograms(plan).of(rank);
  const context = driver().open(device);
  const streams = new RankStreams(context);
  const arenas = openArenas(context, plan, rank, bytesBeside(plan, rank), streams.compute.stream);
  startup?.end("device");
  const kernels = await loadKernels(context, { plan, ids: kernelsOf(program), files, rank, ...(onProgress && { onProgress }) });
  startup?.end("kernels");
  const waits = new Waits(context, streams.compute.stream, () => signal?.throwIfAborted());
  const comm = await openComm({ plan, rank, context, streams, place: arenas.place, share, settled: () => waits.settled() });
  waits.add(() => comm.check());
  const steps = new Steps(context, streams.compute.stream, { graph: settings.graph !== false && profile === false });
  const bind = binder({ plan, rank, program, context, arenas, kernels });
  const bounds = new RowBounds(context, program, arenas);
  const weights = new Weights({ plan, context, streams, kernels });
  const rankDevice = new CudaRankDevice({ context, streams, arenas, steps, waits, weights, bind });
  /** Steps that have begun and not completed: pending work may never complete. */
  let underWay = 0;

  return {
    ranks: [rank],
    rankDevice: () => rankDevice,
    hostMemory: pinnedMemory(context),
    readsInOrder: true,
    canBeginAhead: (microbatches, kind) => steps.isReplayed(microbatches, kind),
    comm: {
      collective: (r, i, at) => steps.mode === "replay" || comm.collective(r, i, at),
      wait: (r, id) => steps.mode === "replay" || comm.wait(r, id),
      send: (r, i, at) => void (steps.mode === "replay" || comm.send(r, i, at)),
      recv: (r, i, at) => steps.mode === "replay" || comm.recv(r, i, at),
    },
    beginStep(microbatches, kind) {
      underWay++;
      streams.join();
      const mode = steps.begin(microbatches, kind);
      streams.begin(profile);
      return mode === "replay";
    },
    async finish() {
      const mode = steps.mode;
      if (mode !== "replay") {
        streams.join();
        bounds.gather(streams);
      }
      if (mode) steps.end();
      const expectWithin = bounds.issueCopy(streams.compute.stream);
      await waits.settled();
      waits.check();
      underWay = Math.max(0, underWay - 1);
      expectWithin(rank);
    },
    memoryInUse() {
      const { free, total } = context.memory();
      return total - free;
    },
    idle: () => steps.idle(),
    profile: () => streams.timed().map((t) => ({ rank, ...t })),
    underWay: () => streams.underWay(),
    async close(error) {
      if (error || underWay > 0 || signal?.aborted) {
        const aborted = comm.abort();
        // if pending work does not end, skip the cleanup: the process ends soon and the driver frees its memory
        if (!(await waits.settlesWithin(PATIENCE))) return;
        steps.close();
        await Promise.race([aborted, setTimeout(PATIENCE)]);
      } else {
        // destroy graphs first: NCCL waits for graphs that contain its calls
        steps.close();
        comm.close();
      }
      for (const part of [waits, rankDevice, bounds, streams, kernels, arenas, context]) part.close();
    },
  };
}

/** Pinned memory for copies of the state. */
const pinnedMemory = (context: Context): HostMemory => ({
  allocate(bytes) {
    const { at, bytes: memory } = context.pin(bytes);
    return { bytes: new Uint8Array(memory), address: at };
  },
  free({ address, bytes }) {
    if (typeof address === "bigint") context.unpin({ at: address, bytes: bytes.buffer as ArrayBuffer });
  },
});

/** Time limit in milliseconds for the abort of pending work. */
const PATIENCE = 2000;

function deviceOf({ rank, device }: CudaSettings): CudaDevice {
  const { devices } = driver();
  const found = devices[device];
  if (found) return found;
  throw new Trouble(
    `rank ${rank} is to use device ${device}, and this process sees ${devices.length}`,
    "start as many ranks on each machine as it has GPUs, and see that CUDA_VISIBLE_DEVICES hides none",
    3,
  );
}

/** Returns the ids of all kernels of a program, and of the runtime. */
const kernelsOf = (program: Program): Set<string> =>
  new Set([
    WEIGHTS,
    ...instructionsOf(program).flatMap((i) => (i.kind === "compute" ? [i.kernel, ...(i.first_kernel ? [i.first_kernel] : [])] : [])),
  ]);
