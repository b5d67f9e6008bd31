/** Draws a schedule over time: every block run, or, if there are too many, the share of each kind over time and the first units in detail. */
import type { BlockRun } from "../../schemas/plan.ts";
import { countText, largest, plural, secondsText } from "../units.ts";
import { axis, type Drawn, LEFT, legend, ROW, round, text, tickStep, WIDE } from "./svg.ts";

/** One shade per chunk. */
const colours = {
  forward: ["#4c78a8", "#72a0cf", "#9ec0e3", "#c6dbf0"],
  backward: ["#54a24b", "#7cc074", "#a6d7a0", "#cdeac9"],
  weights: ["#e8973a", "#f2b370", "#f7cd9f", "#fbe4cb"],
  step: ["#9d9da1", "#9d9da1", "#9d9da1", "#9d9da1"],
} as const satisfies Record<BlockRun["kind"] | "step", readonly string[]>;
const kinds = Object.keys(colours) as (keyof typeof colours)[];

/** The most block runs that are drawn one by one: a picture stays below 200 kB. */
const MOST = 700;
/** The most columns of shares in an overview, over all stages. */
const COLUMNS = 2500;

/** A block run, or the step block, with its begin and end on the clock of the picture. */
export interface DrawnPiece {
  readonly run: Omit<BlockRun, "kind"> & { readonly kind: BlockRun["kind"] | "step" };
  readonly start: number;
  readonly end: number;
}
type StagePieces = readonly (readonly DrawnPiece[])[];

/** The clock of a picture: what its heading says, and a time and a range of times as text. */
export interface PictureClock {
  readonly heading: string;
  readonly time: (t: number) => string;
  readonly length: (t: number) => string;
  readonly range: (from: number, to: number) => string;
}
const inUnits: PictureClock = {
  heading: "schedule, in units of a forward block",
  time: countText,
  length: (t) => plural(t, "unit"),
  range: (from, to) => `units ${from} to ${to}`,
};
/** The clock of an estimate, whose times are in microseconds. */
export const inSeconds: PictureClock = {
  heading: "estimated schedule",
  time: (us) => secondsText(1e-6 * us),
  length: (us) => secondsText(1e-6 * us),
  range: (from, to) => `${secondsText(1e-6 * from)} to ${secondsText(1e-6 * to)}`,
};

/** Returns the parts of a picture that show a schedule. */
export function drawSchedulePieces(lanes: StagePieces, chunks: number, clock = inUnits): Drawn[] {
  const units = Math.max(
    1,
    largest(lanes, (lane) => lane.at(-1)?.end ?? 0),
  );
  const runs = lanes.reduce((sum, lane) => sum + lane.length, 0);
  const shown = kinds.filter((kind) => lanes.some((lane) => lane.some(({ run }) => run.kind === kind)));
  const key = shown.map(
    (kind) => [kind === "weights" ? "gradients of weights" : kind === "step" ? "optimizer step" : kind, colours[kind][0]] as const,
  );
  const head = (title: string): string[] => legend(title, key);
  const later = chunks > 1 ? "; later chunks are lighter" : "";
  if (runs <= MOST) return [under(head(`${clock.heading}${later}`), drawPieces(lanes, units, chunks, clock))];
  const first = firstUnits(lanes, units);
  return [
    under(head(`schedule: the share of ${clock.length(units)} that each kind takes`), drawShares(lanes, units, clock)),
    under(head(`the first ${clock.length(first.units)}${later}`), drawPieces(first.lanes, first.units, chunks, clock)),
  ];
}

/** Puts a heading above a part. */
const under = (head: readonly string[], { lines, height }: Drawn): Drawn => ({
  lines: [...head, '<g transform="translate(0 22)">', ...lines, "</g>"],
  height: height + 22,
});

/** What an axis of time needs. */
interface AxisOf {
  readonly stages: number;
  readonly units: number;
  readonly scale: number;
  readonly clock: PictureClock;
}

const stageName = (stage: number): string => text(10, stage * ROW + 14, `stage ${stage}`);

function withAxis(lines: readonly string[], { stages, units, scale, clock }: AxisOf): Drawn {
  const under = axis(units, tickStep(units, 20, 10), scale, stages * ROW, clock.time);
  return { lines: [...under.lines, ...lines], height: under.height };
}

