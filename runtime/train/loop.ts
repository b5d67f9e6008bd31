/**
 * The training loop: runs the plan on the local ranks, step by step. Each rank executes its block runs in the plan's order: forward and
 * backward of every microbatch, then the step block. Local ranks are coroutines that synchronize at collectives.
 */

import { batchAt } from "../../schemas/batchRampup.ts";
import { type HeldOutPart, heldOutParts } from "../../schemas/heldOut.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import type { Buffer, Compute, Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import type { EvaluationResult, StepResult } from "../../schemas/stepResult.ts";
import type { Timing } from "../../schemas/timing.ts";
import type { BlockPosition, HostData, LocalRanks } from "../backend.ts";
import type { HeldOut } from "../data/heldOut.ts";
import { RankPrograms } from "../rankPrograms.ts";
import { evaluate } from "./evaluation.ts";
import { attentionShare, feedOf, inOrder, learntOf } from "./feed.ts";
import type { Batch, BatchOf } from "./inputs.ts";
import { readNumbers, reported } from "./metrics.ts";
import { type Inspector, inspector, MOST_OVERFLOWS, type Nonfinite, nonfiniteIn, nonfiniteText, stopAt, stopAtScale } from "./nonfinite.ts";
import { Parameters, type StateShards, type Tensor, type WholeTensors } from "./parameters.ts";
import { runTogether, walkStep } from "./rankStep.ts";
import { type RunProgress, type StepParameters, trainingSchedule } from "./stepParameters.ts";

export type { EvaluationResult, StepResult } from "../../schemas/stepResult.ts";
export type { Tensor } from "./parameters.ts";

/** What a step reads. */
export interface StepOptions {
  /** Reads tables, too, which only a log needs: `expert_loads` and `expert_bias`. All processes of a run agree. */
  readonly detailed?: boolean;
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
  step(options?: StepOptions): Promise<StepResult>;
  /** Reads over the data of the next step without training; it counts as a step. All processes of a run call it together. */
  skipStep(): void;
  /** The held-out data that the run can evaluate on. */
  readonly heldOut: readonly HeldOutPart[];
  /** Evaluates on held-out data, between two steps; all processes of a run call it together. Throws if the run has no such data. */
  evaluate(part: HeldOutPart): Promise<EvaluationResult>;
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
  /** The data of evaluations. */
  readonly heldOut?: Readonly<Partial<Record<HeldOutPart, HeldOut>>>;
  /** The initial weights; default: random weights of the job's seed. */
  readonly checkpoint?: WholeTensors;
  /** The weights, or the checkpoint state, are in place: nothing is written. */
  readonly isLoaded?: boolean;
  /** The checkpoint to resume from: run progress, and shards of the checkpoint state by name and ranges. */
  readonly from?: StateShards & { readonly progress: RunProgress };
  /** Buffers to copy when they are written, for tests and debugging. */
  readonly watch?: readonly string[];
  /** Called while the device computes; `seconds`: the duration of the step before. */
  readonly whileComputing?: (seconds: number) => void;
  /** Repeats a non-finite step instruction by instruction to locate its origin. The local ranks must not replay steps as graphs. */
  readonly debugNonfinite?: boolean;
}

/** Writes the initial or restored parameters to the local ranks, and returns the run. Uses no files and no process, so it works in a browser. */
export function runOn(plan: Plan, inputs: RunInputs): Run {
  const { localRanks } = inputs;
  const loop = new TrainingLoop(plan, inputs);
  let stopped = false;
  return {
    leads: localRanks.ranks.includes(0),
    mayBegin: () => localRanks.mayBegin?.() ?? !stopped,
    stop: () => {
      stopped = true;
      localRanks.stop?.();
    },
    progress: () => loop.progress(),
    read: (rank, buffer) => localRanks.rankDevice(rank).read(buffer, 0),
    step: (options) => loop.step(options),
    skipStep: () => loop.skipStep(),
    heldOut: heldOutParts.filter((part) => inputs.heldOut?.[part] !== undefined),
    evaluate: (part) => loop.evaluate(part),
    gradients: () => loop.gradients(),
    parameters: () => loop.parameters(),
    watched: (id) => loop.watched(id),
    profile: async () => (await localRanks.profile?.()) ?? [],
    close: (error) => localRanks.close(error),
  };
}

/** A device that needs longer than this to finish was busy, in ms. */
const BUSY = 0.05;

/** How the ranks walk a step. */
interface Walk {
  /** The batch in the order of the ranks. */
  readonly given: Readonly<Record<string, HostData>>;
  /** Whether instructions of logged steps run. */
  readonly logged: boolean;
  readonly inspector?: Inspector | undefined;
}

type Outcome = "updated" | "overflowed" | "nonfinite";

