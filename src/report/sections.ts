/** Sections of `inspect`: mesh, communication, schedule, kernels. */
import type { Plan } from "../../schemas/plan.ts";
import { blocksOf, timesIn } from "../../schemas/program.ts";
import { buffersOf } from "../analysis/bufferTable.ts";
import { flopsOf } from "../analysis/cost.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { chunksPerStage } from "../analysis/stages.ts";
import { ops } from "../ops/index.ts";
import { groups } from "../passes/mesh.ts";
import { bytesText, countText, flopsText, percentOf, plural, ranges, rankList } from "../units.ts";
import type { AxisView, CollectiveView, Inspection, RoleView } from "./inspect.ts";
import { axesTable, meshLines, microbatchText } from "./overview.ts";
import { drawSchedule, drawStrips } from "./schedulePicture.ts";
import { bold, type Column, dim, fitLines, fitTable, labelled } from "./textLayout.ts";

/** Formats the mesh: all nodes, the axes, and the groups of each axis. */
export function printMeshSection(plan: Plan, view: Inspection, width: number): string[] {
  const most = 8;
  const listed = ({ axis, groups: count, size }: AxisView): string[] => {
    if (size === 1) return [];
    const all = groups(plan.mesh, [axis as Parameters<typeof groups>[1][number]]);
    const shown = all.slice(0, most).map((group) => `{${rankList(group)}}`);
    return ["", ...labelled(axis, `${shown.join(" ")}${count > most ? ` … ${countText(count - most)} more groups` : ""}`, width)];
  };
  return [...meshLines(plan, view, width, 64), ...axesTable(view.mesh.axes, width), ...view.mesh.axes.flatMap(listed), ""];
}

/** Formats the collectives and transfers of each stage by falling bytes, equal layers together. Stages with equal lists share one. */
export function printCommunication({ roles, mesh }: Inspection, most: number, width: number): string[] {
  const lists: { readonly lines: string[]; readonly stages: number[] }[] = [];
  for (const role of roles) {
    const lines = communicationOf(role, most, width);
    const same = lists.find((list) => list.lines.join("\n") === lines.join("\n"));
    if (same) same.stages.push(role.stage);
    else lists.push({ lines, stages: [role.stage] });
  }
  const listed = lists.flatMap(({ lines, stages }) => [bold(`stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`), ...lines, ""]);
  return [
    ...labelled("groups", "which ranks talk with one another, and on how many nodes they are", width),
    ...axesTable(mesh.axes, width),
    "",
    ...listed,
  ];
}

/** Returns the name of a collective with its stream, if it is asynchronous. */
const streamed = (name: string, { stream }: CollectiveView): string => (stream ? `${name}, stream ${stream}` : name);

/** A row of the table: what a rank of the stage sends or receives in a step. */
interface SentRow {
  readonly bytes: number;
  readonly number: number;
  /** Phase, name, axes or peer, nodes; and what needs it. */
  readonly cells: readonly [string, string, string, string];
  readonly each: number;
  readonly neededBy: string;
}

/** Names the other stage of a transfer, so that stages whose neighbours differ only in their numbers have equal rows. */
const peerText = (stage: number, peer: number): string =>
  peer === stage + 1 ? "next stage" : peer === stage - 1 ? "stage before" : `stage ${peer}`;

/** Returns the rows of transfers; those of equal layers are one. */
function transferRows({ stage, transfers }: RoleView): SentRow[] {
  const rows = new Map<string, SentRow>();
  for (const { phase, kind, peer, buffer, layer, bytes, per_step, across } of transfers) {
    const cells = [phase, kind, peerText(stage, peer), across > 0 ? "2" : "1"] as const;
    const neededBy = anyLayer(buffer, layer);
    const key = [...cells, bytes, neededBy].join("|");
    const before = rows.get(key);
    const number = (before?.number ?? 0) + per_step;
    rows.set(key, { cells, neededBy, number, bytes: number * bytes, each: bytes });
  }
  return [...rows.values()];
}

