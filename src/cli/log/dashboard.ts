/** The dashboard of a run on a terminal: loss, speed, memory, balance of experts and the last evaluation, drawn over each other step by step. */
import type { EvaluationResult, StepResult } from "../../../schemas/stepResult.ts";
import { bytesText, countText } from "../../units.ts";
import { duration } from "../progress.ts";
import { type PlanNumbers, stepScalars } from "./scalars.ts";

/** Rows of the chart. */
const ROWS = 8;
/** Columns of the labels beside the chart. */
const LABELS = 10;
/** The narrowest and the widest frame in columns. */
const [NARROWEST, WIDEST] = [40, 120];

/** What a frame shows beside the steps so far. */
export interface FrameSettings {
  readonly name: string;
  /** The last step of the run. */
  readonly steps: number;
  readonly plan: PlanNumbers;
}

/** The state of the dashboard. `frame` returns its lines. */
export class Dashboard {
  readonly #settings: FrameSettings;
  readonly #losses: { readonly step: number; readonly value: number }[] = [];
  readonly #recent: StepResult[] = [];
  readonly #evaluations = new Map<string, EvaluationResult>();

  constructor(settings: FrameSettings) {
    this.#settings = settings;
  }

  add(step: StepResult): void {
    this.#losses.push({ step: step.step, value: step.loss });
    this.#recent.push(step);
    if (this.#recent.length > 10) this.#recent.shift();
  }

  addEvaluation(result: EvaluationResult): void {
    this.#evaluations.set(result.part, result);
  }

  /** Returns the lines of the frame, at most `columns` wide. */
  frame(columns: number): string[] {
    const width = Math.min(WIDEST, Math.max(NARROWEST, columns - 1));
    const last = this.#recent.at(-1);
    if (!last) return [];
    const { name, steps, plan } = this.#settings;
    const scalars = stepScalars({ last, steps: this.#recent, samples: 0 }, plan);
    const left = (steps - last.step) * (scalars["iteration-time"] ?? 0);
    const show = (value: number | undefined, format: (x: number) => string): string[] => (value === undefined ? [] : [format(value)]);
    const speed = [
      ...show(scalars["tokens/s"], (x) => `${countText(Math.round(x))} tokens/s`),
      ...show(scalars.throughput, (x) => `${x.toPrecision(3)} TFLOP/s per rank`),
      ...show(scalars["throughput/share of peak"], (x) => `${(100 * x).toPrecision(2)} % of peak`),
      `memory ${bytesText(plan.memory)}`,
    ];
    const lines = [
      `${name}   step ${countText(last.step)} of ${countText(steps)}   ${left > 0 ? `${duration(left)} left` : "done"}`,
      ...lossChart(this.#losses, width),
      `loss ${last.loss.toFixed(4)}   grad norm ${last.grad_norm.toFixed(3)}   lr ${last.lr.toExponential(2)}`,
      speed.join("   "),
      ...expertLines(last),
      ...[...this.#evaluations.values()].map(
        (e) => `${e.part} loss ${e.loss.toFixed(4)}   perplexity ${e.perplexity.toPrecision(5)}   at step ${countText(e.step)}`,
      ),
    ];
    return lines.map((line) => line.slice(0, width));
  }
}

/** One mark for each layer with experts: its busiest expert over the mean, from even to 4 times. */
function expertLines({ expert_load, expert_loads }: StepResult): string[] {
  if (expert_load === undefined) return [];
  const marks = "▁▂▃▄▅▆▇█";
  const each = (expert_loads ?? []).map((counts) => {
    const total = counts.reduce((a, b) => a + b, 0);
    const load = total > 0 ? (Math.max(...counts) * counts.length) / total : 1;
    return marks[Math.min(marks.length - 1, Math.max(0, Math.floor(((load - 1) / 3) * marks.length)))];
  });
  return [`experts: busiest ${expert_load.toFixed(2)} x the mean   ${each.join("")}`.trimEnd()];
}

/** Draws a curve with dots of Braille, 2 x 4 in a character; labels at the left are the highest and the lowest loss. */
function lossChart(losses: readonly { readonly step: number; readonly value: number }[], width: number): string[] {
  const shown = losses.filter(({ value }) => Number.isFinite(value));
  const [low, high] = [Math.min(...shown.map((p) => p.value)), Math.max(...shown.map((p) => p.value))];
  const [first, last] = [shown[0]?.step ?? 0, shown.at(-1)?.step ?? 0];
  const columns = width - LABELS;
  const cells = Array.from({ length: ROWS }, () => new Uint8Array(columns));
  for (const { step, value } of shown) {
    const x = Math.round(((step - first) / Math.max(1, last - first)) * (2 * columns - 1));
    const y = Math.round(((high - value) / (high - low || 1)) * (4 * ROWS - 1));
    const row = cells[y >> 2];
    if (row) row[x >> 1] = (row[x >> 1] ?? 0) | (dots[y & 3]?.[x & 1] ?? 0);
  }
  const label = (row: number): string => (shown.length === 0 ? "" : row === 0 ? high.toFixed(3) : row === ROWS - 1 ? low.toFixed(3) : "");
  return cells.map((row, i) => `${label(i).padStart(LABELS - 1)} ${String.fromCharCode(...Array.from(row, (bits) => 0x2800 + bits))}`);
}
/** The bit of each dot of a Braille character, by row and column. */
const dots = [
  [0x01, 0x08],
  [0x02, 0x10],
  [0x04, 0x20],
  [0x40, 0x80],
] as const;
