/**
 * The training loop: runs the plan on the local ranks, step by step. Each rank executes its block runs in the plan's order: forward and
 * backward of every microbatch, then the step block. Local ranks are coroutines that synchronize at collectives.
 */

import { batchAt } from "../../schemas/batchRampup.ts";
import type { Buffer, BufferKind, Instruction, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { orderOf, parseTag } from "../../schemas/program.ts";
import { elementsOf, numberInStage, rankAt, stageOfRank } from "../../schemas/sharding.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { fillNormal } from "../../src/ops/philox.ts";
import type { BlockPosition, Comm, HostData, LocalRanks, RankDevice } from "../backend.ts";
import { checkpointState } from "../checkpoint/state.ts";
import { shardOf as pieceIn, type Ranges, shardRanges, visitRuns } from "../shards.ts";
import { feedOf, inOrder, learntOf } from "./feed.ts";
import type { Batch, BatchOf } from "./inputs.ts";
import { readNumbers, reported } from "./metrics.ts";
import { type Inspector, inspector, MOST_OVERFLOWS, type Nonfinite, nonfiniteIn, nonfiniteText, stopAt, stopAtScale } from "./nonfinite.ts";
import { type RunProgress, trainingSchedule } from "./schedule.ts";

/** The metrics of a step. */
export interface StepResult {
  /** 1-based. */
  readonly step: number;
  /** Mean cross-entropy of the labelled tokens, in nats; train.loss_weighting sets the weights; microbatches without labels are excluded. */
  readonly loss: number;
  /** Labelled tokens, if the job has data.labels. */
  readonly labels?: number;
  /** The loss of multi-token prediction, mean over the depths. The training loss includes model.mtp.coeff times it. */
  readonly mtp_loss?: number;
  /** The sum of balancing and z losses; 0 if there are none. */
  readonly aux_loss: number;
  /** The z loss within aux_loss. */
  readonly z_loss?: number;
  /** Tokens of the busiest expert over the mean of its layer, before tokens are dropped; the maximum over layers. */
  readonly expert_load?: number;
  /** Rows dropped because of the capacity, summed over layers. */
  readonly dropped_rows?: number;
  /** Before clipping. */
  readonly grad_norm: number;
  readonly lr: number;
  readonly tokens: number;
  readonly seconds: number;
  /** In fp16: the loss scale of the step. */
  readonly loss_scale?: number;
  /** In fp16 and with train.on_nonfinite skip: whether the step was skipped because of an overflow or a non-finite metric. */
  readonly skipped?: boolean;
  /** Of a skipped step: the non-finite metric, with `debugNonfinite` also its origin. Not set for fp16 overflows. */
  readonly nonfinite?: string;
}
/** A whole tensor on the host. */
export interface Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}
/** A run of a plan on the local ranks. */
export interface Run {
  /** Returns whether another step begins; all processes of a run agree. Call it once before each step. */
  mayBegin(): boolean;
  /** Requests the end of the run after the current step. */
  stop(): void;
  /** Whether this process has rank 0, and so prints for all. */
  readonly leads: boolean;
  /** Runs a step. Throws a StepFault if a metric is not finite and train.on_nonfinite is stop; the run progress then does not change. */
  step(): Promise<StepResult>;
  /** Returns the run progress, including steps before a resume. */
  progress(): RunProgress;
  /** Reads a local rank's shard of a buffer, between two steps. */
  read(rank: number, buffer: Buffer): Promise<HostData>;
  /** Returns the whole gradients of the last step by parameter name: mean over tokens, before clipping. Throws a Trouble unless all ranks are local. */
  gradients(): Promise<Map<string, Tensor>>;
  /** Returns the whole parameters by name. Throws a Trouble unless all ranks are local. */
  parameters(): Promise<Map<string, Tensor>>;
  /** Returns a buffer named in `watch`, whole, one per microbatch; tokens in the order of the ranks (src/ops/positions.ts). */
  watched(id: string): Promise<Tensor[]>;
  /** Returns the times of the instructions of the last step, if the run was opened with `profile`. */
  profile(): Promise<readonly Timing[]>;
  /** Closes the local ranks. `error`: the error that ended the run. */
  close(error?: Error): Promise<void>;
}
/** The inputs of a run. The run closes `localRanks`. */
export interface RunInputs {
  readonly localRanks: LocalRanks;
  readonly batch: BatchOf;
  /** The initial weights; default: random weights of the job's seed. */
  readonly checkpoint?: { read(name: string, shape: readonly number[]): Float32Array };
  /** The checkpoint to resume from: run progress, and shards of the checkpoint state by name and ranges. */
  readonly from?: { readonly progress: RunProgress; shard(name: string, ranges: Ranges): Float32Array };
  /** Buffers to copy when they are written, for tests and debugging. */
  readonly watch?: readonly string[];
  /** Repeats a non-finite step instruction by instruction to locate its origin. The local ranks must not replay steps as graphs. */
  readonly debugNonfinite?: boolean;
}