function communicationOf(role: RoleView, most: number, width: number): string[] {
  const columns: Column[] = [
    { head: "a step", right: true },
    { head: "phase" },
    { head: "collective" },
    { head: "axes" },
    { head: "nodes", right: true },
    { head: "number", right: true, drop: 3 },
    { head: "each", right: true, drop: 2 },
    { head: "needed by (job key)" },
  ];
  const collectives = role.collectives.map(
    (c): SentRow => ({
      ...{ bytes: c.bytes_per_step, number: c.per_step, each: c.bytes },
      cells: [c.phase, streamed(c.name, c), c.axes, countText(c.link.nodes)],
      neededBy: `${c.ops[0] ?? ""}${c.ops.length > 1 ? ` +${c.ops.length - 1}` : ""} (${c.path})`,
    }),
  );
  const rows = [...collectives, ...transferRows(role)].sort((a, b) => b.bytes - a.bytes);
  if (rows.length === 0) return ["  none: one rank"];
  const left = rows.slice(most);
  const bytes = left.reduce((sum, row) => sum + row.bytes, 0);
  const cells = ({ bytes, cells, number, each, neededBy }: SentRow): string[] => [
    ...[bytesText(bytes), ...cells, countText(number), bytesText(each), neededBy],
  ];
  return [
    ...fitTable(columns, rows.slice(0, most).map(cells), { width }),
    ...(left.length > 0 ? [dim(`  … ${countText(left.length)} more with ${bytesText(bytes)}; --top N shows them`)] : []),
  ];
}

/** Formats the schedule: the first and the last block runs, and the whole step with a column for many units where it is wider than the text. */
export function printScheduleSection(plan: Plan, { schedule, derived }: Inspection, width: number): string[] {
  const orders = plan.programs.map((program) => program.order);
  const chunks = chunksPerStage(plan);
  const label = `stage ${orders.length - 1} | `.length + 2;
  const room = Math.max(20, width - label);
  const drawn = drawSchedule(orders, chunks, room);
  const strips = drawStrips(orders, chunks, room);
  return [
    ...labelled(
      "schedule",
      `${microbatchText(derived.microbatches)}; ${schedule.legend}; ${countText(schedule.units)} units, bubble ${percentOf(schedule.bubble)}; - goes on, . is idle`,
      width,
    ),
    ...drawn.rows.map((row) => `  ${row}`),
    ...(strips.length > 0
      ? ["", ...labelled("all units", "a column is what fills most of its units; # several kinds, . idle", width), ...strips]
      : []),
    "",
  ];
}

/** Work of one kernel on a rank of each stage. */
export interface KernelWork {
  readonly id: string;
  readonly op: string;
  readonly dtypes: string;
  readonly sizes: Readonly<Record<string, number>>;
  /** Runs in a step, summed over the stages. */
  readonly per_step: number;
  readonly flops_per_step: number;
  readonly launches: number;
  readonly scratch: number;
}

/** Returns the kernels by falling work. */
export function kernelWork({ programs, kernels, mesh }: Plan): KernelWork[] {
  const work = new Map<string, { times: number; flops: number }>();
  for (const program of programs) {
    const buffers = buffersOf(program);
    for (const block of blocksOf(program)) {
      for (const i of block.instructions) {
        if (i.kind !== "compute") continue;
        const times = timesIn(program, block, i);
        const sum = work.get(i.kernel) ?? { times: 0, flops: 0 };
        work.set(i.kernel, sum);
        sum.times += times;
        sum.flops += times * flopsOf(ops[i.op], i, mesh, (id) => buffers.get(id));
      }
    }
  }
  return kernels
    .map(({ id, op, dtypes, sizes, launches, scratch }) => {
      const { times = 0, flops = 0 } = work.get(id) ?? {};
      return { id, op, dtypes, sizes, per_step: times, flops_per_step: flops, launches: launches.length, scratch };
    })
    .sort((a, b) => b.flops_per_step - a.flops_per_step || b.per_step - a.per_step);
}

/** Formats the kernels with the most work. */
export function printKernels(plan: Plan, most: number, width: number): string[] {
  const all = kernelWork(plan);
  const total = all.reduce((sum, k) => sum + k.flops_per_step, 0);
  const columns: Column[] = [
    { head: "flops", right: true },
    { head: "share", right: true },
    { head: "runs a step", right: true },
    { head: "types", drop: 2 },
    { head: "scratch", right: true, drop: 3 },
    { head: "sizes", drop: 1 },
    { head: "kernel" },
  ];
  const row = (k: KernelWork): string[] => [
    flopsText(k.flops_per_step),
    total > 0 ? `${((100 * k.flops_per_step) / total).toFixed(1)} %` : "",
    countText(k.per_step),
    [...new Set(k.dtypes.split("."))].join(" "),
    k.scratch > 0 ? bytesText(k.scratch) : "",
    Object.entries(k.sizes)
      .map(([name, size]) => `${name}=${size}`)
      .join(" "),
    k.id,
  ];
  return [
    ...fitLines(
      [`${bold("kernels")}   ${countText(all.length)}; flops of a step, a rank of each stage added up: ${flopsText(total)}`],
      width,
    ),
    ...fitTable(columns, all.slice(0, most).map(row), { width }),
    ...(all.length > most ? [dim(`  … ${plural(all.length - most, "kernel")}; --top N shows more`)] : []),
    "",
  ];
}
