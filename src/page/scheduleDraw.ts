/**
 * Draws the block runs of stages over time. Far out, a column of pixels has the mean colour of what runs in it, so a picture of a million
 * runs costs as much as one of a thousand; near, each run is a rectangle with its name and, with enough room, its instructions.
 */
import type { Sheet } from "./canvas.tsx";
import { channels, microbatchColour, type Palette, palette, pixel } from "./palette.ts";
import type { PlanModel } from "./planModel.ts";
import type { StageRuns } from "./stageRuns.ts";
import { placeOfLane, type StreamLane, streamsOf, stripOf } from "./streamLanes.ts";
import type { TimeScale } from "./timeAxis.ts";

/** The meaning of colours. */
export type Colouring = "kind" | "microbatch";

/** A row of the schedule. */
export interface Row {
  readonly model: PlanModel;
  readonly stage: number;
  readonly top: number;
  readonly height: number;
}

/** The least mean width of runs that are drawn one by one, in pixels. */
const LEAST_WIDTH = 3;
/** The least height of a run that shows its name. */
const LEAST_TEXT = 13;
/** The least width of a run that shows its instructions. */
export const WITH_INSTRUCTIONS = 150;

/** Draws rows. */
export function drawRows(sheet: Sheet, scale: TimeScale, rows: readonly Row[], colouring: Colouring): void {
  const shares: Row[] = [];
  for (const row of rows) {
    const runs = row.model.runs[row.stage];
    if (!runs) continue;
    const count = runs.begunAt(scale.to) - runs.begunAt(scale.from) + 1;
    if (scale.width / count < LEAST_WIDTH) shares.push(row);
    else drawRuns(sheet.context, scale, row, runs, colouring);
  }
  drawShares(sheet, scale, shares, colouring);
}

const count = (model: PlanModel): number => model.view.inspection.derived.microbatches;

/** Returns the colour of a run. */
function colourOf(model: PlanModel, runs: StageRuns, i: number, colouring: Colouring): string {
  const kind = runs.kind[i] ?? 0;
  if (colouring === "microbatch") return microbatchColour(runs.microbatch[i] ?? 0, count(model), kind);
  return palette.value.kinds[kind] ?? palette.value.quiet;
}

function drawRuns(context: CanvasRenderingContext2D, scale: TimeScale, row: Row, runs: StageRuns, colouring: Colouring): void {
  const colours = palette.value;
  const { top, height, model, stage } = row;
  context.fillStyle = colours.idle;
  context.fillRect(scale.left, top, Math.max(0, Math.min(scale.width, scale.x(model.view.timeline.end) - scale.left)), height);
  context.textAlign = "center";
  context.textBaseline = "middle";
  const right = scale.left + scale.width;
  for (let i = Math.max(0, runs.begunAt(scale.from) - 1); i < runs.length && (runs.start[i] ?? 0) < scale.to; i++) {
    const [from, to] = [Math.max(scale.left, scale.x(runs.start[i] ?? 0)), Math.min(right, scale.x(runs.end[i] ?? 0))];
    const width = to - from - (to - from > 4 ? 1 : 0);
    if (width <= 0) continue;
    context.fillStyle = colourOf(model, runs, i, colouring);
    context.fillRect(from, top, width, height);
    if (runs.partnerOf(i) !== undefined) drawPair(context, { from, to, top, height }, runs.partnerOf(i) === i + 1);
    const tag = runs.tag(i);
    const whole = scale.x(runs.end[i] ?? 0) - scale.x(runs.start[i] ?? 0);
    const hasStrip = whole >= WITH_INSTRUCTIONS && height >= 18;
    if (hasStrip) drawStrip(context, scale, { model, stage, runs, i }, { top, height });
    if (width > 7 * tag.length + 6 && height >= LEAST_TEXT) {
      context.fillStyle = colours.onFill;
      context.fillText(tag, from + width / 2, top + (hasStrip ? height * 0.28 : height / 2 + 0.5));
    }
  }
}

/** The height of the line that joins the two runs of a pair, and how far it is from other pairs, in pixels. */
const JOINED = 3;
const GAP = 2;

/** Marks a run of a pair: a line above both joins them. Their instructions alternate, so that both run from the begin of the first to the end of the second. */
function drawPair(
  context: CanvasRenderingContext2D,
  { from, to, top, height }: { readonly from: number; readonly to: number; readonly top: number; readonly height: number },
  isFirst: boolean,
): void {
  if (height < 2 * JOINED) return;
  context.fillStyle = palette.value.ink;
  const [begin, end] = isFirst ? [from + GAP, to + 1] : [from, to - GAP];
  context.fillRect(begin, top, Math.max(0, end - begin), Math.min(JOINED, height / 4));
}

/** A run of a stage. */
interface RunOf {
  readonly model: PlanModel;
  readonly stage: number;
  readonly runs: StageRuns;
  readonly i: number;
}

