/**
 * The log of a run in a folder: TensorBoard event files, `metrics.csv`, `metrics.jsonl`, `evaluations.csv`, and `run.json` with what the
 * run is. A resumed run appends to them, and begins a new event file, as TensorBoard expects.
 */
import { appendFileSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import type { Plan } from "../../../schemas/plan.ts";
import type { EvaluationResult, StepResult } from "../../../schemas/stepResult.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../../schemas/writing.ts";
import { parameterCount } from "../../analysis/parameterCount.ts";
import { firstRecord, type LoggedValue, stepRecord } from "./eventFile.ts";
import { evaluationScalars, type PlanNumbers, planNumbers, type Scalars, stepScalars } from "./scalars.ts";

/** Names of the files of a log. */
export const logFiles = { run: "run.json", lines: "metrics.jsonl", table: "metrics.csv", evaluations: "evaluations.csv" } as const;

/** The log of a run. Methods throw a Trouble if a file cannot be written. */
export interface RunLog {
  /** Whether the numbers of a step are written, so that the step reads what only the log needs. */
  isDue(step: number): boolean;
  /** Adds a step. `samples`: the sequences read so far. */
  add(result: StepResult, samples: number): void;
  addEvaluation(result: EvaluationResult): void;
}

/** How a log is opened. */
export interface LogSettings {
  readonly folder: string;
  /** Steps between two lines. */
  readonly interval: number;
  /** The steps before the first one of this process: a resumed run continues its log. */
  readonly steps: number;
}

/** Opens the log of a run. Throws a Trouble if the folder has the log of another run, or cannot be written. */
export function openRunLog(plan: Plan, settings: LogSettings): RunLog {
  const { folder, steps } = settings;
  const at = (file: string): string => join(folder, file);
  try {
    makeFolder(folder);
    if (steps === 0 && existsSync(at(logFiles.run)))
      throw new Trouble(`${folder} has the log of a run already`, "name another folder, one for each run, or remove it");
    const { job, mesh, toolchain, digests } = plan;
    const about = {
      ...{ name: job.name, plan: digests.plan, rankc: toolchain.rankc, target: toolchain.target, ranks: mesh.world },
      ...{ device: job.cluster.device, steps: job.train.steps, tokens_per_step: job.train.global_batch * job.model.seq },
      ...{ parameters: parameterCount(job.model), started: new Date().toISOString() },
    };
    if (!existsSync(at(logFiles.run))) writeFileSync(at(logFiles.run), `${JSON.stringify(about, null, 2)}\n`);
    const name = `events.out.tfevents.${Math.floor(Date.now() / 1000)}.${hostname()}.${process.pid}.0`;
    writeFileSync(at(name), firstRecord(Date.now() / 1000));
    return new FolderLog(settings, planNumbers(plan), at(name));
  } catch (error) {
    throw unwritten(folder, error);
  }
}

class FolderLog implements RunLog {
  readonly #settings: LogSettings;
  readonly #plan: PlanNumbers;
  readonly #events: string;
  #steps: StepResult[] = [];
  #largestMemory: number | undefined;

  constructor(settings: LogSettings, plan: PlanNumbers, events: string) {
    this.#settings = settings;
    this.#plan = plan;
    this.#events = events;
  }

  isDue(step: number): boolean {
    return step % this.#settings.interval === 0;
  }

  add(result: StepResult, samples: number): void {
    this.#steps.push(result);
    if (!this.isDue(result.step)) return;
    const { memory_bytes } = result;
    if (memory_bytes !== undefined) this.#largestMemory = Math.max(memory_bytes, this.#largestMemory ?? 0);
    const scalars = stepScalars({ last: result, steps: this.#steps, samples, largestMemory: this.#largestMemory }, this.#plan);
    this.#steps = [];
    const counted = result.expert_loads ?? [];
    const layers = counted.flatMap((counts, layer): LoggedValue[] => [
      { tag: `moe/max over mean load/layer ${layer}`, value: maxOverMean(counts) },
      { tag: `moe/tokens per expert/layer ${layer}`, values: counts },
    ]);
    this.#append(this.#events, stepRecord(Date.now() / 1000, result.step, [...summariesOf(scalars), ...layers]));
    this.#row(logFiles.table, { step: result.step, ...scalars });
    this.#line({ step: result.step, ...scalars, ...(counted.length > 0 && { "moe/load": counted.map(maxOverMean) }) });
  }

  addEvaluation(result: EvaluationResult): void {
    const scalars = evaluationScalars(result);
    const { step, part, loss, perplexity, tokens, sources } = result;
    this.#append(this.#events, stepRecord(Date.now() / 1000, step, summariesOf(scalars)));
    for (const row of [{ source: "", loss, perplexity, tokens }, ...(sources.length > 1 ? sources : [])])
      this.#row(logFiles.evaluations, { step, part, ...row });
    this.#line({ step, ...scalars });
  }

  #line(values: Readonly<Record<string, unknown>>): void {
    this.#append(join(this.#settings.folder, logFiles.lines), `${JSON.stringify({ time: Date.now() / 1000, ...values })}\n`);
  }

  /** Appends a row of a table; the first has the names of the columns before it. */
  #row(file: string, values: Readonly<Record<string, string | number | undefined>>): void {
    const path = join(this.#settings.folder, file);
    const names = existsSync(path) ? firstLineOf(path) : undefined;
    const head = names ?? Object.keys(values).map(cell).join(",");
    const byName = new Map(Object.entries(values).map(([name, value]) => [cell(name), value]));
    const row = head.split(",").map((name) => cell(byName.get(name) ?? ""));
    this.#append(path, `${names === undefined ? `${head}\n` : ""}${row.join(",")}\n`);
  }

  #append(path: string, content: string | Uint8Array): void {
    try {
      appendFileSync(path, content);
    } catch (error) {
      throw unwritten(path, error);
    }
  }
}

const summariesOf = (scalars: Scalars): LoggedValue[] =>
  Object.entries(scalars).flatMap(([tag, value]) => (value === undefined ? [] : [{ tag, value }]));

/** Returns the largest count over the mean; 0 if all counts are 0. */
function maxOverMean(counts: readonly number[]): number {
  const total = counts.reduce((a, b) => a + b, 0);
  return total === 0 ? 0 : (Math.max(...counts) * counts.length) / total;
}

const firstLineOf = (path: string): string => readFileSync(path, "utf8").split("\n", 1)[0] ?? "";

/** Formats a cell (RFC 4180). */
const cell = (value: string | number): string => {
  const text = String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
