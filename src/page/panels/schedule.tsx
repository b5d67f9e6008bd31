/** The schedule: block runs of all stages over time, waits, transfers, and the instructions of a run near enough. */
import { useSignal } from "@preact/signals";
import { countText } from "../../units.ts";
import type { Sheet } from "../canvas.tsx";
import { sourceOf, targetOf } from "../dependencies.ts";
import { palette } from "../palette.ts";
import type { PlacedView, PlanModel } from "../planModel.ts";
import { type Colouring, drawRows, type Row, WITH_INSTRUCTIONS } from "../scheduleDraw.ts";
import { drawMarks, drawTransfers } from "../scheduleMarks.ts";
import { plan, plans, select, selectInstruction, selection, span, status, visible } from "../state.ts";
import { instructionAt, laneUnder, streamsOf, stripOf } from "../streamLanes.ts";
import { AXIS, drawTimeAxis, panBy, reveal, showFrom, type TimeScale, timeScale, zoomAt } from "../timeAxis.ts";
import { TimeCanvas, ZoomButtons } from "../timeCanvas.tsx";
import { timeText } from "../timeText.ts";
import { Legend, Segments, TableHead } from "../widgets.tsx";

/** Room for the names of stages. */
const LEFT = 76;
const RIGHT = 12;
const TOP = 22;
/** The height of the strip that shows the whole step. */
const STRIP = 34;

/** What the last drawing has where. */
interface Drawn {
  readonly scale: TimeScale;
  readonly rows: readonly Row[];
  readonly strip: { readonly scale: TimeScale; readonly top: number };
}

/** The strip below the schedule: the visible time follows the pointer. */
const followStrip = {
  has: ({ strip: { top } }: Drawn, { y }: { readonly y: number }): boolean => y >= top,
  follow: (now: Drawn, { x }: { readonly x: number }): void => centreAt(now, x),
};

const middle = (): number => (visible.value.from + visible.value.to) / 2;

/** The panel of the schedule. */
export function SchedulePanel() {
  const colouring = useSignal<Colouring>("kind");
  return (
    <section class="panel schedule-panel">
      <div class="toolbar">
        <Segments
          label="colour"
          value={colouring.value}
          options={{ kind: "by kind", microbatch: "by microbatch" }}
          onChange={(to) => (colouring.value = to)}
        />
        <ZoomButtons around={middle} />
        <ScheduleLegend colouring={colouring.value} />
      </div>
      <TimeCanvas
        draw={(sheet) => drawSchedule(sheet, colouring.value)}
        label={`schedule of ${plan.value.stages} stages; arrow keys choose block runs, + and - zoom, Shift with arrows moves, Home shows the whole step`}
        onHover={(drawn, { x, y }) => {
          const hit = runUnder(drawn, x, y);
          if (hit) status.value = hitText(hit);
        }}
        onChoose={(drawn, { x, y }) => choose(runUnder(drawn, x, y))}
        follower={followStrip}
        keys={keysOf}
      />
      <VisibleRuns />
    </section>
  );
}

/** Draws everything, and returns what is where. */
function drawSchedule(sheet: Sheet, colouring: Colouring): Drawn {
  const { context, width, height } = sheet;
  const shown = plans.value.length > 1 ? plans.value : [plan.value];
  const scale = timeScale(LEFT, width - LEFT - RIGHT);
  const bottom = height - AXIS - STRIP - 12;
  const rows = rowsOf(shown, bottom);
  const colours = palette.value;
  const end = rows.at(-1);
  const last = end ? end.top + end.height : bottom;
  drawTimeAxis(context, scale, TOP - 6, last + 4);
  drawRows(sheet, scale, rows, colouring);
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const row of rows) {
    const isChosen = selection.value !== undefined && "stage" in selection.value && selection.value.stage === row.stage;
    context.fillStyle = isChosen ? colours.ink : colours.quiet;
    const name = shown.length > 1 ? `${["before", "after"][row.model.index]} ${row.stage}` : `stage ${row.stage}`;
    context.fillText(name, LEFT - 10, row.top + row.height / 2 + 0.5);
  }
  drawTransfers(context, scale, rows);
  drawMarks(context, scale, rows);
  const strip = { scale: timeScale(LEFT, width - LEFT - RIGHT, { from: 0, to: visible.value.end }), top: last + AXIS + 12 };
  drawStrip(sheet, strip, shown, colouring);
  return { scale, rows, strip };
}

/** Returns a row for each stage; those of a second plan follow those of the first. */
function rowsOf(shown: readonly PlanModel[], bottom: number): Row[] {
  const total = shown.reduce((sum, model) => sum + model.stages, 0);
  const between = shown.length > 1 ? 14 : 0;
  const each = Math.max(8, Math.min(76, (bottom - TOP - between) / Math.max(1, total)));
  const gap = each >= 20 ? 5 : each >= 12 ? 3 : 1;
  let top = TOP;
  return shown.flatMap((model, m) => {
    if (m > 0) top += between;
    return Array.from({ length: model.stages }, (_, stage) => {
      const row = { model, stage, top: Math.round(top), height: Math.round(each - gap) };
      top += each;
      return row;
    });
  });
}