/** Draws the instructions of a run in the lower part of its rectangle: collectives and transfers in the colour of their axis. */
function drawStrip(
  context: CanvasRenderingContext2D,
  scale: TimeScale,
  { model, stage, runs, i }: RunOf,
  { top, height }: { readonly top: number; readonly height: number },
): void {
  const block = model.block(stage, runs.kindOf(i), runs.chunk[i] ?? 0);
  if (!block) return;
  const marks = marksOf(model, stage, block.kind, block.chunk);
  const slots = model.slots(stage, block);
  const [start, length] = [runs.start[i] ?? 0, runs.duration(i)];
  const colours = palette.value;
  const strip = stripOf(model, { top, height });
  context.fillStyle = "rgb(0 0 0 / 0.18)";
  const [left, right] = [Math.max(scale.left, scale.x(start)), Math.min(scale.left + scale.width, scale.x(start + length))];
  for (const lane of streamsOf(model)) {
    const { top: y, height: h } = placeOfLane(model, strip, lane);
    context.fillRect(left, y, right - left - 1, h);
  }
  for (let n = 0; n < marks.length; n++) {
    const mark = marks[n];
    if (mark === undefined) continue;
    const x = scale.x(start + length * (slots[2 * n] ?? 0));
    const to = scale.x(start + length * (slots[2 * n + 1] ?? 0));
    if (to < scale.left || x > scale.left + scale.width) continue;
    const { top: y, height: h } = placeOfLane(model, strip, mark.lane);
    context.fillStyle = colours.axes[mark.axis];
    // a collective of a stream may end after its block
    const end = mark.lane === undefined ? Math.min(to, right) : Math.min(to, scale.left + scale.width);
    context.fillRect(Math.max(scale.left, x), y, Math.max(1.5, end - Math.max(scale.left, x) - 0.5), h);
  }
}

type Axis = keyof Palette["axes"];
interface Mark {
  readonly axis: Axis;
  readonly lane: StreamLane;
}
const marksByBlock = new WeakMap<PlanModel, Map<string, readonly (Mark | undefined)[]>>();

/** Returns per instruction of a block the axis that it sends over, and its lane; undefined: it computes. */
function marksOf(model: PlanModel, stage: number, kind: string, chunk: number): readonly (Mark | undefined)[] {
  const own = marksByBlock.get(model) ?? new Map<string, readonly (Mark | undefined)[]>();
  marksByBlock.set(model, own);
  const key = `${stage} ${kind} ${chunk}`;
  const known = own.get(key);
  if (known) return known;
  const block = model.block(stage, kind, chunk);
  const marks = (block ? model.instructions(stage, block) : []).map(({ view }): Mark | undefined => {
    const axis = axisOf(view.axes);
    return axis && { axis, lane: view.stream };
  });
  own.set(key, marks);
  return marks;
}

/** Returns the first axis that the name of a group contains: `dp*cp` → dp. */
export function axisOf(axes: string | undefined): Axis | undefined {
  if (axes === undefined) return undefined;
  const [first = ""] = axes.split(/[*/]/);
  return first in palette.value.axes ? (first as Axis) : "dp";
}

/** A canvas with one line of pixels for each row. */
let lines: HTMLCanvasElement | undefined;

/** Draws rows as the mean colour of each column of pixels: a line of pixels each, which is then stretched over the height of the row. */
function drawShares({ context, ratio }: Sheet, scale: TimeScale, rows: readonly Row[], colouring: Colouring): void {
  const width = Math.round(scale.width * ratio);
  if (rows.length === 0 || width <= 0) return;
  lines ??= document.createElement("canvas");
  if (lines.width !== width || lines.height < rows.length) {
    lines.width = width;
    lines.height = Math.max(rows.length, lines.height);
  }
  const image = new ImageData(width, rows.length);
  const pixels = new Uint32Array(image.data.buffer);
  for (const [n, { model, stage }] of rows.entries()) {
    const runs = model.runs[stage];
    if (runs) fillColumns(pixels.subarray(n * width, (n + 1) * width), width, scale, runs, { colouring, microbatches: count(model) });
  }
  lines.getContext("2d")?.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  for (const [n, { top, height }] of rows.entries()) context.drawImage(lines, 0, n, width, 1, scale.left, top, scale.width, height);
}

/** Writes the colours of one line of pixels: of each kind its share of the time of a column. */
function fillColumns(
  pixels: Uint32Array,
  width: number,
  scale: TimeScale,
  runs: StageRuns,
  { colouring, microbatches }: { readonly colouring: Colouring; readonly microbatches: number },
): void {
  const colours = palette.value;
  const idle = channels(colours.idle);
  const kinds = colours.kinds.map(channels);
  const each = (scale.to - scale.from) / width;
  const before = new Float64Array(kinds.length);
  let begun = runs.begunAt(scale.from);
  for (let k = 0; k < kinds.length; k++) before[k] = runs.busyUntil(k, scale.from, begun);
  for (let x = 0; x < width; x++) {
    const until = scale.from + (x + 1) * each;
    while (begun < runs.length && (runs.start[begun] ?? 0) <= until) begun++;
    let r = 0;
    let g = 0;
    let b = 0;
    let rest = 1;
    for (let k = 0; k < kinds.length; k++) {
      const now = runs.busyUntil(k, until, begun);
      const share = (now - (before[k] ?? 0)) / each;
      before[k] = now;
      if (share <= 0) continue;
      const near = Math.max(0, begun - 1);
      const colour =
        colouring === "microbatch" ? channels(microbatchColour(runs.microbatch[near] ?? 0, microbatches, k)) : (kinds[k] ?? idle);
      r += share * colour[0];
      g += share * colour[1];
      b += share * colour[2];
      rest -= share;
    }
    rest = Math.max(0, rest);
    pixels[x] = pixel(
      Math.min(255, Math.round(r + rest * idle[0])),
      Math.min(255, Math.round(g + rest * idle[1])),
      Math.min(255, Math.round(b + rest * idle[2])),
    );
  }
}
