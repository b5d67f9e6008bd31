/** Draws over the schedule: transfers between stages, the selected run with what it waits for, and the time slots of a selected instruction. */
import { type RunPlace, sourceOf, targetOf } from "./dependencies.ts";
import { palette } from "./palette.ts";
import type { PlanModel } from "./planModel.ts";
import type { Row } from "./scheduleDraw.ts";
import type { StageRuns } from "./stageRuns.ts";
import { plan, selectedInstruction, selection } from "./state.ts";
import type { TimeScale } from "./timeAxis.ts";

/** The least mean width of runs whose transfers are drawn, in pixels. */
const LEAST_WIDTH = 18;

/** Draws a line from each run to the run of another stage that receives its result. */
export function drawTransfers(context: CanvasRenderingContext2D, scale: TimeScale, rows: readonly Row[]): void {
  context.strokeStyle = palette.value.quiet;
  context.globalAlpha = 0.55;
  context.lineWidth = 1;
  context.beginPath();
  for (const row of rows) {
    const runs = row.model.runs[row.stage];
    if (!runs) continue;
    const [first, last] = [Math.max(0, runs.begunAt(scale.from) - 1), runs.begunAt(scale.to)];
    if (scale.width / Math.max(1, last - first) < LEAST_WIDTH) continue;
    for (let run = first; run < last; run++) {
      const target = targetOf(row.model, { stage: row.stage, run });
      if (target) addLine(context, scale, rows, { row, run }, target);
    }
  }
  context.stroke();
  context.globalAlpha = 1;
}

function addLine(
  context: CanvasRenderingContext2D,
  scale: TimeScale,
  rows: readonly Row[],
  from: { readonly row: Row; readonly run: number },
  to: RunPlace,
): void {
  const { model } = from.row;
  const other = rows.find((row) => row.model === model && row.stage === to.stage);
  if (!other || other === from.row) return;
  const [x, y] = [scale.x(model.runs[from.row.stage]?.end[from.run] ?? 0), scale.x(model.runs[to.stage]?.start[to.run] ?? 0)];
  if (y < scale.left || x < scale.left || x > scale.left + scale.width || y > scale.left + scale.width) return;
  const isDown = other.top > from.row.top;
  context.moveTo(x - 1, isDown ? from.row.top + from.row.height : from.row.top);
  context.lineTo(y + 1, isDown ? other.top : other.top + other.height);
}

/** Draws what is selected. */
export function drawMarks(context: CanvasRenderingContext2D, scale: TimeScale, rows: readonly Row[]): void {
  const of = selection.value;
  const own = rows.filter(({ model }) => model === plan.value);
  if (of?.kind === "run") drawRun(context, scale, own, of);
  const instruction = selectedInstruction.value;
  if (!instruction) return;
  const { stage, block, n } = instruction;
  const row = own.find((r) => r.stage === stage);
  const runs = row?.model.runs[stage];
  if (!row || !runs) return;
  const slots = row.model.slots(stage, block);
  const [begin, end] = [slots[2 * n] ?? 0, slots[2 * n + 1] ?? 0];
  const { accent, paper } = palette.value;
  for (let i = Math.max(0, runs.begunAt(scale.from) - 1); i < runs.length && (runs.start[i] ?? 0) < scale.to; i++) {
    if (runs.kindOf(i) !== block.kind || runs.chunk[i] !== block.chunk) continue;
    const x = scale.x((runs.start[i] ?? 0) + runs.duration(i) * begin);
    const width = Math.max(2, scale.x((runs.start[i] ?? 0) + runs.duration(i) * end) - x);
    if (x < scale.left || x > scale.left + scale.width) continue;
    context.fillStyle = paper;
    context.fillRect(x - 1, row.top - 2, width + 2, row.height + 4);
    context.fillStyle = accent;
    context.fillRect(x, row.top - 2, width, row.height + 4);
  }
}

/** Draws a frame around a run, and lines to the runs that it waits for and that wait for it. */
function drawRun(context: CanvasRenderingContext2D, scale: TimeScale, rows: readonly Row[], { stage, run }: RunPlace): void {
  const row = rows.find((r) => r.stage === stage);
  const runs = row?.model.runs[stage];
  if (!row || !runs) return;
  const { accent, ink } = palette.value;
  frame(context, scale, row, runs, run, ink);
  context.strokeStyle = accent;
  context.lineWidth = 2;
  for (const [from, to] of [
    [sourceOf(row.model, { stage, run }), { stage, run }],
    [{ stage, run }, targetOf(row.model, { stage, run })],
  ] as const) {
    if (!from || !to) continue;
    const start = rows.find((r) => r.stage === from.stage);
    if (!start) continue;
    context.beginPath();
    addLine(context, scale, rows, { row: start, run: from.run }, to);
    context.stroke();
    const other = from.stage === stage && from.run === run ? to : from;
    const otherRow = rows.find((r) => r.stage === other.stage);
    const otherRuns = runsOf(row.model, other.stage);
    if (otherRow && otherRuns) frame(context, scale, otherRow, otherRuns, other.run, accent);
  }
}

const runsOf = (model: PlanModel, stage: number): StageRuns | undefined => model.runs[stage];

function frame(
  context: CanvasRenderingContext2D,
  scale: TimeScale,
  { top, height }: Row,
  runs: StageRuns,
  run: number,
  colour: string,
): void {
  const [from, to] = [scale.x(runs.start[run] ?? 0), scale.x(runs.end[run] ?? 0)];
  if (to < scale.left || from > scale.left + scale.width) return;
  const x = Math.max(scale.left, from);
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.strokeRect(x, top - 1, Math.max(2, Math.min(to, scale.left + scale.width) - x - 1), height + 2);
}