/** The picture of the whole step: it changes with the plans, the size and the colours alone. */
interface StripPicture {
  readonly key: string;
  readonly shown: readonly PlanModel[];
  readonly canvas: HTMLCanvasElement;
}
let strip: StripPicture | undefined;

function stripPicture(
  { width, ratio }: Sheet,
  scale: TimeScale,
  shown: readonly PlanModel[],
  colouring: Colouring,
): HTMLCanvasElement | undefined {
  const key = [width, ratio, scale.to, colouring, palette.value.paper].join();
  if (strip?.key === key && strip.shown.length === shown.length && strip.shown.every((model, i) => model === shown[i])) return strip.canvas;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(STRIP * ratio);
  const context = canvas.getContext("2d");
  if (!context) return undefined;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const total = shown.reduce((sum, model) => sum + model.stages, 0);
  const each = Math.max(1, (STRIP - 4) / total);
  const rows = shown
    .flatMap((model) => Array.from({ length: model.stages }, (_, stage) => ({ model, stage })))
    .map((row, n) => ({ ...row, top: 2 + n * each, height: Math.max(1, each - (each > 3 ? 1 : 0)) }));
  drawRows({ context, width, height: STRIP, ratio }, scale, rows, colouring);
  strip = { key, shown, canvas };
  return canvas;
}

/** Draws the whole step in small, and a frame around what is visible. */
function drawStrip(sheet: Sheet, { scale, top }: Drawn["strip"], shown: readonly PlanModel[], colouring: Colouring): void {
  const { context, width } = sheet;
  const picture = stripPicture(sheet, scale, shown, colouring);
  if (picture) context.drawImage(picture, 0, top, width, STRIP);
  const colours = palette.value;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillStyle = colours.quiet;
  context.fillText("whole step", LEFT - 10, top + STRIP / 2);
  const { from, to } = visible.value;
  context.strokeStyle = colours.accent;
  context.lineWidth = 2;
  context.strokeRect(scale.x(from), top + 1, Math.max(3, scale.x(to) - scale.x(from)), STRIP - 2);
}

function centreAt(now: Drawn, x: number): void {
  const length = now.scale.to - now.scale.from;
  showFrom(now.strip.scale.time(x) - length / 2, length);
}

/** A run under the pointer, or a wait, and the instruction of the run if these are drawn. */
interface Hit {
  readonly model: PlanModel;
  readonly stage: number;
  readonly time: number;
  readonly run: number | undefined;
  readonly instruction: PlacedView | undefined;
}

function runUnder({ scale, rows }: Drawn, x: number, y: number): Hit | undefined {
  const row = rows.find(({ top, height }) => y >= top && y < top + height);
  if (!row || x < scale.left || x > scale.left + scale.width) return undefined;
  const { model, stage, top, height } = row;
  const time = scale.time(x);
  const runs = model.runs[stage];
  const run = runs?.at(time);
  if (!runs || run === undefined) return { model, stage, time, run, instruction: undefined };
  const strip = stripOf(model, { top, height });
  const isInStrip = scale.x(runs.end[run] ?? 0) - scale.x(runs.start[run] ?? 0) >= WITH_INSTRUCTIONS && y > strip.top;
  const block = isInStrip ? model.block(stage, runs.kindOf(run), runs.chunk[run] ?? 0) : undefined;
  const share = (time - (runs.start[run] ?? 0)) / runs.duration(run);
  const instruction =
    block && instructionAt(model.slots(stage, block), model.instructions(stage, block), laneUnder(model, strip, y), share);
  return { model, stage, time, run, instruction };
}

function choose(hit: Hit | undefined): void {
  if (!hit || hit.run === undefined) {
    select(undefined);
    return;
  }
  const { stage, run, instruction } = hit;
  if (instruction) selectInstruction(instruction);
  else select({ kind: "run", stage, run });
}

/** Returns a sentence about what is under the pointer. */
function hitText({ model, stage, time, run, instruction }: Hit): string {
  const runs = model.runs[stage];
  if (!runs) return "";
  if (run === undefined) {
    const next = runs.begunAt(time);
    const [from, to] = [next > 0 ? (runs.end[next - 1] ?? 0) : 0, next < runs.length ? (runs.start[next] ?? 0) : model.view.timeline.end];
    const why = next < runs.length ? ` for ${runs.tag(next)}${sourceText(model, { stage, run: next })}` : ": it has run its last block";
    return `stage ${stage} waits ${timeText(to - from)}${why}`;
  }
  if (instruction) {
    const { id, view } = instruction;
    return `stage ${stage}, ${runs.tag(run)}: ${view.does} ${id}${view.stream ? `, stream ${view.stream}` : ""}`;
  }
  return runText(model, stage, run);
}

function sourceText(model: PlanModel, place: { readonly stage: number; readonly run: number }): string {
  const source = sourceOf(model, place);
  return source ? `, which needs ${model.runs[source.stage]?.tag(source.run)} of stage ${source.stage}` : "";
}

