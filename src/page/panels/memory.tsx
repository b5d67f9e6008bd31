/** The memory of a rank over the step: stacked parts, the reserved peak, the device, and what is alive at a moment. */
import { computed } from "@preact/signals";
import { bytesText, countText } from "../../units.ts";
import type { Sheet } from "../canvas.tsx";
import { MemoryCurve } from "../memoryCurve.ts";
import { palette } from "../palette.ts";
import type { PlanModel } from "../planModel.ts";
import { memoryParts, memoryTitles } from "../planSummary.tsx";
import { ticks } from "../shared/ticks.ts";
import { moment, plan, plans, select, selectInstruction, selection, span, stage, status, visible } from "../state.ts";
import { AXIS, drawTimeAxis, reveal, type TimeScale, timeScale, zoomAt } from "../timeAxis.ts";
import { TimeCanvas, ZoomButtons } from "../timeCanvas.tsx";
import { timeText } from "../timeText.ts";
import { Legend } from "../widgets.tsx";

const [LEFT, RIGHT, TOP] = [76, 12, 18];

/** The curve of the stage that is shown. */
const curve = computed(() => new MemoryCurve(plan.value, Math.min(stage.value, plan.value.stages - 1)));
/** The same stage of the other plan. */
const otherCurve = computed(() => {
  const other = plans.value.length > 1 ? plans.value[1 - plan.value.index] : undefined;
  return other && stage.value < other.stages ? new MemoryCurve(other, stage.value) : undefined;
});

/** The panel of the memory. */
export function MemoryPanel() {
  const shown = plan.value;
  return (
    <section class="panel memory-panel">
      <div class="toolbar">
        <StageChoice />
        <ZoomButtons around={() => moment.value}>
          <button type="button" onClick={showPeak}>
            fullest moment
          </button>
        </ZoomButtons>
        <Legend entries={usedParts(shown).map((part) => [memoryTitles[part], palette.value.memory[part]])} />
      </div>
      <TimeCanvas
        draw={(sheet) => ({ scale: drawMemory(sheet) })}
        label={`memory of a rank of stage ${stage.value} over the step; arrow keys move the moment, + and - zoom`}
        onHover={({ scale }, { x }) => (status.value = momentText(scale.time(x)))}
        onChoose={({ scale }, { x }) => (moment.value = clamped(scale.time(x)))}
        keys={keysOf}
      />
      <Alive />
    </section>
  );
}

/** The choice of the stage. */
export function StageChoice() {
  return (
    <label class="choice">
      stage{" "}
      <select value={stage.value} onChange={(event) => (stage.value = Number(event.currentTarget.value))}>
        {plan.value.view.stages.map((_, n) => (
          <option key={String(n)} value={n}>
            {n}
          </option>
        ))}
      </select>
    </label>
  );
}

const usedParts = (shown: PlanModel) =>
  memoryParts.filter((part) => (shown.view.inspection.roles[Math.min(stage.value, shown.stages - 1)]?.memory[part] ?? 0) > 0);

const clamped = (time: number): number => Math.min(visible.peek().end, Math.max(0, time));

function keysOf({ shiftKey }: KeyboardEvent): Readonly<Record<string, () => void>> {
  const { from, to } = visible.value;
  const step = (to - from) / (shiftKey ? 10 : 100);
  const move = (time: number): void => {
    moment.value = clamped(time);
    showMoment();
  };
  const zoom = (factor: number): void => {
    zoomAt(moment.value, factor);
    showMoment();
  };
  return {
    ArrowLeft: () => move(moment.value - step),
    ArrowRight: () => move(moment.value + step),
    "+": () => zoom(0.7),
    "-": () => zoom(1 / 0.7),
    Home: () => {
      span.value = undefined;
      showMoment();
    },
  };
}

function showMoment(): void {
  reveal(moment.value, moment.value);
  status.value = momentText(moment.value);
}

/** Moves to the moment with the most bytes alive. */
function showPeak(): void {
  const { runs } = curve.value;
  let [best, at] = [-1, 0];
  for (let run = 0; run < runs.length; run++) {
    const [start, end] = [runs.start[run] ?? 0, runs.end[run] ?? 0];
    const { activation, workspace } = curve.value.most(start, end - (end - start) * 1e-6);
    if (activation + workspace <= best) continue;
    best = activation + workspace;
    at = run;
  }
  const count = 400;
  const [start, length] = [runs.start[at] ?? 0, runs.duration(at)];
  const samples = Array.from({ length: count }, (_, i) => start + (length * (i + 0.5)) / count);
  const sum = (time: number): number => {
    const { activation, workspace } = curve.value.most(time, time);
    return activation + workspace;
  };
  moment.value = samples.reduce((most, time) => (sum(time) > sum(most) ? time : most), samples[0] ?? 0);
  reveal(moment.value, moment.value);
}