function drawPieces(lanes: StagePieces, units: number, chunks: number, clock: PictureClock): Drawn {
  const unit = Math.min(40, WIDE / units);
  const piece = (stage: number, { run: { kind, microbatch, chunk, paired }, start, end }: DrawnPiece): string => {
    const [x, y, w] = [LEFT + start * unit, stage * ROW, (end - start) * unit];
    const what = `microbatch ${microbatch}${chunks > 1 ? `, chunk ${chunk}` : ""}: ${kind}, ${clock.range(start, end)}${paired ? "; alternates with the backward after it" : ""}`;
    const shade = chunk % colours[kind].length;
    const isWide = kind !== "step" && w > 7 * String(microbatch).length + 2;
    const label = isWide
      ? text(x + w / 2, y + 14, String(microbatch), `text-anchor="middle" class="${shade < 2 ? "on" : "on-light"}"`)
      : "";
    return `<g><title>${what}</title><rect x="${round(x)}" y="${y}" width="${round(w)}" height="${ROW - 3}" fill="${colours[kind][shade]}"/>${label}</g>`;
  };
  return withAxis(
    lanes.flatMap((all, stage) => [stageName(stage), ...all.map((p) => piece(stage, p))]),
    { stages: lanes.length, units, scale: unit, clock },
  );
}

/** Returns the block runs of the first units, as many as are drawn one by one. */
function firstUnits(lanes: StagePieces, units: number): { readonly lanes: StagePieces; readonly units: number } {
  let until = units;
  const before = (end: number): StagePieces => lanes.map((lane) => lane.filter((p) => p.end <= end));
  const count = (end: number): number => before(end).reduce((sum, lane) => sum + lane.length, 0);
  while (until > 8 && count(until) > MOST / 2) until = Math.ceil(until * 0.7);
  return { lanes: before(until), units: until };
}

/** Draws per stage and column the share of each kind, one above the other; what is left is idle. */
function drawShares(lanes: StagePieces, units: number, clock: PictureClock): Drawn {
  const columns = Math.max(20, Math.min(300, Math.floor(COLUMNS / lanes.length)));
  const width = WIDE / columns;
  const height = ROW - 3;
  const lines = lanes.flatMap((lane, stage) => {
    const shares = kinds.map(() => new Float64Array(columns));
    for (const { run, start, end } of lane) {
      const share = shares[kinds.indexOf(run.kind)];
      const [from, to] = [(start * columns) / units, (end * columns) / units];
      for (let c = Math.floor(from); share && c < Math.min(columns, Math.ceil(to)); c++)
        share[c] = (share[c] ?? 0) + Math.min(c + 1, to) - Math.max(c, from);
    }
    const base = new Float64Array(columns);
    const paths = kinds.flatMap((kind, k) => {
      const d = sharesPath(shares[k] ?? base, base, { width, height, y: stage * ROW });
      return d === "" ? [] : [`<path fill="${colours[kind][0]}" d="${d}"><title>stage ${stage}: ${kind}</title></path>`];
    });
    return [stageName(stage), ...paths];
  });
  return withAxis(lines, { stages: lanes.length, units, scale: WIDE / units, clock });
}

/** Returns the path of columns of one kind above `base`, and adds them to it. Equal neighbours are one rectangle. */
function sharesPath(share: Float64Array, base: Float64Array, { width, height, y }: { width: number; height: number; y: number }): string {
  const cells = Array.from(share, (s, c) => {
    const from = base[c] ?? 0;
    base[c] = Math.min(1, from + s);
    return { bottom: Math.round(10 * (y + height * (1 - from))) / 10, rise: Math.round(10 * height * Math.min(s, 1 - from)) / 10 };
  });
  let d = "";
  for (let c = 0; c < cells.length; ) {
    const cell = cells[c];
    let end = c + 1;
    while (end < cells.length && cells[end]?.bottom === cell?.bottom && cells[end]?.rise === cell?.rise) end++;
    if (cell && cell.rise > 0)
      d += `M${round(LEFT + c * width)} ${cell.bottom}h${round((end - c) * width)}v-${cell.rise}h-${round((end - c) * width)}z`;
    c = end;
  }
  return d;
}