/** Returns a sentence about a run. */
export function runText(model: PlanModel, stage: number, run: number): string {
  const runs = model.runs[stage];
  if (!runs) return "";
  const chunk = model.chunks > 1 ? `, chunk ${runs.chunk[run]}` : "";
  const target = targetOf(model, { stage, run });
  const partner = runs.partnerOf(run);
  const pair = partner === undefined ? "" : `, alternates with ${runs.tag(partner)}`;
  const to = target ? `; its result goes to stage ${target.stage}` : "";
  return `stage ${stage}, ${runs.tag(run)}: ${runs.kindOf(run)} of microbatch ${runs.microbatch[run]}${chunk}${pair}, ${timeText(runs.start[run] ?? 0)} to ${timeText(runs.end[run] ?? 0)}${sourceText(model, { stage, run })}${to}`;
}

function keysOf({ shiftKey }: KeyboardEvent): Readonly<Record<string, () => void>> {
  const { from, to } = visible.value;
  const step = (to - from) / 10;
  return {
    "+": () => zoomAt(middle(), 0.7),
    "=": () => zoomAt(middle(), 0.7),
    "-": () => zoomAt(middle(), 1 / 0.7),
    Home: () => (span.value = undefined),
    ArrowLeft: () => (shiftKey ? panBy(-step) : chooseNext(0, -1)),
    ArrowRight: () => (shiftKey ? panBy(step) : chooseNext(0, 1)),
    ArrowUp: () => chooseNext(-1, 0),
    ArrowDown: () => chooseNext(1, 0),
  };
}

/** Selects the next run of the stage, or the run of the next stage at the same time. */
function chooseNext(down: number, right: number): void {
  const model = plan.value;
  const at = selection.value?.kind === "run" ? selection.value : { stage: 0, run: right > 0 ? -1 : 0 };
  const stage = Math.min(model.stages - 1, Math.max(0, at.stage + down));
  const runs = model.runs[stage];
  if (!runs) return;
  const time = model.runs[at.stage]?.start[at.run] ?? 0;
  const wanted = down === 0 ? at.run + right : Math.max(0, runs.begunAt(time) - 1);
  const run = Math.min(runs.length - 1, Math.max(0, wanted));
  select({ kind: "run", stage, run });
  reveal(runs.start[run] ?? 0, runs.end[run] ?? 0);
  status.value = runText(model, stage, run);
}

function ScheduleLegend({ colouring }: { readonly colouring: Colouring }) {
  const colours = palette.value;
  const names = ["forward", "backward", "weight gradients", "optimizer step"];
  const used = names.flatMap((name, k) =>
    plan.value.runs.some(({ kind }) => kind.includes(k)) ? [[name, colours.kinds[k] ?? ""] as const] : [],
  );
  const lanes = streamsOf(plan.value);
  return (
    <>
      <Legend
        entries={[
          ...(colouring === "kind" ? used : []),
          ...(plan.value.runs.some(({ hasPairs }) => hasPairs)
            ? [["line above: a pair, whose instructions alternate", colours.ink] as const]
            : []),
          ["wait", colours.idle],
        ]}
      />
      {lanes.length > 1 && (
        <span class="quiet lanes-of-runs">
          A wide run shows, from above: {lanes.map((lane) => (lane ? `stream ${lane}` : "in order")).join(", ")}
        </span>
      )}
    </>
  );
}

/** The visible runs as a table, for readers that do not see the drawing. */
function VisibleRuns() {
  const isOpen = useSignal(false);
  return (
    <details onToggle={(event) => (isOpen.value = event.currentTarget.open)}>
      <summary>Visible block runs as a table</summary>
      {isOpen.value && <RunTable />}
    </details>
  );
}

/** The most rows of the table. */
const ROWS = 200;

function RunTable() {
  const { from, to } = visible.value;
  const model = plan.value;
  const all = model.runs.flatMap((runs, stage) => {
    const first = Math.max(0, runs.begunAt(from) - 1);
    const count = Math.min(ROWS, Math.max(0, runs.begunAt(to) - first));
    return Array.from({ length: count }, (_, n) => ({ stage, runs, run: first + n }));
  });
  return (
    <div class="table-room short">
      <table>
        <TableHead names={["stage", "run", "kind", "microbatch", "from", "to"]} />
        <tbody>
          {all.slice(0, ROWS).map(({ stage, runs, run }) => (
            <tr key={`${stage} ${run}`}>
              <td>{stage}</td>
              <td>
                <button type="button" class="link" onClick={() => select({ kind: "run", stage, run })}>
                  {runs.tag(run)}
                </button>
              </td>
              <td>{runs.kindOf(run)}</td>
              <td>{countText(runs.microbatch[run] ?? 0)}</td>
              <td>{timeText(runs.start[run] ?? 0)}</td>
              <td>{timeText(runs.end[run] ?? 0)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {all.length > ROWS && <p class="note">The first {ROWS}; zoom in to see others.</p>}
    </div>
  );
}