function stateBytes(of: MemoryCurve): number {
  const memory = of.model.view.inspection.roles[of.stage]?.memory;
  return memory ? memory.parameter + memory.gradient + memory.optimizer + memory.scratch : 0;
}

/** Returns a sentence about a moment. */
function momentText(time: number): string {
  const { activation, workspace } = curve.value.most(time, time);
  const now = curve.value.instructionAt(time);
  const doing = now ? `${curve.value.runs.tag(now.run)}, ${now.instruction?.id}` : "waits";
  return `stage ${curve.value.stage} at ${timeText(time)}: ${bytesText(Math.round(stateBytes(curve.value) + activation + workspace))} alive; ${doing}`;
}

/** Draws the stacked parts, the axes, and the moment. */
function drawMemory({ context, width, height }: Sheet): TimeScale {
  const scale = timeScale(LEFT, width - LEFT - RIGHT);
  const bottom = height - AXIS;
  const { model, stage: own } = curve.value;
  const { device, roles } = model.view.inspection;
  const memory = roles[own]?.memory;
  const colours = palette.value;
  if (!memory) return scale;
  const peak = Math.max(memory.peak, otherCurve.value?.model.view.inspection.roles[own]?.memory.peak ?? 0);
  const isLimitShown = device.memory < 3 * peak;
  const top = Math.max(peak, isLimitShown ? device.memory : 0) * 1.03;
  const y = (bytes: number): number => bottom - (bytes / top) * (bottom - TOP);
  drawBytesAxis(context, y, top, { left: LEFT, right: width - RIGHT });
  drawTimeAxis(context, scale, TOP, bottom);
  // the step of the other plan may take longer
  const across = Math.max(0, Math.min(scale.width, scale.x(model.view.timeline.end) - LEFT));
  let below = 0;
  for (const part of ["parameter", "gradient", "optimizer", "scratch"] as const) {
    context.fillStyle = colours.memory[part];
    context.fillRect(LEFT, y(below + memory[part]), across, y(below) - y(below + memory[part]));
    below += memory[part];
  }
  const columns = columnsOf(curve.value, scale, across);
  // one shape for each part: a rectangle for each column costs the browser more than all else in a frame
  fillColumns(
    context,
    columns,
    { base: y(below), top: ({ activation, workspace }) => y(below + activation + workspace) },
    colours.memory.workspace,
  );
  fillColumns(context, columns, { base: y(below), top: ({ activation }) => y(below + activation) }, colours.memory.activation);
  if (otherCurve.value) drawOther(context, scale, y, otherCurve.value);
  const line = { left: LEFT, right: width - RIGHT };
  const [reserved, limit] = [y(memory.peak), y(device.memory)];
  // two lines that are near have their texts on both sides
  const isNear = isLimitShown && Math.abs(reserved - limit) < 18;
  drawLimit(context, { y: reserved, isTextBelow: isNear && reserved > limit }, line, `reserved ${bytesText(memory.peak)}`, colours.ink);
  if (isLimitShown)
    drawLimit(
      context,
      { y: limit, isTextBelow: isNear && limit > reserved },
      line,
      `${device.name} ${bytesText(device.memory)}`,
      colours.wrong,
    );
  const at = scale.x(moment.value);
  if (at >= LEFT && at <= width - RIGHT) {
    context.strokeStyle = colours.accent;
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(at, TOP - 6);
    context.lineTo(at, bottom);
    context.stroke();
  }
  return scale;
}

type Column = ReturnType<MemoryCurve["most"]>;

/** Returns the most that is alive in each column of pixels. */
function columnsOf(of: MemoryCurve, { from, to, width }: TimeScale, across: number): Column[] {
  const each = (to - from) / width;
  return Array.from({ length: Math.ceil(across) }, (_, x) => of.most(from + x * each, from + (x + 1) * each));
}

/** Fills the area between a base and the tops of columns. */
function fillColumns(
  context: CanvasRenderingContext2D,
  columns: readonly Column[],
  { base, top }: { readonly base: number; top(column: Column): number },
  colour: string,
): void {
  context.fillStyle = colour;
  context.beginPath();
  context.moveTo(LEFT, base);
  let before = base;
  for (const [x, column] of columns.entries()) {
    const at = top(column);
    if (at === before) continue;
    context.lineTo(LEFT + x, before);
    context.lineTo(LEFT + x, at);
    before = at;
  }
  context.lineTo(LEFT + columns.length, before);
  context.lineTo(LEFT + columns.length, base);
  context.fill();
}

