/**
 * The training loop: runs the plan on the local ranks, step by step. A step is issued (stepIssuer.ts), awaited and reported. If the caller
 * names the step that follows directly, and the device takes work in order, that step is issued before the end of this one is awaited: so the
 * device does not wait for the host between the two.
 */

import { batchAt } from "../../schemas/batchRampup.ts";
import { type HeldOutPart, heldOutParts } from "../../schemas/heldOut.ts";
import type { Buffer, Compute, Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import type { EvaluationResult, StepResult } from "../../schemas/stepResult.ts";
import type { Timing } from "../../schemas/timing.ts";
import type { BlockPosition, HostData, LocalRanks } from "../backend.ts";
import type { HeldOut } from "../data/heldOut.ts";
import { RankPrograms } from "../rankPrograms.ts";
import { evaluate } from "./evaluation.ts";
import type { Batch, BatchOf } from "./inputs.ts";
import type { StepNumbers } from "./metrics.ts";
import { inspector, MOST_OVERFLOWS, type Nonfinite, nonfiniteIn, stopAt, stopAtScale } from "./nonfinite.ts";
import { Parameters, type StateShards, type Tensor, type WholeTensors } from "./parameters.ts";
import { type IssuedStep, StepIssuer, type StepOrder } from "./stepIssuer.ts";
import { type Outcome, type RunProgress, trainingSchedule } from "./stepParameters.ts";
import { resultOf } from "./stepReport.ts";

export type { EvaluationResult, StepResult } from "../../schemas/stepResult.ts";
export type { Tensor } from "./parameters.ts";

/** What a step reads. All processes of a run give the same. */
export interface StepOptions {
  /** Reads tables, too, which only a log needs: `expert_loads` and `expert_bias`. */
  readonly detailed?: boolean;
}

/** The step after one that is asked for. */
export interface NextStep extends StepOptions {
  /** Called at the begin of this step if the next is to be issued while it runs. With `stop` the run then ends after this step. */
  readonly beforeAhead?: () => void;
}

/** Options of `Run.step`. All processes of a run give the same. */
export interface StepCall extends StepOptions {
  /**
   * The options of the step after this one, if it follows directly: until then the caller neither saves nor evaluates, reads no state, skips
   * no step, and does not end the run but by `stop`. It may then be issued while this one runs.
   */
  readonly next?: NextStep | undefined;
}

/** A run of a plan on the local ranks. */
export interface Run {
  /** Returns whether another step begins; all processes of a run agree. Call it before each step. The answer for a step does not change. */
  mayBegin(): boolean;
  /** Requests the end of the run after the current step. */
  stop(): void;
  /** Whether this process has rank 0, and so prints for all. */
  readonly leads: boolean;
  /**
   * Runs a step. Throws a StepFault if a metric is not finite and train.on_nonfinite is stop; the run progress then does not change. If the
   * step after it was issued by then, the run is over: it takes no step, and gives no state.
   */
  step(options?: StepCall): Promise<StepResult>;
  /** Whether the next step is issued: it ends even if the run is to stop. */
  isAhead(): boolean;
  /** Throws if the next step is issued: the devices then have the state of no step. */
  expectBetweenSteps(): void;
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
  return {
    leads: localRanks.ranks.includes(0),
    mayBegin: () => loop.mayBegin(),
    stop: () => loop.stop(),
    progress: () => loop.progress(),
    async read(rank, buffer) {
      loop.expectBetweenSteps();
      return localRanks.rankDevice(rank).read(buffer, 0);
    },
    step: (options) => loop.step(options),
    isAhead: () => loop.isAhead(),
    expectBetweenSteps: () => loop.expectBetweenSteps(),
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
/**
 * How long before the expected end of a step the next one is issued, in ms: longer than the host needs for it. A request to stop before that
 * ends the run after this step, one after it ends the run after the next.
 */
const EARLY = 20;

class TrainingLoop {
  readonly #plan: Plan;
  readonly #inputs: RunInputs;
  readonly #localRanks: LocalRanks;
  readonly #programs: RankPrograms;
  readonly #parameters: Parameters;
  readonly #issuer: StepIssuer;
  readonly #schedule: ReturnType<typeof trainingSchedule>;
  /** Copies of watched buffers of the last step, by id, microbatch and rank. */
  readonly #watched = new Map<string, Map<number, Map<number, Promise<HostData>>>>();
  /** The loss scale of the last step's gradients. */
  #scaled = 1;
  #stopped = false;
  /** Whether the next step begins; undefined: not decided yet. */
  #mayBegin: boolean | undefined;
  /** The prefetched batch of the step that is issued next, or the error of reading it, which that step throws. */
  #next: Batch | Error | undefined;
  /** The next step, issued while the last one ran. */
  #ahead: IssuedStep | undefined;
  /** Whether a step failed with another one issued behind it. */
  #isOver = false;
  /** When the last step ended, and its duration in seconds; 0 before the second step. */
  #endedAt = 0;
  #seconds = 0;
  /** At most how long the device waited while `next` was read, in ms. */
  #dataWait = 0;

  constructor(plan: Plan, inputs: RunInputs) {
    const { localRanks, checkpoint, from } = inputs;
    this.#plan = plan;
    this.#inputs = inputs;
    this.#localRanks = localRanks;
    this.#programs = new RankPrograms(plan);
    this.#parameters = new Parameters(plan, this.#programs, localRanks);
    this.#issuer = new StepIssuer({
      ...{ plan, localRanks, programs: this.#programs, parameters: this.#parameters },
      onCompute: (rank, i, at) => this.#watch(rank, i, at),
    });
    this.#schedule = trainingSchedule(plan.job, from?.progress);
    if (inputs.isLoaded) return;
    if (from) this.#parameters.restore(from);
    else if (checkpoint) this.#parameters.load(checkpoint);
    else this.#parameters.initialize();
  }

  progress(): RunProgress {
    return this.#schedule.progress();
  }

  mayBegin(): boolean {
    return (this.#mayBegin ??= this.#localRanks.mayBegin?.() ?? !this.#stopped);
  }

  stop(): void {
    this.#stopped = true;
    this.#localRanks.stop?.();
  }

  isAhead(): boolean {
    return this.#ahead !== undefined;
  }

  expectBetweenSteps(): void {
    const { steps } = this.progress();
    if (this.#isOver)
      throw new Error(`rankc: the run ended at step ${steps + 1} with the next step issued: the devices have the state of no step`);
    if (this.#ahead) throw new Error(`rankc: step ${steps + 1} is issued: the devices have the state of no step`);
  }

  async step({ detailed = false, next }: StepCall = {}): Promise<StepResult> {
    if (this.#isOver) this.expectBetweenSteps();
    this.#mayBegin = undefined;
    const { job } = this.#plan;
    // a step that was issued ahead runs from the end of the step before it
    const begun = this.#ahead ? this.#endedAt : performance.now();
    const step = this.#ahead ? this.#takeAhead(detailed) : await this.#issueNext(detailed);
    const waitedMs = this.#dataWait;
    const { parameters } = step;
    this.#scaled = parameters.lossScale;
    // read the next batch while the device computes
    const after = parameters.first + parameters.batch;
    const from = performance.now();
    this.#next = this.#read(after, batchAt(job.train, after));
    const loaded = performance.now();
    // measured before the host does anything else
    const hasEnded = next !== undefined && (await endsByNow(step.ended));
    this.#inputs.whileComputing?.(this.#seconds);
    if (next) await this.#issueAhead(next, step, begun + 1000 * this.#seconds - EARLY);
    this.#localRanks.report?.(this.#ahead ? "the end of the step before" : "the end of the step");
    const ended = await step.ended;
    // a device that still computes when the batch is there has not waited; otherwise it may have, for as long as the reading took
    this.#dataWait = hasEnded || ended - loaded <= BUSY ? loaded - from : 0;
    const memory = detailed ? this.#localRanks.memoryInUse?.() : undefined;
    const numbers = await step.numbers();
    const { outcome, nonfinite } = await this.#judged(step, numbers);
    this.#schedule.done(outcome);
    this.#endedAt = performance.now();
    this.#seconds = (this.#endedAt - begun) / 1000;
    const { steps } = this.progress();
    if (job.train.on_nonfinite === "stop" && this.#schedule.hopeless() >= MOST_OVERFLOWS) throw stopAtScale(steps, parameters.lossScale);
    const isSkipped = outcome !== "updated";
    return resultOf(job, step, { step: steps, numbers, seconds: this.#seconds, waitedMs, memory, isSkipped, nonfinite });
  }

  skipStep(): void {
    this.expectBetweenSteps();
    this.#mayBegin = undefined;
    this.#schedule.skip();
    // the batch that was read ahead is that of the step
    this.#next = undefined;
  }

  async evaluate(part: HeldOutPart): Promise<EvaluationResult> {
    this.expectBetweenSteps();
    const data = this.#inputs.heldOut?.[part];
    if (!data) throw new Error(`rankc: the run has no ${part} data`);
    const parts = { plan: this.#plan, localRanks: this.#localRanks, programs: this.#programs, parameters: this.#parameters };
    return evaluate(parts, data, part, this.progress().steps);
  }

  async gradients(): Promise<Map<string, Tensor>> {
    this.expectBetweenSteps();
    const all = await this.#parameters.collect(
      (p) => p.gradient,
      (p) => p.rule !== "expert_bias" && p.rule !== "quantile",
    );
    if (this.#scaled === 1) return all;
    return new Map([...all].map(([name, { shape, data }]) => [name, { shape, data: data.map((x) => x / this.#scaled) }]));
  }

  async parameters(): Promise<Map<string, Tensor>> {
    this.expectBetweenSteps();
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

  /** Issues the next step. Throws the error of reading its batch. */
  async #issueNext(detailed: boolean): Promise<IssuedStep> {
    const parameters = this.#schedule.next();
    const asked = performance.now();
    const batch = this.#next ?? this.#read(parameters.first, parameters.batch);
    if (batch instanceof Error) throw batch;
    this.#dataWait += performance.now() - asked;
    return this.#issue({ parameters, batch, detailed });
  }

  /**
   * Issues the step after `running` at `time` (of performance.now()), or when `running` ends before it. Does nothing if that step depends on
   * the numbers of `running`, cannot begin before its end, or is not to begin. All processes of a run decide the same.
   */
  async #issueAhead({ detailed = false, beforeAhead }: NextStep, running: IssuedStep, time: number): Promise<void> {
    const { train } = this.#plan.job;
    const batch = this.#next;
    const parameters = this.#schedule.following();
    // the schedule and the loss scale depend on whether a step updated the weights
    const isKnown = train.precision !== "fp16" && train.on_nonfinite === "stop";
    if (!isKnown || !batch || batch instanceof Error || !this.#issuer.canIssueAhead(parameters, detailed)) return;
    beforeAhead?.();
    await endOrTime(running.ended, time);
    if (this.mayBegin()) this.#ahead = await this.#issue({ parameters, batch, detailed });
  }

  async #issue(order: StepOrder): Promise<IssuedStep> {
    this.#next = undefined;
    this.#watched.clear();
    return this.#issuer.issue(order);
  }

  #takeAhead(detailed: boolean): IssuedStep {
    const step = this.#ahead;
    if (step?.detailed !== detailed) throw new Error("rankc: the step was issued with other options");
    this.#ahead = undefined;
    return step;
  }

  /** Returns the outcome of a step. Throws a StepFault if it ends the run. */
  async #judged(step: IssuedStep, numbers: StepNumbers): Promise<{ readonly outcome: Outcome; readonly nonfinite?: Nonfinite }> {
    const { train } = this.#plan.job;
    const found = nonfiniteIn(numbers);
    if (!found) return { outcome: "updated" };
    if (train.precision === "fp16" && found.metric === "grad_norm") return { outcome: "overflowed" };
    const nonfinite = await this.#located(found, step);
    if (train.on_nonfinite !== "stop") return { outcome: "nonfinite", nonfinite };
    this.#next = undefined;
    // the next step may have changed the weights; no work is in flight after a StepFault
    this.#isOver = this.#ahead !== undefined;
    await this.#ahead?.ended.catch(() => undefined);
    throw stopAt(this.progress().steps + 1, nonfinite);
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
  async #located(found: Nonfinite, step: IssuedStep): Promise<Nonfinite> {
    if (!this.#inputs.debugNonfinite) return found;
    const seeker = inspector(this.#programs.buffer, this.#localRanks.rankDevice);
    await step.repeat(seeker);
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

/** Returns whether a step has ended, after one turn of the event loop, in which its end arrives. Rejects with the step. */
function endsByNow(ended: Promise<unknown>): Promise<boolean> {
  // browsers have no setImmediate
  const { setImmediate = (resolve) => void setTimeout(resolve) } = globalThis as { readonly setImmediate?: (resolve: () => void) => void };
  return Promise.race([ended.then(() => true), new Promise<void>(setImmediate).then(() => false)]);
}

/** Waits for the end of a step, at most until a time of performance.now(). Rejects with the step. */
async function endOrTime(ended: Promise<unknown>, time: number): Promise<void> {
  const milliseconds = time - performance.now();
  if (milliseconds <= 0) return;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const pause = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, milliseconds);
  });
  await Promise.race([ended, pause]).finally(() => clearTimeout(timer));
}
