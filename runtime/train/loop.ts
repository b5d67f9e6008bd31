/**
 * execute: plan × fleet → trained steps. Walks each rank's program in the plan's order: forward and backward of every
 * microbatch, then the step block. The ranks of this process run as coroutines, which meet at collectives.
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

export interface StepResult {
  /** 1-based. */
  readonly step: number;
  /** Mean cross-entropy over all tokens of the step that are learnt from, nats; as train.loss_weighting says, of the microbatches that have labels. */
  readonly loss: number;
  /** Tokens that are learnt from, where data.labels says which. */
  readonly labels?: number;
  /** Of multi-token prediction, where the model has it: the mean of that over the depths. model.mtp.coeff of it is added to the loss. */
  readonly mtp_loss?: number;
  /** What balancing and z losses add to it; 0 where there are none. */
  readonly aux_loss: number;
  /** Of that the z loss, where the model has one. */
  readonly z_loss?: number;
  /** Where the model has experts, how many tokens chose the busiest expert of a layer, over the mean of its experts, before any are dropped; of the layer where that is largest. */
  readonly expert_load?: number;
  /** Where experts have a capacity, the rows that are dropped in the step, of all layers. */
  readonly dropped_rows?: number;
  /** Before clipping. */
  readonly grad_norm: number;
  readonly lr: number;
  readonly tokens: number;
  readonly seconds: number;
  /** In fp16, what the loss was multiplied by before backward. */
  readonly loss_scale?: number;
  /** In fp16, and where train.on_nonfinite is skip: whether the step changed no weights, since its gradients overflowed or since a number is not finite. */
  readonly skipped?: boolean;
  /** Of a skipped step, what is not finite, and with `debugNonfinite` its origin; not of gradients that overflowed by the loss scale. */
  readonly nonfinite?: string;
}
export interface Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}
export interface Run {
  /** Whether another step begins: with other processes, all of them have agreed to it. Asked once before each step. */
  mayBegin(): boolean;
  /** Asks that no further step begins. */
  stop(): void;
  /** This process speaks for all: it holds rank 0. */
  readonly leads: boolean;
  /** Throws a StepFault where a number of the step is not finite and train.on_nonfinite is stop: the run is where it was before it. */
  step(): Promise<StepResult>;
  /** How far the run is, steps before it began counted. */
  progress(): RunProgress;
  /** What a rank of this process holds of a buffer, between two steps. */
  read(rank: number, buffer: Buffer): Promise<HostData>;
  /** The gradient of the last step by parameter name: mean over the step's tokens, before clipping, put together from all ranks. */
  gradients(): Promise<Map<string, Tensor>>;
  parameters(): Promise<Map<string, Tensor>>;
  /** A buffer named in `watch`, per microbatch, put together from all ranks; tokens as they lie (src/ops/positions.ts). */
  watched(id: string): Promise<Tensor[]>;
  /** What ran when in the last step, where it was opened with `profile`. */
  profile(): Promise<readonly Timing[]>;
  /** With what went wrong, if something did. */
  close(error?: Error): Promise<void>;
}
/** What a plan is run with: opened before, and closed with the run. */
export interface RunInputs {
  readonly localRanks: LocalRanks;
  readonly batch: BatchOf;
  /** The weights to start from, read before this returns; without them, those of the job's seed. */
  readonly checkpoint?: { read(name: string, shape: readonly number[]): Float32Array };
  /** Where another run was, which this one goes on from: all that it remembered, by name, in whatever pieces this plan has. */
  readonly from?: { readonly progress: RunProgress; shard(name: string, ranges: Ranges): Float32Array };
  /** Buffers to keep a copy of when they are written, for tests and debugging. */
  readonly watch?: readonly string[];
  /** Runs a step whose numbers are not finite a second time, instruction by instruction, to name the first that made one; no fleet may replay steps. */
  readonly debugNonfinite?: boolean;
}

