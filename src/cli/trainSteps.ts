/** The steps of a run on the command line: each is reported, saved and followed by the evaluations that are due. */
import type { StartupClock } from "../../runtime/startup.ts";
import type { EvaluationResult, StepResult } from "../../runtime/train/loop.ts";
import type { OpenRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { evaluateWithin, isEvaluationDue } from "./evaluations.ts";
import type { Dashboard } from "./log/dashboard.ts";
import type { RunLog } from "./log/runLog.ts";
import { isIn, type StepRange } from "./options.ts";
import { isTerminal, printFrame, printProgress, printStderr, terminalColumns } from "./output.ts";
import type { Lines } from "./outputFiles.ts";
import type { RunEnd } from "./runEnd.ts";
import type { RunSaves } from "./runSaves.ts";

/** Options of a run that concern its steps. */
export interface StepsOptions {
  /** With `auto`, a run without further steps is complete, and not an error. */
  readonly resume?: string;
  readonly log?: string;
  readonly logInterval: number;
  readonly skipSteps?: readonly StepRange[];
  readonly dashboard?: boolean;
}

/** The steps of a run so far. */
export class RunTotals {
  done = 0;
  #seconds = 0;
  #skipped = 0;
  #last: StepResult | undefined;

  add(step: StepResult): void {
    this.#last = step;
    this.done++;
    this.#seconds += step.seconds;
    this.#skipped += Number(step.skipped ?? false);
  }

  /** Mean seconds per step. */
  get pace(): number {
    return this.#seconds / this.done;
  }

  result() {
    return { done: this.done, seconds: this.#seconds, skipped: this.#skipped, last: this.#last };
  }
}

/** What `trainSteps` needs. */
export interface Training {
  readonly run: OpenRun;
  readonly job: Job;
  /** The last step. */
  readonly steps: number;
  readonly saves: RunSaves;
  readonly end: RunEnd;
  readonly totals: RunTotals;
  readonly startup: StartupClock;
  readonly metrics: Lines | undefined;
  readonly log: RunLog | undefined;
  readonly dashboard: Dashboard | undefined;
  readonly options: StepsOptions;
  readonly onEvaluation: (result: EvaluationResult) => void;
}

/** Runs steps until the last, or until the ranks agree to stop. */
export async function trainSteps(training: Training): Promise<void> {
  const { run, job, options, steps, saves, end, totals, startup, metrics, log, dashboard, onEvaluation } = training;
  const before = run.progress().steps;
  if (before >= steps) {
    // a batch system starts a complete run again
    if (options.resume === "auto")
      return run.leads ? printStderr(`note: the run is complete: the checkpoint is of step ${before}`) : undefined;
    throw new Trouble(`the checkpoint is of step ${before}, and the run ends at step ${steps}`, `set a later step: --steps ${2 * before}`);
  }
  const { metricsLine, progressLine, startupLine } = await import("./progress.ts");
  while (run.progress().steps < steps && run.mayBegin()) {
    if (isIn(options.skipSteps ?? [], run.progress().steps + 1)) {
      run.skipStep();
      if (run.leads) printProgress(`step ${run.progress().steps}/${steps}  skipped`);
      continue;
    }
    const number = run.progress().steps + 1;
    const beforeAhead = () => end.beforeAhead(saves.saved?.seconds ?? 0);
    const next = followsDirectly(number, training) ? { detailed: isDetailed(number + 1, options), beforeAhead } : undefined;
    const step = await run.step({ detailed: isDetailed(number, options), next });
    totals.add(step);
    const started = totals.done === 1 ? startup.end("first_step") : undefined;
    if (run.leads && started) printStderr(startupLine(started));
    const seconds = await saves.afterStep(step.step);
    metrics?.add(metricsLine(step, seconds, started));
    log?.add(step, run.progress().read);
    dashboard?.add(step);
    if (dashboard) printFrame(dashboard.frame(terminalColumns()));
    else if (run.leads && (isTerminal() || step.step === steps || isDue(step.step, options)))
      printProgress(progressLine(step, steps, totals.pace));
    if (step.step < steps) await evaluateWithin(run, job, step.step, onEvaluation);
    end.afterStep(step.seconds, saves.saved?.seconds ?? 0, run.isAhead());
    // a step on the CPU blocks the event loop; signals arrive here
    await new Promise(setImmediate);
  }
}

/** Whether nothing happens between a step and the next one: no checkpoint, no evaluation, no skipped step, no end. */
const followsDirectly = (step: number, { run, job, steps, saves, options }: Training): boolean =>
  step < steps && !saves.isDue(step) && !isEvaluationDue(run, job, step) && !isIn(options.skipSteps ?? [], step + 1);

/** Whether the log has a line for a step. */
const isDue = (step: number, { logInterval }: Pick<StepsOptions, "logInterval">): boolean => step % logInterval === 0;

/** Whether a step reads what only a log or the dashboard shows. All processes of a run have the same options, so they agree. */
const isDetailed = (step: number, options: StepsOptions): boolean =>
  options.dashboard === true || (options.log !== undefined && isDue(step, options));