class TrainingLoop {
  readonly #plan: Plan;
  readonly #inputs: RunInputs;
  readonly #localRanks: LocalRanks;
  readonly #programs: RankPrograms;
  readonly #parameters: Parameters;
  /** Whether the plan has instructions of logged steps only. */
  readonly #hasLogged: boolean;
  readonly #schedule: ReturnType<typeof trainingSchedule>;
  /** Copies of watched buffers of the last step, by id, microbatch and rank. */
  readonly #watched = new Map<string, Map<number, Map<number, Promise<HostData>>>>();
  /** The loss scale of the last step's gradients. */
  #scaled = 1;
  /** The prefetched batch of the next step, or the error of reading it, which the step throws. */
  #next: Batch | Error | undefined;
  /** The duration of the step before; 0 before the second step. */
  #seconds = 0;
  /** At most how long the device waited while `next` was read, in ms. */
  #dataWait = 0;

  constructor(plan: Plan, inputs: RunInputs) {
    const { localRanks, checkpoint, from } = inputs;
    this.#plan = plan;
    this.#inputs = inputs;
    this.#localRanks = localRanks;
    this.#programs = new RankPrograms(plan);
    this.#hasLogged = plan.programs.some(({ step }) => step.some(({ only }) => only === "logged"));
    this.#parameters = new Parameters(plan, this.#programs, localRanks);
    this.#schedule = trainingSchedule(plan.job, from?.progress);
    if (inputs.isLoaded) return;
    if (from) this.#parameters.restore(from);
    else if (checkpoint) this.#parameters.load(checkpoint);
    else this.#parameters.initialize();
  }

  progress(): RunProgress {
    return this.#schedule.progress();
  }