/** Writes the parameters; the run then stands before its first step. Knows no files and no process: it works in a browser too. */
export function runOn(plan: Plan, { localRanks, batch, checkpoint, from, watch = [], debugNonfinite = false }: RunInputs): Run {
  const { mesh, programs, job } = plan;
  const { train, model } = job;
  const { ranks, comm } = localRanks;
  const programOf = (r: number) => programs[stageOfRank(mesh, r)]!;
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const bufferOf = (r: number, id: string): Buffer => buffers[programOf(r).stage]!.get(id)!;
  const kept = new Map<string, Promise<HostData>[][]>();
  const schedule = trainingSchedule(job, from?.progress);
  /** What the gradients of the last step were multiplied by. */
  let scaled = 1;

  /** One parameter after the other, on all ranks that have it: a checkpoint's is in memory once, and no longer than it must. */
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

  /** All that the other run remembered; copies of parameters, and those in 16 bits beside a main one, follow from that. */
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
  /** A value put together from the pieces of the ranks of one stage. */
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
        `the ranks of ${printable(job.name)} run in ${mesh.world} processes, none of which holds all values`,
        "run it with --backend cpu or webgpu, which hold all ranks in one process",
      );
    const all = new Map<string, Tensor>();
    for (const p of programs)
      for (const q of p.parameters)
        if (!q.tied_to && wanted(q))
          all.set(q.name, await assemble(p.stage, pick(q), (r) => localRanks.rankDevice(r).read(bufferOf(r, pick(q)), 0)));
    return all;
  }

  /** One rank's step. Yields where it has to wait, saying for what. */
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
          backend.compute(i, at.copy);
          for (const id of watch) if (Object.values(i.writes).includes(id)) keep(id, at, r);
        } else if (i.kind === "collective") while (!comm.collective(r, i, at)) yield `${i.id} (${i.name} over ${i.axes}), ${at.tag}`;
        else if (i.kind === "send") comm.send(r, i, at);
        else while (!comm.recv(r, i, at)) yield `${i.id} from stage ${i.peer}, ${at.tag}`;
        if (!inspector) continue;
        inspector.after(r, i, at);
        yield `${i.id} is inspected, ${at.tag}`;
      }
    }
    /** Those of the inputs that a block reads; elsewhere their bytes may be another's. */
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
      // workspace is filled for each block; activations are written by the forward block and stay
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

  /** Runs a step again and finds the instruction that made its first value that is not finite. */
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
  /** By stage; many steps have one. */
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
  /** The batch of the step to come, or what is wrong with it: that matters once the step begins. */
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
      // the next batch is read while the device works
      const after = parameters.first + parameters.batch;
      [, next] = await Promise.all([localRanks.finish(), (async () => read(after, batchAt(train, after)))()]);
      const numbers = await readNumbers(plan, localRanks, bufferOf);
      const found = nonfiniteIn(numbers);
      const fp16 = train.precision === "fp16";
      const outcome = !found ? "updated" : fp16 && found.metric === "grad_norm" ? "overflowed" : "nonfinite";
      const step = schedule.progress().steps + 1;
      let nonfinite: Nonfinite | undefined;
      if (found && outcome === "nonfinite") {
        // it changed nothing: the same step gives the same numbers again
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

/** What a block reads, found once: a block runs every microbatch. */
const known = new WeakMap<readonly Instruction[], ReadonlySet<string>>();
function inputsReadBy(block: readonly Instruction[]): ReadonlySet<string> {
  const found = known.get(block) ?? new Set(block.flatMap(readBy));
  known.set(block, found);
  return found;
}
const readBy = (i: Instruction): readonly string[] =>
  i.kind === "compute" ? Object.values(i.reads) : i.kind === "collective" ? [i.from] : i.kind === "send" ? [i.buffer] : [];

/**
 * Runs coroutines until all are done; where one yields, `settled` is waited for. Throws where none can go on: the plan has a deadlock,
 * and the message says where each rank waits.
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
