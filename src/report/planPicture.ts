/** Draws a plan as an SVG: the schedule of each stage over time, the memory of each stage, and what a rank sends over each link. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { devices } from "../../schemas/devices.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { estimate } from "../analysis/estimate/estimate.ts";
import { type MemoryKind, memoryBreakdown, memoryKinds, memoryNames } from "../analysis/memoryBreakdown.ts";
import { chunksPerStage, stagesOf } from "../analysis/stages.ts";
import { bubbleOf, timesOf } from "../passes/schedule.ts";
import { bytesText, largest, plural } from "../units.ts";
import { inspectPlan } from "./inspect.ts";
import { axisTitle, busiestTraffic } from "./overview.ts";
import { type DrawnPiece, drawSchedulePieces, inSeconds } from "./schedulePieces.ts";
import { axis, type Drawn, LEFT, legend, page, ROW, round, type Theme, text, tickStep, WIDE } from "./svg.ts";

const memoryColours: Readonly<Record<MemoryKind, string>> = {
  parameter: "#4c78a8",
  gradient: "#54a24b",
  optimizer: "#e8973a",
  activation: "#b279a2",
  workspace: "#9d9da1",
  scratch: "#d6a5c9",
};
const linkColours = { inside: "#4c78a8", across: "#e45756" } as const;

/** Returns the SVG text of a plan. With a device profile the schedule is drawn in seconds, else in units of a forward block. */
export function drawPlan(plan: Plan, theme: Theme = "auto", profile?: DeviceProfile): string {
  const chunks = chunksPerStage(plan);
  const lanes = timesOf(
    plan.programs.map((p) => p.order),
    chunks,
  );
  const { name, parallel } = plan.job;
  const bubble = (100 * bubbleOf(lanes)).toFixed(1);
  const title = `${printable(name)}: ${parallel.schedule}, ${plural(lanes.length, "stage")}${chunks > 1 ? ` of ${chunks} chunks` : ""}, bubble ${bubble} %`;
  const schedule = profile ? drawSchedulePieces(timedLanes(plan, profile), chunks, inSeconds) : drawSchedulePieces(lanes, chunks);
  return page(title, [...schedule, drawMemory(plan), ...drawTraffic(plan)], theme);
}

/** The block runs of an estimated step in microseconds, and the step block behind them. */
const timedLanes = (plan: Plan, profile: DeviceProfile): DrawnPiece[][] =>
  estimate(plan, { profile }).simulation.stages.map(({ runs, stepTimes }) => {
    const end = largest(stepTimes, (t) => t);
    const from = runs.at(-1)?.end ?? 0;
    const step = { run: { kind: "step", microbatch: 0, chunk: 0 } as const, start: 1e6 * from, end: 1e6 * Math.max(from, end) };
    return [...runs.map(({ run, start, end: to }) => ({ run, start: 1e6 * start, end: 1e6 * to })), step];
  });

/** Draws horizontal bars with an axis in bytes. */
function drawBars(
  head: readonly string[],
  bars: readonly {
    readonly name: string;
    readonly parts: readonly { readonly what: string; readonly size: number; readonly colour: string }[];
  }[],
  end: number,
): Drawn {
  const scale = WIDE / Math.max(1, end);
  const rows = bars.flatMap(({ name, parts }, i) => {
    let x = LEFT;
    const rects = parts.map(({ what, size, colour }) => {
      const w = size * scale;
      const rect = `<g><title>${what} ${bytesText(Math.round(size))}</title><rect x="${round(x)}" y="${i * ROW}" width="${round(w)}" height="${ROW - 3}" fill="${colour}"/></g>`;
      x += w;
      return rect;
    });
    const sum = parts.reduce((n, { size }) => n + size, 0);
    return [text(10, i * ROW + 14, name), ...rects, text(x + 6, i * ROW + 14, bytesText(Math.round(sum)))];
  });
  const below = axis(end, tickStep(end, 16, 2), scale, bars.length * ROW, bytesText);
  return { lines: [...head, '<g transform="translate(0 22)">', ...below.lines, ...rows, "</g>"], height: below.height + 22 };
}

function drawMemory(plan: Plan): Drawn {
  const { device } = plan.job.cluster;
  const room = devices[device].memory;
  const stages = stagesOf(plan);
  const fullest = largest(stages, ({ memory }) => memory.peak);
  // keep bars visible if the job uses a small part of the device
  const isLimitShown = room < 4 * fullest;
  const end = Math.max(fullest, isLimitShown ? room : 0);
  const bars = stages.map(({ program, memory }) => {
    const sizes = memoryBreakdown(program, memory);
    return {
      name: `stage ${memory.stage}`,
      parts: memoryKinds.map((kind) => ({ what: memoryNames[kind], size: sizes[kind], colour: memoryColours[kind] })),
    };
  });
  const key = memoryKinds.map((kind) => [memoryNames[kind], memoryColours[kind]] as const);
  const title = `memory of a rank${isLimitShown ? "" : `; ${device} has ${bytesText(room)}`}`;
  const { lines, height } = drawBars(legend(title, key), bars, end);
  if (!isLimitShown) return { lines, height };
  const x = round(LEFT + (room * WIDE) / end);
  const limit = `<path class="limit" stroke-width="2" d="M${x} 18V${height - 18}"/>`;
  return { lines: [...lines, limit, text(x - 4, 12, `${device}: ${bytesText(room)}`, 'text-anchor="end" class="limit-text"')], height };
}

/** Draws what a rank of the stage that sends most sends in a step, by axes and links. */
function drawTraffic(plan: Plan): Drawn[] {
  const { stage, rows } = busiestTraffic(inspectPlan(plan));
  if (rows.length === 0) return [];
  const bars = rows.slice(0, 8).map(({ axes, inside, across }) => ({
    name: axisTitle(axes).replace(/^.*\((.*)\)$/, "$1"),
    parts: [
      { what: `${axisTitle(axes)}: inside a node`, size: inside, colour: linkColours.inside },
      { what: `${axisTitle(axes)}: across nodes`, size: across, colour: linkColours.across },
    ],
  }));
  const key = [["inside a node", linkColours.inside] as const, ["across nodes", linkColours.across] as const];
  const end = largest(rows, ({ inside, across }) => inside + across);
  return [drawBars(legend(`bytes that a rank of stage ${stage} sends in a step`, key), bars, end)];
}
