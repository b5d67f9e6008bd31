/** The estimate of a plan as data, for the JSON of `inspect`, and as lines. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Plan } from "../../schemas/plan.ts";
import { type AxisTime, type ClassTime, type Estimate, estimate, type StageTime } from "../analysis/estimate/estimate.ts";
import { kernelParts } from "../analysis/estimate/timedBlocks.ts";
import { bytesText, countText, percentOf, ranges, rateText, secondsText } from "../units.ts";
import { bold, type Column, dim, fitLines, fitTable, labelled } from "./textLayout.ts";

/** Seconds of a stage in a step. They add up to the step. */
export interface StageTimeView {
  readonly stage: number;
  readonly kernels: StageTime["parts"]["kernels"];
  /** Where kernels wait for communication, by axes. */
  readonly exposed: Readonly<Record<string, number>>;
  readonly launches: number;
  readonly bubble: number;
  readonly communication: readonly AxisTime[];
  readonly classes: readonly ClassTime[];
}

/** The estimate of a step. */
export interface EstimateView extends Omit<Estimate, "simulation" | "stages"> {
  readonly stages: readonly StageTimeView[];
}

/** Estimates a plan; undefined without a profile. */
export function estimateView(plan: Plan, profile: DeviceProfile | undefined, imbalance = 1): EstimateView | undefined {
  if (!profile) return undefined;
  const { simulation: _, stages, ...rest } = estimate(plan, { profile, imbalance });
  return {
    ...rest,
    stages: stages.map(({ stage, parts: { kernels, exposed, launches, bubble }, communication, classes }) => ({
      ...{ stage, kernels, exposed: Object.fromEntries(exposed), launches, bubble, communication, classes },
    })),
  };
}

/** A part of a stage's time: a name in words, and seconds. */
interface NamedPart {
  readonly name: string;
  readonly seconds: number;
}

/** Returns the parts of a stage's time that are not empty, the longest first. */
export const namedParts = ({
  kernels,
  exposed,
  launches,
  bubble,
}: Omit<StageTimeView, "communication" | "classes" | "stage">): NamedPart[] =>
  [
    ...kernelParts.map((name) => ({ name, seconds: kernels[name] })),
    ...Object.entries(exposed).map(([axes, seconds]) => ({ name: `waits for ${axes}`, seconds })),
    { name: "launches", seconds: launches },
    { name: "bubble", seconds: bubble },
  ]
    .filter(({ seconds }) => seconds > 0)
    .sort((a, b) => b.seconds - a.seconds);

/** Returns the lines of the first screen: seconds of a step, and what those of the busiest stage are made of. */
export function timeLines(view: EstimateView | undefined, width: number): string[] {
  if (!view) return [];
  const busiest = view.stages.find(({ stage }) => stage === view.busiest);
  const parts = busiest ? namedParts(busiest) : [];
  const shown = parts.filter(({ seconds }) => seconds >= 0.005 * view.seconds).slice(0, 7);
  const stage = view.stages.length > 1 ? `stage ${view.busiest}: ` : "";
  return [
    ...headLines(view, width),
    ...fitLines([`  ${stage}${shown.map(({ name, seconds }) => `${name} ${percentOf(seconds / view.seconds)}`).join(", ")}`], width),
  ];
}

/** Returns the lines of the seconds of a step, its tokens and its flops. */
export const headLines = (view: EstimateView, width: number): string[] =>
  labelled(
    "time",
    `${secondsText(view.seconds)} a step (${secondsText(view.range[0])} to ${secondsText(view.range[1])}), ${countText(Math.round(view.tokens_per_second))} tokens/s, ${rateText(view.model_flops_per_second)} a GPU, ${percentOf(view.of_peak)} of peak`,
    width,
  );

