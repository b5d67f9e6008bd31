/** The checkpoints of a run: when one begins, what is printed when it is complete, and what happens when it was not saved. */
import type { SaveFault } from "../../runtime/checkpoint/commit.ts";
import type { PendingSave, Saved, StallParts } from "../../runtime/checkpoint/saver.ts";
import { transferText } from "../../runtime/checkpoint/transferText.ts";
import type { OpenRun } from "../../runtime/train/openRun.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { bytesText } from "../units.ts";
import { isTerminal, printError, printProgress, progressInterval } from "./output.ts";

/** Values of `--on-save-error`. */
export const saveErrorChoices = ["stop", "continue"] as const;

/** Options of `run` about checkpoints. */
export interface SaveOptions {
  readonly save?: string;
  readonly saveEvery?: number;
  readonly keep?: number;
  readonly onSaveError: (typeof saveErrorChoices)[number];
}

/** Throws a Trouble if an option needs `--save`. */
export function expectSaveFolder({ save, saveEvery, keep, onSaveError }: SaveOptions): void {
  if (save !== undefined) return;
  const [option] = [
    ...(saveEvery === undefined ? [] : ["--save-every"]),
    ...(keep === undefined ? [] : ["--keep"]),
    ...(onSaveError === "continue" ? ["--on-save-error"] : []),
  ];
  if (option) throw new Trouble(`${option} needs --save`, "name a folder: --save checkpoints/");
}

/** Seconds about checkpoints, for a line of metrics. */
export interface SaveSeconds {
  readonly save_stall_seconds?: number;
  readonly save_stall_parts?: StallParts;
  readonly save_seconds?: number;
  readonly save_pinned_bytes?: number;
}

/** Saves the checkpoints of a run. All processes of the run call the methods after the same steps. */
export class RunSaves {
  readonly #run: OpenRun;
  readonly #options: SaveOptions;
  readonly #isFault: (error: unknown) => error is SaveFault;
  /** Steps before this run. */
  readonly #start: number;
  #pending: Promise<void> = Promise.resolve();
  #failed: Error | undefined;
  #saved: Saved | undefined;
  #seconds: SaveSeconds = {};
  /** Whether the run waits for a checkpoint. */
  #isWaiting = false;

  constructor(run: OpenRun, options: SaveOptions, isFault: (error: unknown) => error is SaveFault) {
    this.#run = run;
    this.#options = options;
    this.#isFault = isFault;
    this.#start = run.progress().steps;
  }

  /** The last complete checkpoint. */
  get saved(): Saved | undefined {
    return this.#saved;
  }

  /** Whether a checkpoint begins after a step. */
  isDue(step: number): boolean {
    const { saveEvery } = this.#options;
    return saveEvery !== undefined && step % saveEvery === 0;
  }

  /**
   * Begins a checkpoint if one is due after this step. Throws the error of an earlier one. Returns the seconds that training waited, and
   * those of a checkpoint that has become complete since the last call.
   */
  async afterStep(step: number): Promise<SaveSeconds> {
    this.#expectSaved();
    const begun = this.isDue(step) ? await this.#begin() : undefined;
    const seconds = { ...this.#seconds, ...(begun && { save_stall_seconds: begun.stallSeconds, save_stall_parts: begun.stall }) };
    this.#seconds = {};
    return seconds;
  }

  /** Saves the last state, if no checkpoint has it, and waits until it is complete. An error ends the run, because nothing else has this state. */
  async finish(): Promise<void> {
    this.#isWaiting = true;
    await this.#pending;
    this.#expectSaved();
    const { steps } = this.#run.progress();
    if (this.#options.save === undefined || steps === this.#start || steps === this.#saved?.step) return;
    await this.#begin();
    await this.#pending;
    if (this.#failed) throw this.#failed;
  }

  async #begin(): Promise<PendingSave> {
    this.#failed = undefined;
    const wasWaiting = this.#isWaiting;
    this.#isWaiting = true;
    const pending = await this.#run.beginSave();
    this.#isWaiting = wasWaiting;
    const report = setInterval(() => this.#report(pending), 1000 * progressInterval()).unref();
    this.#pending = pending.done
      .then(
        (saved) => this.#complete(saved),
        (error: Error) => {
          this.#failed = error;
        },
      )
      .finally(() => clearInterval(report));
    return pending;
  }

  /** Prints how far a checkpoint is: on a terminal, where steps have the line, only while the run waits for it. */
  #report({ step, bytes, written }: PendingSave): void {
    if (!this.#run.leads || (isTerminal() && !this.#isWaiting)) return;
    const now = written();
    printProgress(transferText(`saving step ${step}`, now.bytes, bytes, now.seconds));
  }

  #complete(saved: Saved): void {
    this.#saved = saved;
    this.#seconds = { save_seconds: saved.seconds, save_pinned_bytes: saved.pinnedBytes };
    const { folder, bytes, seconds, stallSeconds } = saved;
    const rate = `${bytesText(bytes)} in ${seconds.toFixed(1)} s`;
    if (this.#run.leads) printProgress(`saved ${folder}  ${rate}, training waited ${stallSeconds.toFixed(2)} s`);
  }

  /** Throws the error of a checkpoint, or prints it if the run is to continue. */
  #expectSaved(): void {
    const error = this.#failed;
    if (!error) return;
    if (this.#options.onSaveError === "stop" || !this.#isFault(error)) throw error;
    this.#failed = undefined;
    if (this.#run.leads) printError(new Trouble(`${error.message}; the run continues without this checkpoint`, error.fix));
  }
}