/** Draws the sum of the other plan as a line. */
function drawOther(context: CanvasRenderingContext2D, scale: TimeScale, y: (bytes: number) => number, other: MemoryCurve): void {
  const each = (scale.to - scale.from) / scale.width;
  const state = stateBytes(other);
  context.strokeStyle = palette.value.ink;
  context.lineWidth = 1.5;
  context.setLineDash([4, 3]);
  context.beginPath();
  for (let x = 0; x < scale.width && scale.time(scale.left + x) <= other.model.view.timeline.end; x++) {
    const { activation, workspace } = other.most(scale.from + x * each, scale.from + (x + 1) * each);
    context.lineTo(scale.left + x, y(state + activation + workspace));
  }
  context.stroke();
  context.setLineDash([]);
  // its name stands above what is drawn at the left edge
  const { activation, workspace } = other.most(scale.from, scale.from + 40 * each);
  context.fillStyle = palette.value.ink;
  context.textAlign = "left";
  context.textBaseline = "alphabetic";
  context.fillText(["before", "after"][other.model.index] ?? "", scale.left + 4, Math.max(TOP + 8, y(state + activation + workspace) - 8));
}

interface Line {
  readonly left: number;
  readonly right: number;
}

function drawLimit(
  context: CanvasRenderingContext2D,
  { y, isTextBelow }: { readonly y: number; readonly isTextBelow: boolean },
  { left, right }: Line,
  text: string,
  colour: string,
): void {
  context.strokeStyle = colour;
  context.fillStyle = colour;
  context.lineWidth = 1.5;
  context.setLineDash([6, 4]);
  context.beginPath();
  context.moveTo(left, y);
  context.lineTo(right, y);
  context.stroke();
  context.setLineDash([]);
  context.textAlign = "right";
  context.textBaseline = "alphabetic";
  context.fillText(text, right - 4, isTextBelow ? y + 14 : y - 5);
}

function drawBytesAxis(context: CanvasRenderingContext2D, y: (bytes: number) => number, top: number, { left, right }: Line): void {
  const { line, quiet } = palette.value;
  // round numbers of the largest unit
  const unit = 1024 ** Math.floor(Math.log(Math.max(top, 1)) / Math.log(1024));
  context.strokeStyle = line;
  context.fillStyle = quiet;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of ticks(0, top / unit, 6).values) {
    const at = Math.round(y(value * unit)) + 0.5;
    if (at < TOP - 2) continue;
    context.beginPath();
    context.moveTo(left, at);
    context.lineTo(right, at);
    context.stroke();
    context.fillText(value === 0 ? "0" : bytesText(value * unit), left - 10, at);
  }
}

/** The most rows of the table. */
const ROWS = 60;

/** What is alive at the moment. */
function Alive() {
  const time = moment.value;
  const groups = curve.value.aliveAt(time);
  const now = curve.value.instructionAt(time);
  const total = groups.reduce((sum, { bytes }) => sum + bytes, 0);
  const chosen = selection.value?.kind === "tensor" ? selection.value.id : undefined;
  return (
    <div class="table-room alive">
      <table>
        <caption>
          Alive at {timeText(time)}: <strong>{bytesText(Math.round(total))}</strong>{" "}
          <span class="quiet">
            {now ? `in ${curve.value.runs.tag(now.run)}, ` : "while the stage waits"}
            {now?.instruction && (
              <button type="button" class="link id" onClick={() => now.instruction && selectInstruction(now.instruction)}>
                {now.instruction.id}
              </button>
            )}
          </span>
        </caption>
        <thead>
          <tr>
            <th scope="col" class="number">
              bytes
            </th>
            <th scope="col" class="number">
              of it
            </th>
            <th scope="col">kind</th>
            <th scope="col" class="number">
              number
            </th>
            <th scope="col">tensor</th>
          </tr>
        </thead>
        <tbody>
          {groups.slice(0, ROWS).map(({ kind, id, count, bytes }) => (
            <tr key={`${kind} ${id}`} class={id === chosen ? "selected" : ""}>
              <td class="number">{bytesText(bytes)}</td>
              <td class="number">{((100 * bytes) / total).toFixed(1)} %</td>
              <td>
                <i class="swatch" style={{ background: colourOf(kind) }} />
                {kind}
              </td>
              <td class="number">{countText(count)}</td>
              <td>
                <button type="button" class="link id" onClick={() => select({ kind: "tensor", stage: stage.value, id })}>
                  {id}
                </button>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      {groups.length > ROWS && <p class="note">… and {countText(groups.length - ROWS)} smaller kinds of tensors</p>}
    </div>
  );
}

function colourOf(kind: string): string {
  const part = memoryParts.find((name) => name === kind);
  return part ? palette.value.memory[part] : palette.value.idle;
}