/** Returns the lines of `inspect --time`: the parts of each stage, communication by axes, and where the figures come from. */
export function printTimeSection(view: EstimateView | undefined, width: number): string[] {
  if (!view) return labelled("time", "the device of the job has no profile; name one with --device", width);
  const { profile, sources } = view;
  return [
    ...headLines(view, width),
    ...fitLines(
      [
        `  ${dim(
          `by the profile ${profile.name} (${profile.device}, ${profile.stack}): of the kernels' time ${percentOf(sources.measured)} was measured at these shapes, ${percentOf(sources.interpolated)} near them, ${percentOf(sources.law)} follows from laws`,
        )}`,
      ],
      width,
    ),
    "",
    ...stageTable(view, width),
    "",
    ...axesTable(view, width),
    "",
    ...classTable(view, width),
    "",
  ];
}

/** Stages with equal rows share one. */
function stageTable(view: EstimateView, width: number): string[] {
  const names = [...new Set(view.stages.flatMap((s) => namedParts(s).map(({ name }) => name)))];
  const sum = (name: string): number => view.stages.reduce((all, s) => all + secondsOf(s, name), 0);
  const columns = names.sort((a, b) => sum(b) - sum(a));
  const cells = (stage: StageTimeView): string[] => columns.map((name) => secondsText(secondsOf(stage, name)));
  const rows: { readonly stages: number[]; readonly cells: string[] }[] = [];
  for (const stage of view.stages) {
    const own = cells(stage);
    const same = rows.find((row) => row.cells.join() === own.join());
    if (same) same.stages.push(stage.stage);
    else rows.push({ stages: [stage.stage], cells: own });
  }
  // a row for a part and a column for a stage: parts are many, and distinct stages few
  const kept = rows.length > 5 ? [...rows.slice(0, 3), ...rows.slice(-1)] : rows;
  const head: Column[] = [
    { head: "of a step" },
    ...kept.map(({ stages }) => ({ head: `stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`, right: true as const })),
  ];
  const body = columns.map((name, c) => [name, ...kept.map((row) => row.cells[c] ?? "")]);
  return [bold("time of a rank"), ...fitTable(head, body, { width })];
}

const secondsOf = (stage: StageTimeView, name: string): number => namedParts(stage).find((part) => part.name === name)?.seconds ?? 0;

function axesTable(view: EstimateView, width: number): string[] {
  const busiest = view.stages.find(({ stage }) => stage === view.busiest);
  if (!busiest || busiest.communication.length === 0) return ["communication: none"];
  const columns: Column[] = [
    { head: "axes" },
    { head: "communication", right: true },
    { head: "exposed", right: true },
    { head: "hidden", right: true },
  ];
  const rows = busiest.communication.map(({ axes, total, exposed }) => [
    axes,
    secondsText(total),
    secondsText(exposed),
    total > 0 ? percentOf(Math.max(0, 1 - exposed / total)) : "",
  ]);
  const where = view.stages.length > 1 ? ` on stage ${view.busiest}, which waits least` : "";
  return [bold(`communication${where}`), ...fitTable(columns, rows, { width })];
}

/** Formats collectives of one name, axes and stream: what they send, how long that takes, and what of it is not hidden under kernels. */
function classTable(view: EstimateView, width: number): string[] {
  const busiest = view.stages.find(({ stage }) => stage === view.busiest);
  if (!busiest || busiest.classes.length === 0) return [];
  const columns: Column[] = [
    { head: "collective" },
    { head: "axes" },
    { head: "stream", drop: 1 },
    { head: "sent", right: true },
    { head: "time", right: true, drop: 2 },
    { head: "hidden", right: true },
    { head: "exposed", right: true },
  ];
  const rows = busiest.classes.map(({ name, axes, stream, bytes, total, exposed }) => [
    ...[name, axes, stream ?? "in order", bytesText(bytes), secondsText(total)],
    ...[secondsText(total - exposed > 1e-9 * total ? total - exposed : 0), secondsText(exposed)],
  ]);
  return [bold("collectives of a step, hidden under kernels and exposed"), ...fitTable(columns, rows, { width })];
}

/** Names a class of communication. */
export const classText = ({ name, axes, stream }: Pick<ClassTime, "name" | "axes" | "stream">): string =>
  `${name} ${axes}${stream ? `, stream ${stream}` : ""}`;

/** How many activities a line names. */
const NAMED = 4;

/** Returns what the compute stream does while communication runs: the longest activities, and the sum of the others. */
function underText(under: ClassTime["under"]): string {
  const all = Object.entries(under);
  const [named, others] = [all.slice(0, NAMED), all.slice(NAMED)];
  const rest = others.reduce((sum, [, seconds]) => sum + seconds, 0);
  return [
    ...named.map(([activity, seconds]) => `${activity} ${secondsText(seconds)}`),
    ...(others.length > 0 ? [`${countText(others.length)} more ${secondsText(rest)}`] : []),
  ].join(", ");
}

/** Formats the communication of the stage that waits least by class, and under what each is hidden; none without an estimate. */
export function printHidden(view: EstimateView | undefined, width: number): string[] {
  const busiest = view?.stages.find(({ stage }) => stage === view.busiest);
  if (!view || !busiest || busiest.classes.length === 0) return [];
  const hidden = busiest.classes.filter(({ under }) => Object.keys(under).length > 0);
  const lines = hidden.map((own) => `  ${classText(own)}: ${underText(own.under)}`);
  const where = view.stages.length > 1 ? ` on stage ${view.busiest}, which waits least` : "";
  return [
    ...classTable(view, width),
    "",
    bold(`what runs on the compute stream meanwhile${where}`),
    ...(lines.length > 0 ? fitLines(lines, width) : ["  nothing: all communication is exposed"]),
    "",
  ];
}
