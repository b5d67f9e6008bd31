/** Draws a plan as an SVG: the schedule of each stage over time, and the memory of each stage. */
import { devices } from "../../schemas/devices.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { type MemoryKind, memoryBreakdown, memoryKinds, memoryNames } from "../analysis/memoryBreakdown.ts";
import { chunksPerStage, stagesOf } from "../analysis/stages.ts";
import { bubbleOf, durationOf, type Piece, timesOf } from "../passes/schedule.ts";
import { bytesText, plural } from "../units.ts";

const LEFT = 90;
const ROW = 22;
const WIDE = 1500;

/** One shade per chunk. */
const colours = {
  forward: ["#4c78a8", "#72a0cf", "#9ec0e3", "#c6dbf0"],
  backward: ["#54a24b", "#7cc074", "#a6d7a0", "#cdeac9"],
  weights: ["#e8973a", "#f2b370", "#f7cd9f", "#fbe4cb"],
} as const;
const memoryColours: Readonly<Record<MemoryKind, string>> = {
  parameter: "#4c78a8",
  gradient: "#54a24b",
  optimizer: "#e8973a",
  activation: "#b279a2",
  workspace: "#9d9da1",
  scratch: "#d6a5c9",
};

/** Returns the SVG text of a plan. */
export function drawPlan(plan: Plan): string {
  const chunks = chunksPerStage(plan);
  const lanes = timesOf(
    plan.programs.map((p) => p.order),
    chunks,
  );
  const schedule = drawTime(lanes, chunks);
  const memory = drawMemory(plan);
  const { name, parallel, cluster } = plan.job;
  const { device } = cluster;
  const bubble = (100 * bubbleOf(lanes)).toFixed(1);
  const top = 60;
  const between = top + schedule.height + 60;
  const title = `${printable(name)}: ${parallel.schedule}, ${plural(lanes.length, "stage")}${chunks > 1 ? ` of ${chunks} chunks` : ""}, bubble ${bubble} %`;
  const key = Object.keys(colours).filter((kind) => lanes.flat().some(({ run }) => run.kind === kind)) as (keyof typeof colours)[];
  const width = LEFT + WIDE + 130;
  const height = between + memory.height + 20;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="11">`,
    `<title>${escaped(title)}</title>`,
    `<rect width="${width}" height="${height}" fill="white"/>`,
    text(10, 22, title, 'font-size="15"'),
    ...legend(
      key.map((kind) => [kind === "weights" ? "gradients of weights" : kind, colours[kind][0]]),
      44,
    ),
    `<g transform="translate(0 ${top})">`,
    ...schedule.lines,
    "</g>",
    text(10, between - 26, `memory of a rank; ${device} has ${bytesText(devices[device].memory)}`, 'font-size="15"'),
    ...legend(
      memoryKinds.map((kind) => [memoryNames[kind], memoryColours[kind]]),
      between - 8,
    ),
    `<g transform="translate(0 ${between})">`,
    ...memory.lines,
    "</g>",
    "</svg>",
    "",
  ].join("\n");
}

interface Drawn {
  readonly lines: readonly string[];
  readonly height: number;
}

function drawTime(lanes: readonly (readonly Piece[])[], chunks: number): Drawn {
  const units = Math.max(1, durationOf(lanes));
  const unit = Math.min(40, WIDE / units);
  const lane = (stage: number, { run: { kind, microbatch, chunk }, start, end }: Piece): string => {
    const [x, y, w] = [LEFT + start * unit, stage * ROW, (end - start) * unit];
    const what = `microbatch ${microbatch}${chunks > 1 ? `, chunk ${chunk}` : ""}: ${kind}, units ${start} to ${end}`;
    const label =
      w > 7 * String(microbatch).length + 2 ? text(x + w / 2, y + 14, String(microbatch), 'text-anchor="middle" fill="white"') : "";
    const colour = colours[kind][chunk % colours[kind].length];
    return `<g><title>${what}</title><rect x="${round(x)}" y="${y}" width="${round(w)}" height="${ROW - 3}" fill="${colour}"${w > 4 ? ' stroke="white" stroke-width="0.5"' : ""}/>${label}</g>`;
  };
  return {
    lines: lanes.flatMap((all, stage) => [text(10, stage * ROW + 14, `stage ${stage}`), ...all.map((p) => lane(stage, p))]),
    height: lanes.length * ROW,
  };
}

function drawMemory(plan: Plan): Drawn {
  const bars = stagesOf(plan).map(({ program, memory }) => ({
    ...{ stage: memory.stage, peak: memory.peak, parts: memoryBreakdown(program, memory) },
  }));
  const room = devices[plan.job.cluster.device].memory;
  const fullest = bars.reduce((most, { peak }) => Math.max(most, peak), 0);
  // keep bars visible if the job uses a small part of the device
  const shown = room < 4 * fullest;
  const scale = WIDE / Math.max(fullest, shown ? room : 0);
  const bar = ({ stage, peak, parts }: (typeof bars)[number], i: number): string[] => {
    let x = LEFT;
    const rects = memoryKinds.map((kind) => {
      const w = parts[kind] * scale;
      const rect = `<g><title>${memoryNames[kind]} ${bytesText(parts[kind])}</title><rect x="${round(x)}" y="${i * ROW}" width="${round(w)}" height="${ROW - 3}" fill="${memoryColours[kind]}"/></g>`;
      x += w;
      return rect;
    });
    return [text(10, i * ROW + 14, `stage ${stage}`), ...rects, text(x + 6, i * ROW + 14, bytesText(peak))];
  };
  const line = round(LEFT + room * scale);
  const height = bars.length * ROW;
  return {
    lines: [
      ...bars.flatMap(bar),
      ...(shown
        ? [
            `<g><title>${bytesText(room)}</title><line x1="${line}" y1="-4" x2="${line}" y2="${height}" stroke="#d62728" stroke-width="2"/></g>`,
          ]
        : []),
    ],
    height,
  };
}

const legend = (entries: readonly (readonly [name: string, colour: string])[], y: number): string[] =>
  entries.flatMap(([name, colour], i) => [
    `<rect x="${LEFT + i * 150}" y="${y - 10}" width="12" height="12" fill="${colour}"/>`,
    text(LEFT + i * 150 + 18, y, name),
  ]);

const escapes: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (words: string): string => words.replace(/[&<>"]/g, (c) => escapes[c] ?? c);
const text = (x: number, y: number, words: string, more = ""): string =>
  `<text x="${round(x)}" y="${round(y)}"${more ? ` ${more}` : ""}>${escaped(words)}</text>`;
const round = (n: number): number => Number(n.toFixed(2));