/** Writes the initial or restored parameters to the local ranks, and returns the run. Uses no files and no process, so it works in a browser. */
export function runOn(plan: Plan, { localRanks, batch, checkpoint, from, watch = [], debugNonfinite = false }: RunInputs): Run {
  const { mesh, programs, job } = plan;
  const { train, model } = job;
  const { ranks, comm } = localRanks;
  const programOf = (r: number) => programs[stageOfRank(mesh, r)]!;
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const bufferOf = (r: number, id: string): Buffer => buffers[programOf(r).stage]!.get(id)!;
  const kept = new Map<string, Promise<HostData>[][]>();
  const schedule = trainingSchedule(job, from?.progress);
  /** The loss scale of the last step's gradients. */
  let scaled = 1;

  /** Writes one parameter after the other to all its ranks, so that one whole parameter at a time is in host memory. */
  function initialize(): void {
    const all = new Map<string, { r: number; p: Plan["programs"][number]["parameters"][number] }[]>();
    for (const r of ranks) for (const p of programOf(r).parameters) all.set(p.name, [...(all.get(p.name) ?? []), { r, p }]);
    for (const [name, places] of all) {
      let whole: Float32Array | undefined;
      for (const { r, p } of places)
        for (const id of new Set([p.buffer, p.master])) {
          const b = bufferOf(r, id);
          if (checkpoint) whole ??= checkpoint.read(name, b.sizes);
          localRanks.rankDevice(r).write(b, 0, whole ? pieceOf(whole, b, r) : initial(name, p.init, b, r));
        }
    }
  }

  /** Writes the checkpoint state; tied copies and 16-bit copies are filled from the main parameter. */
  function restore({ shard }: NonNullable<RunInputs["from"]>): void {
    for (const r of ranks) {
      const p = programOf(r);
      const names = new Map(checkpointState(p).map(({ name, buffer }) => [buffer.id, name]));
      for (const { name, buffer, master } of p.parameters) names.set(buffer, name).set(master, name);
      for (const [id, name] of names) {
        const b = bufferOf(r, id);
        localRanks.rankDevice(r).write(b, 0, shard(name, ranges(b, r)));
      }
    }
  }

  const ranges = (b: Buffer, r: number): Ranges => shardRanges(mesh, b, numberInStage(mesh, r));
  const pieceOf = <T extends HostData>(whole: T, b: Buffer, r: number): T =>
    whole.length === elementsOf(b.shape) ? whole : pieceIn(whole, b, ranges(b, r));
  function initial(name: string, init: { type: string; std: number }, b: Buffer, r: number): Float32Array {
    const out = new Float32Array(elementsOf(b.shape));
    if (init.type !== "normal") return out.fill(init.type === "ones" ? 1 : 0);
    visitRuns(b.sizes, ranges(b, r), (global, local, n) => fillNormal(out.subarray(local, local + n), train.seed, name, global, init.std));
    return out;
  }
  /** Assembles a whole value from the shards of the ranks of one stage. */
  async function assemble(stage: number, id: string, data: (r: number) => Promise<HostData>): Promise<Tensor> {
    const b = buffers[stage]!.get(id)!;
    const out = new Float32Array(elementsOf(b.sizes));
    for (let n = 0; n < mesh.per_stage; n++) {
      const r = rankAt(mesh, stage, n);
      const shard = await data(r);
      visitRuns(b.sizes, ranges(b, r), (global, local, n) => out.set(shard.subarray(local, local + n), global));
    }
    return { shape: b.sizes, data: out };
  }
  type Parameter = Plan["programs"][number]["parameters"][number];
  async function collect(pick: (p: Parameter) => string, wanted: (p: Parameter) => boolean = () => true): Promise<Map<string, Tensor>> {
    if (ranks.length < mesh.world)
      throw new Trouble(
        `the ranks of ${printable(job.name)} run in ${mesh.world} processes, and no process has all values`,
        "run it with --backend cpu or webgpu, which hold all ranks in one process",
      );
    const all = new Map<string, Tensor>();
    for (const p of programs)
      for (const q of p.parameters)
        if (!q.tied_to && wanted(q))
          all.set(q.name, await assemble(p.stage, pick(q), (r) => localRanks.rankDevice(r).read(bufferOf(r, pick(q)), 0)));
    return all;
  }

  /** Executes one step of a rank. Yields a description of the operation that it waits for. */
  function* walk(
    r: number,
    backend: RankDevice,
    comm: Comm,
    feed: (b: Buffer, name: string, microbatch: number) => HostData,
    order: (stage: number) => readonly string[],
    replayed: boolean,
    inspector?: Inspector,
  ): Generator<string> {
    const p = programOf(r);
    function* block(instructions: readonly Instruction[], at: BlockPosition): Generator<string> {
      if (replayed) return;
      for (const i of instructions) {
        if (i.kind === "compute") {
          backend.compute(i, at.copy, at.microbatch === 0);
          for (const id of watch) if (Object.values(i.writes).includes(id)) keep(id, at, r);
        } else if (i.kind === "collective") while (!comm.collective(r, i, at)) yield `${i.id} (${i.name} over ${i.axes}), ${at.tag}`;
        else if (i.kind === "send") comm.send(r, i, at);
        else while (!comm.recv(r, i, at)) yield `${i.id} from stage ${i.peer}, ${at.tag}`;
        if (!inspector) continue;
        inspector.after(r, i, at);
        yield `${i.id} is inspected, ${at.tag}`;
      }
    }
    /** Writes the inputs that a block reads. Other inputs are skipped, because their memory may be in use by another buffer. */
    const fill = (block: readonly Instruction[], kinds: readonly BufferKind[], copy: number, m: number) => {
      const read = inputsReadBy(block);
      for (const [name, id] of Object.entries(p.inputs)) {
        const b = bufferOf(r, id);
        if (read.has(id) && kinds.includes(b.kind)) backend.write(b, copy, feed(b, name, m));
      }
    };
    backend.zeroGradients();
    fill(p.step, ["optimizer"], 0, 0);
    for (const tag of order(p.stage)) {
      const { kind, microbatch, chunk } = parseTag(tag);
      const at = { tag, microbatch, copy: microbatch % p.chunks[chunk]!.copies };
      const instructions = p.chunks[chunk]![kind];
      // fill workspace inputs for each block; activation inputs persist from the forward block
      fill(instructions, kind === "forward" ? ["workspace", "activation"] : ["workspace"], at.copy, microbatch);
      yield* block(instructions, at);
    }
    yield* block(p.step, { tag: "step", microbatch: -1, copy: 0 });
  }
  function keep(id: string, at: BlockPosition, r: number): void {
    const all = kept.get(id) ?? [];
    kept.set(id, all);
    (all[at.microbatch] ??= [])[r] = localRanks.rankDevice(r).read(bufferOf(r, id), at.copy);
  }

  /** Repeats a step and locates the instruction that produced its first non-finite value. */
  async function originOf(walkAll: (inspector: Inspector) => Promise<void>): Promise<string | undefined> {
    const found = inspector(bufferOf, localRanks.rankDevice);
    await walkAll(found);
    await localRanks.finish();
    return found.origin();
  }

  if (from) restore(from);
  else initialize();
  let stopped = false;
  const orders = new Map<number, readonly (readonly string[])[]>();
  /** Returns the block runs by stage; cached, because most steps have the same number of microbatches. */
  function ordersOf(microbatches: number): readonly (readonly string[])[] {
    const known = orders.get(microbatches) ?? programs.map((p) => orderOf(p, microbatches));
    orders.set(microbatches, known);
    return known;
  }
  const read = (first: number, rows: number): Batch | Error => {
    try {
      return batch(first, rows);
    } catch (error) {
      return error as Error;
    }
  };
  /** The prefetched batch of the next step, or the error of reading it, which the step throws. */
  let next: Batch | Error | undefined;
  return {
    leads: ranks.includes(0),
    mayBegin: () => localRanks.mayBegin?.() ?? !stopped,
    stop() {
      stopped = true;
      localRanks.stop?.();
    },
    progress: () => schedule.progress(),
    read: (rank, buffer) => localRanks.rankDevice(rank).read(buffer, 0),
    async step() {
      const begun = performance.now();
      const parameters = schedule.next();
      const { lr, lossScale, upscale } = parameters;
      const now = next ?? read(parameters.first, parameters.batch);
      if (now instanceof Error) throw now;
      const given = inOrder(job, now);
      scaled = lossScale;
      kept.clear();
      const feed = feedOf(job, parameters, given);
      const order = ordersOf(parameters.microbatches);
      const walkAll = (inspector?: Inspector): Promise<void> => {
        const replayed = localRanks.beginStep?.(parameters.microbatches) ?? false;
        const walks = ranks.map((r) =>
          walk(
            r,
            localRanks.rankDevice(r),
            comm,
            (b, name, m) => pieceOf(feed(name, m), b, r),
            (stage) => order[stage]!,
            replayed,
            inspector,
          ),
        );
        return runTogether(walks, inspector?.settled);
      };
      await walkAll();
      // read the next batch while the device computes
      const after = parameters.first + parameters.batch;
      [, next] = await Promise.all([localRanks.finish(), (async () => read(after, batchAt(train, after)))()]);
      const numbers = await readNumbers(plan, localRanks, bufferOf);
      const found = nonfiniteIn(numbers);
      const fp16 = train.precision === "fp16";
      const outcome = !found ? "updated" : fp16 && found.metric === "grad_norm" ? "overflowed" : "nonfinite";
      const step = schedule.progress().steps + 1;
      let nonfinite: Nonfinite | undefined;
      if (found && outcome === "nonfinite") {
        // the step changed no weights, so a repetition gives the same values
        const origin = debugNonfinite ? await originOf(walkAll) : undefined;
        nonfinite = { ...found, ...(origin !== undefined && { origin }) };
        if (train.on_nonfinite === "stop") {
          next = undefined;
          throw stopAt(step, nonfinite);
        }
      }
      schedule.done(outcome);
      const learnt = job.data.labels === null ? undefined : learntOf(job, now);
      if (train.on_nonfinite === "stop" && schedule.hopeless() >= MOST_OVERFLOWS) throw stopAtScale(step, lossScale);
      return {
        step,
        ...reported(numbers, { upscale, aux: given.aux_weight?.[0] ?? 1, loss: learnt?.loss ?? 1, mtp: learnt?.mtp ?? 1 }),
        ...(learnt && { labels: learnt.labels }),
        lr,
        tokens: parameters.batch * model.seq,
        seconds: (performance.now() - begun) / 1000,
        ...(fp16 && { loss_scale: lossScale }),
        ...((fp16 || train.on_nonfinite === "skip") && { skipped: outcome !== "updated" }),
        ...(nonfinite && { nonfinite: nonfiniteText(nonfinite) }),
      };
    },
    async gradients() {
      const all = await collect(
        (q) => q.gradient,
        (q) => q.rule === train.optimizer.type,
      );
      for (const { data } of all.values()) for (let i = 0; i < data.length && scaled !== 1; i++) data[i]! /= scaled;
      return all;
    },
    parameters: () => collect((q) => q.master),
    watched: (id) =>
      Promise.all(
        (kept.get(id) ?? []).map((shards) => {
          const stage = programs.findIndex((p) => shards[rankAt(mesh, p.stage, 0)]);
          return assemble(stage, id, (r) => shards[r]!);
        }),
      ),
    profile: async () => (await localRanks.profile?.()) ?? [],
    close: (error) => localRanks.close(error),
  };
}

