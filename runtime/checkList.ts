/** The checks of `rankc doctor`: each backend adds its own (backends.ts), and a failure is a result with a fix. */
import { Trouble } from "../schemas/trouble.ts";

/** The result of one check. */
export interface Check {
  readonly name: string;
  readonly ok: boolean;
  readonly found: string;
  readonly fix?: string;
  /** The names of the backends that need it; if empty, plans run without it. */
  readonly for: readonly string[];
}
/** Settings of the checks. */
export interface DiagnoseSettings {
  /** The version of the compiler on the path, if there is one. */
  readonly nvcc: string | undefined;
  /** The time limit of the WebGPU probe in milliseconds. */
  readonly webgpuLimit?: number;
}
/** Returns what a check found, and a result for later checks; throws if it fails. */
export type Probe<T> = () => readonly [found: string, result?: T];

/** Collects the results of checks. */
export class CheckList {
  readonly checks: Check[] = [];
  readonly settings: DiagnoseSettings;

  constructor(settings: DiagnoseSettings) {
    this.settings = settings;
  }

  /** Runs a check that these backends need. Returns its result; undefined if it failed. */
  check<T>(backends: readonly string[], name: string, probe: Probe<T>): T | undefined {
    try {
      const [found, result] = probe();
      this.checks.push({ name, ok: true, found, for: backends });
      return result;
    } catch (error) {
      return this.fail(backends, name, error);
    }
  }

  /** Records a failed check. */
  fail(backends: readonly string[], name: string, error: unknown): undefined {
    const fix = (error instanceof Trouble && error.fix) || "this is unexpected: report it with the output of rankc doctor --format json";
    this.checks.push({ name, ok: false, found: error instanceof Error ? error.message : String(error), fix, for: backends });
  }
}