  async step({ detailed = false }: StepOptions = {}): Promise<StepResult> {
    const begun = performance.now();
    const { job } = this.#plan;
    const { train, model } = job;
    const parameters = this.#schedule.next();
    const { lr, lossScale, upscale } = parameters;
    const asked = performance.now();
    const batch = this.#next ?? this.#read(parameters.first, parameters.batch);
    if (batch instanceof Error) throw batch;
    const waited = this.#dataWait + (performance.now() - asked);
    const given = inOrder(job, batch);
    this.#scaled = lossScale;
    this.#watched.clear();
    const logged = detailed && this.#hasLogged;
    const walkAll = (inspector?: Inspector): Promise<void> => this.#walkAll(parameters, { given, logged, inspector });
    await walkAll();
    // read the next batch while the device computes
    const after = parameters.first + parameters.batch;
    const finished = this.#localRanks.finish();
    const read = () => readNumbers(this.#plan, this.#localRanks, this.#programs.buffer, detailed);
    // where copies follow the work of the step on the device, they are there when it ends
    const issued = this.#localRanks.readsInOrder ? read() : undefined;
    // a failure is thrown where the numbers are awaited
    issued?.catch(() => undefined);
    const from = performance.now();
    this.#next = this.#read(after, batchAt(train, after));
    const loaded = performance.now();
    this.#inputs.whileComputing?.(this.#seconds);
    await finished;
    // a device that still computes when the batch is there has not waited; otherwise it may have, for as long as the reading took
    this.#dataWait = performance.now() - loaded > BUSY ? 0 : loaded - from;
    const memory = detailed ? this.#localRanks.memoryInUse?.() : undefined;
    const numbers = await (issued ?? read());
    const fp16 = train.precision === "fp16";
    const found = nonfiniteIn(numbers);
    const outcome: Outcome = !found ? "updated" : fp16 && found.metric === "grad_norm" ? "overflowed" : "nonfinite";
    const step = this.#schedule.progress().steps + 1;
    const nonfinite = found && outcome === "nonfinite" ? await this.#located(found, walkAll) : undefined;
    if (nonfinite && train.on_nonfinite === "stop") {
      this.#next = undefined;
      throw stopAt(step, nonfinite);
    }
    this.#schedule.done(outcome);
    const learnt = hasTokenWeights(job) ? learntOf(job, batch) : undefined;
    this.#seconds = (performance.now() - begun) / 1000;
    if (train.on_nonfinite === "stop" && this.#schedule.hopeless() >= MOST_OVERFLOWS) throw stopAtScale(step, lossScale);
    return {
      step,
      ...reported(numbers, {
        upscale,
        aux: given.aux_weight?.[0] ?? 1,
        loss: learnt?.loss ?? 1,
        mtp: learnt?.mtp ?? 1,
        depths: learnt?.depths,
      }),
      ...(learnt && { labels: learnt.labels }),
      lr,
      tokens: parameters.batch * model.seq,
      seconds: this.#seconds,
      data_wait_seconds: waited / 1000,
      ...(memory !== undefined && { memory_bytes: memory }),
      ...(detailed && job.data.documents?.mask && batch.documents && { attention_share: attentionShare(batch.documents, model.seq) }),
      ...(fp16 && { loss_scale: lossScale }),
      ...((fp16 || train.on_nonfinite === "skip") && { skipped: outcome !== "updated" }),
      ...(nonfinite && { nonfinite: nonfiniteText(nonfinite) }),
    };
  }

  skipStep(): void {
    this.#schedule.skip();
    // the batch that was read ahead is that of the step
    this.#next = undefined;
  }

  evaluate(part: HeldOutPart): Promise<EvaluationResult> {
    const data = this.#inputs.heldOut?.[part];
    if (!data) throw new Error(`rankc: the run has no ${part} data`);
    const parts = { plan: this.#plan, localRanks: this.#localRanks, programs: this.#programs, parameters: this.#parameters };
    return evaluate(parts, data, part, this.progress().steps);
  }

  async gradients(): Promise<Map<string, Tensor>> {
    const all = await this.#parameters.collect(
      (p) => p.gradient,
      (p) => p.rule !== "expert_bias" && p.rule !== "quantile",
    );
    if (this.#scaled === 1) return all;
    return new Map([...all].map(([name, { shape, data }]) => [name, { shape, data: data.map((x) => x / this.#scaled) }]));
  }

  parameters(): Promise<Map<string, Tensor>> {
    return this.#parameters.collect((p) => p.master);
  }

  watched(id: string): Promise<Tensor[]> {
    const microbatches = [...(this.#watched.get(id) ?? [])].sort(([a], [b]) => a - b);
    return Promise.all(microbatches.map(([, shards]) => this.#assembleWatched(id, shards)));
  }

  #assembleWatched(id: string, shards: ReadonlyMap<number, Promise<HostData>>): Promise<Tensor> {
    const stage = this.#programs.stages.find(({ program }) => shards.has(rankAt(this.#plan.mesh, program.stage, 0)));
    if (!stage) throw new Error(`rankc: no rank of this process wrote ${id}`);
    return this.#parameters.assemble(stage, stage.buffer(id), (rank) => {
      const shard = shards.get(rank);
      if (!shard) throw new Error(`rankc: rank ${rank} did not write ${id}`);
      return shard;
    });
  }

  /** Issues the step on all local ranks. With an inspector, instruction by instruction. */
  #walkAll(parameters: StepParameters, { given, logged, inspector }: Walk): Promise<void> {
    const { microbatches } = parameters;
    const localRanks = this.#localRanks;
    const feed = feedOf(this.#plan.job, parameters, given);
    const replayed = localRanks.beginStep?.(microbatches, logged ? "logged" : "training") ?? false;
    const walks = localRanks.ranks.map((rank): [number, Generator<string>] => [
      rank,
      walkStep({
        ...{ rank, microbatches, replayed, logged, inspector, comm: localRanks.comm },
        stage: this.#programs.of(rank),
        device: localRanks.rankDevice(rank),
        feed: (b, input, microbatch) => this.#parameters.shardFor(feed(input, microbatch), b, rank),
        onCompute: (i, at) => this.#watch(rank, i, at),
      }),
    ]);
    return runTogether(new Map(walks), inspector?.settled);
  }

  /** Starts to copy the watched buffers that an op wrote. */
  #watch(rank: number, { writes }: Compute, { microbatch, copy }: BlockPosition): void {
    for (const id of this.#inputs.watch ?? []) {
      if (microbatch < 0 || !Object.values(writes).includes(id)) continue;
      const ofId = this.#watched.get(id) ?? new Map<number, Map<number, Promise<HostData>>>();
      const shards = ofId.get(microbatch) ?? new Map<number, Promise<HostData>>();
      this.#watched.set(id, ofId.set(microbatch, shards));
      shards.set(rank, this.#localRanks.rankDevice(rank).read(this.#programs.buffer(rank, id), copy));
    }
  }

  /** Adds the origin of a non-finite value, if the run is debugged: the step changed no weights, so a repetition gives the same values. */
  async #located(found: Nonfinite, walkAll: (inspector: Inspector) => Promise<void>): Promise<Nonfinite> {
    if (!this.#inputs.debugNonfinite) return found;
    const seeker = inspector(this.#programs.buffer, this.#localRanks.rankDevice);
    await walkAll(seeker);
    await this.#localRanks.finish();
    const origin = seeker.origin();
    return origin === undefined ? found : { ...found, origin };
  }

  #read(first: number, rows: number): Batch | Error {
    try {
      return this.#inputs.batch(first, rows);
    } catch (error) {
      return error as Error;
    }
  }
}
