/**
 * Issues training steps to the local ranks: writes of inputs, instructions, and reads of the metrics. A step is issued, awaited (`ended`)
 * and read (`numbers`); a device that takes work in order may have the next one issued meanwhile.
 */
import type { Buffer, Compute, HostInput, Plan } from "../../schemas/plan.ts";
import type { BlockPosition, HostData, LocalRanks, StepKind } from "../backend.ts";
import type { RankPrograms } from "../rankPrograms.ts";
import { feedOf, inOrder } from "./feed.ts";
import type { Batch } from "./inputs.ts";
import { issueReads, type StepNumbers } from "./metrics.ts";
import type { Inspector } from "./nonfinite.ts";
import type { Parameters } from "./parameters.ts";
import { runTogether, walkStep } from "./rankStep.ts";
import type { StepParameters } from "./stepParameters.ts";

/** The parameters and the batch of a step. */
export interface StepOrder {
  readonly parameters: StepParameters;
  readonly batch: Batch;
  /** Whether to read the tables that only a log needs, and to run the instructions of logged steps. */
  readonly detailed: boolean;
}

/** A step that is issued. */
export interface IssuedStep extends StepOrder {
  /** Resolves when the local ranks have ended the step, with the time of `performance.now()`. Rejects with errors of its work. */
  readonly ended: Promise<number>;
  /** Returns the metrics. Call it after the end. */
  numbers(): Promise<StepNumbers>;
  /** Repeats the step instruction by instruction. */
  repeat(inspector: Inspector): Promise<void>;
}

/** The parts of a run that the issuer uses. */
export interface IssuerParts {
  readonly plan: Plan;
  readonly localRanks: LocalRanks;
  readonly programs: RankPrograms;
  readonly parameters: Parameters;
  /** Called after each op is issued; not in a step that is replayed. */
  readonly onCompute: (rank: number, i: Compute, at: BlockPosition) => void;
}

/** Issues the steps of a run. */
export class StepIssuer {
  readonly #parts: IssuerParts;
  /** Whether the plan has instructions of logged steps only. */
  readonly #hasLogged: boolean;

  constructor(parts: IssuerParts) {
    this.#parts = parts;
    this.#hasLogged = parts.plan.programs.some(({ step }) => step.some(({ only }) => only === "logged"));
  }

  /** Returns whether a step can be issued while the step before it runs. */
  canIssueAhead({ microbatches }: StepParameters, detailed: boolean): boolean {
    return this.#parts.localRanks.canBeginAhead?.(microbatches, this.#kind(detailed)) ?? false;
  }

  /** Issues a step. */
  async issue(order: StepOrder): Promise<IssuedStep> {
    const { plan, localRanks, programs } = this.#parts;
    const { job } = plan;
    const feed = feedOf(job, order.parameters, inOrder(job, order.batch));
    await this.#walkAll(order, feed);
    const finished = localRanks.finish();
    const ended = finished.then(() => performance.now());
    // a failure is thrown where the end is awaited
    ended.catch(() => undefined);
    const issue = () => issueReads(plan, localRanks, programs.buffer, order.detailed);
    // where copies follow the work of the step on the device, they are there when it ends
    const issued = localRanks.readsInOrder ? issue() : undefined;
    return {
      ...order,
      ended,
      numbers: () => (issued ?? issue())(),
      repeat: async (inspector) => {
        await this.#walkAll(order, feed, inspector);
        await localRanks.finish();
      },
    };
  }

  #kind(detailed: boolean): StepKind {
    return detailed && this.#hasLogged ? "logged" : "training";
  }

  /** Issues the instructions of all local ranks. With an inspector, one by one. */
  #walkAll(
    { parameters: { microbatches }, detailed }: StepOrder,
    feed: (input: HostInput, microbatch: number) => HostData,
    inspector?: Inspector,
  ): Promise<void> {
    const { localRanks, programs, parameters, onCompute } = this.#parts;
    const kind = this.#kind(detailed);
    const replayed = localRanks.beginStep?.(microbatches, kind) ?? false;
    const walks = localRanks.ranks.map((rank): [number, Generator<string>] => [
      rank,
      walkStep({
        ...{ rank, microbatches, replayed, logged: kind === "logged", inspector, comm: localRanks.comm },
        stage: programs.of(rank),
        device: localRanks.rankDevice(rank),
        feed: (b: Buffer, input, microbatch) => parameters.shardFor(feed(input, microbatch), b, rank),
        onCompute: (i, at) => onCompute(rank, i, at),
      }),
    ]);
    return runTogether(new Map(walks), inspector?.settled);
  }
}