/** Cache of the buffers that a block reads; a block runs for every microbatch. */
const known = new WeakMap<readonly Instruction[], ReadonlySet<string>>();
function inputsReadBy(block: readonly Instruction[]): ReadonlySet<string> {
  const found = known.get(block) ?? new Set(block.flatMap(readBy));
  known.set(block, found);
  return found;
}
const readBy = (i: Instruction): readonly string[] =>
  i.kind === "compute" ? Object.values(i.reads) : i.kind === "collective" ? [i.from] : i.kind === "send" ? [i.buffer] : [];

/**
 * Runs the coroutines round-robin until all are done, and awaits `settled` after each resumption. Throws if no coroutine can proceed: the
 * plan has a deadlock; the message lists the operation that each rank waits for.
 */
async function runTogether(ranks: readonly Generator<string>[], settled?: () => Promise<void>): Promise<void> {
  const waits = new Map<number, string>();
  let left = ranks.map((_, r) => r);
  while (left.length) {
    let moved = false;
    for (const r of left) {
      const before = waits.get(r);
      const { done, value } = ranks[r]!.next();
      if (settled) await settled();
      if (done) waits.set(r, "");
      else waits.set(r, value);
      if (done || before !== value) moved = true;
    }
    left = left.filter((r) => waits.get(r) !== "");
    if (!moved && left.length) throw new Error(`rankc: deadlock: ${left.map((r) => `rank ${r} waits at ${waits.get(r)}`).join("; ")}`);
  }
}
