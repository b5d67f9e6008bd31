/** The early end of a run: by a signal or a time limit it ends after the current step, and saves. */
import { type Command, InvalidArgumentError } from "commander";
import type { Run } from "../../runtime/train/loop.ts";

/** Signals that end a run after the current step, with their exit codes: 128 and the number of the signal. A later one ends it at once. */
const exitCodes = { SIGINT: 130, SIGTERM: 143, SIGUSR1: 138 } as const;
/**
 * Milliseconds in which more signals are the same request. Batch systems signal every process of a job, and launchers forward what they
 * receive: a rank then has two signals at once, and saves all the same.
 */
const SAME_REQUEST = 1000;
/** The exit code of timeout(1). */
const TIME_LIMIT_CODE = 124;

/** Why a run ended early. */
interface Reason {
  readonly by: keyof typeof exitCodes | "time limit";
  readonly code: number;
}

/** Returns whether an exit code says that a run ended early as it was asked to. */
export const isEarlyEnd = (code: number): boolean => code === TIME_LIMIT_CODE || Object.values<number>(exitCodes).includes(code);

/** Watches for the early end of one run. */
export class RunEnd {
  readonly #limit: number;
  readonly #handlers: readonly (readonly [keyof typeof exitCodes, () => void])[];
  #run: Pick<Run, "stop"> | undefined;
  #reason: Reason | undefined;
  /** Ends the time in which more signals are the same request. */
  #later: NodeJS.Timeout | undefined;
  /** Durations of the last steps, in seconds. */
  #steps: number[] = [];

  /** `limit`: seconds from the start of this process; undefined: none. */
  constructor(limit: number | undefined) {
    this.#limit = limit ?? Number.POSITIVE_INFINITY;
    const names = Object.keys(exitCodes) as (keyof typeof exitCodes)[];
    this.#handlers = names.map((by) => [by, () => this.#signal(by)]);
    for (const [signal, handler] of this.#handlers) process.on(signal, handler);
  }

  get reason(): Reason | undefined {
    return this.#reason;
  }

  /** Names the run to stop; a run that opens after a signal does no step. */
  watch(run: Pick<Run, "stop">): void {
    this.#run = run;
    if (this.#reason) run.stop();
  }

  /**
   * Counts a step, and stops the run if another one, and a checkpoint that takes `saveSeconds`, would end after the time limit. `isAhead`: the next
   * step has begun, so `beforeAhead` decides on the one after it.
   */
  afterStep(stepSeconds: number, saveSeconds: number, isAhead = false): void {
    this.#steps = [...this.#steps.slice(-9), stepSeconds];
    if (!isAhead) this.#expectTime(1, saveSeconds);
  }

  /** Called when a step begins behind which another one is to begin before its end: stops the run after it if both do not end in time. */
  beforeAhead(saveSeconds: number): void {
    this.#expectTime(2, saveSeconds);
  }

  close(): void {
    clearTimeout(this.#later);
    for (const [signal, handler] of this.#handlers) process.removeListener(signal, handler);
  }

  #expectTime(steps: number, saveSeconds: number): void {
    const end = performance.now() / 1000 + steps * Math.max(...this.#steps) + saveSeconds;
    if (end > this.#limit) this.#end({ by: "time limit", code: TIME_LIMIT_CODE });
  }

  #signal(by: keyof typeof exitCodes): void {
    // without a listener a signal has its default action, which ends the process
    this.#later ??= setTimeout(() => this.close(), SAME_REQUEST).unref();
    this.#end({ by, code: exitCodes[by] });
  }

  #end(reason: Reason): void {
    if (this.#reason) return;
    this.#reason = reason;
    this.#run?.stop();
  }
}

/** Adds `--time-limit`. */
export const withTimeLimit = (command: Command): Command =>
  command.option(
    "--time-limit <duration>",
    "end after the last step that ends before this time from the start, saved (3h55m, 90m, 45s): for batch systems; the exit code is 124",
    durationSeconds,
  );

const units = { d: 86_400, h: 3600, m: 60, s: 1 } as const;

/** Parses `1d12h`, `3h55m`, `90m`, `45s`. Throws InvalidArgumentError. */
function durationSeconds(text: string): number {
  const found = /^(?:(?<d>\d+)d)?(?:(?<h>\d+)h)?(?:(?<m>\d+)m)?(?:(?<s>\d+)s)?$/.exec(text)?.groups ?? {};
  const seconds = Object.entries(units).reduce((sum, [unit, size]) => sum + Number(found[unit] ?? 0) * size, 0);
  if (!(seconds > 0)) throw new InvalidArgumentError("It is not a duration, such as 3h55m, 90m or 45s.");
  return seconds;
}
