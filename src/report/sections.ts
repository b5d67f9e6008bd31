/** Sections of `inspect`: mesh, communication, schedule, kernels. */
import type { Plan } from "../../schemas/plan.ts";
import { blocksOf, timesIn } from "../../schemas/program.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { flopsOf } from "../analysis/cost.ts";
import { chunksPerStage } from "../analysis/stages.ts";
import { ops } from "../ops/index.ts";
import { groups } from "../passes/mesh.ts";
import { bytesText, countText, flopsText, plural, ranges } from "../units.ts";
import { type AxisView, type CollectiveView, type Inspection, type RoleView, withRelativeLayers } from "./inspect.ts";
import { axesTable, meshLines, microbatchText } from "./overview.ts";
import { drawSchedule } from "./schedulePicture.ts";
import { bold, type Column, dim, fitLines, fitTable, labelled } from "./textLayout.ts";

/** Formats the mesh: all nodes, the axes, and the groups of each axis. */
export function printMeshSection(plan: Plan, view: Inspection, width: number): string[] {
  const most = 8;
  const listed = ({ axis, groups: count, size }: AxisView): string[] => {
    if (size === 1) return [];
    const all = groups(plan.mesh, [axis as Parameters<typeof groups>[1][number]]);
    const shown = all.slice(0, most).map((group) => `{${stepped(group)}}`);
    return ["", ...labelled(axis, `${shown.join(" ")}${count > most ? ` … ${countText(count - most)} more groups` : ""}`, width)];
  };
  return [...meshLines(plan, view, width, 64), ...axesTable(view.mesh.axes, width), ...view.mesh.axes.flatMap(listed), ""];
}

/** Returns ranks at even distances as `0..14 by 2`. */
function stepped(group: readonly number[]): string {
  const [first = 0, second = first + 1] = group;
  const step = second - first;
  const isEven = group.length > 4 && group.every((rank, i) => rank === first + i * step);
  return isEven ? `${first}..${group.at(-1)}${step > 1 ? ` by ${step}` : ""}` : group.join(",");
}

/** Formats the collectives and transfers of each stage by falling bytes. Stages that differ only in their layers are one list. */
export function printCommunication({ roles, mesh }: Inspection, most: number, width: number): string[] {
  const lists: { readonly lines: string[]; readonly form: string; readonly stages: number[] }[] = [];
  for (const role of roles) {
    const lines = communicationOf(role, most, width);
    const form = communicationOf(withRelativeLayers(role), most, width).join("\n");
    const same = lists.find((list) => list.form === form);
    if (same) same.stages.push(role.stage);
    else lists.push({ lines, form, stages: [role.stage] });
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

function communicationOf({ collectives, transfers }: RoleView, most: number, width: number): string[] {
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
  const row = (c: CollectiveView): string[] => [
    bytesText(c.bytes_per_step),
    c.phase,
    streamed(c.name, c),
    c.axes,
    countText(c.link.nodes),
    countText(c.per_step),
    bytesText(c.bytes),
    `${c.ops[0] ?? ""}${c.ops.length > 1 ? ` +${c.ops.length - 1}` : ""} (${c.path})`,
  ];
  const sent = [...collectives].sort((a, b) => b.bytes_per_step - a.bytes_per_step);
  const left = sent.slice(most);
  const bytes = left.reduce((sum, c) => sum + c.bytes_per_step, 0);
  const moves = transfers.map((t) => [
    bytesText(t.bytes * t.per_step),
    t.phase,
    t.kind,
    `stage ${t.peer}`,
    t.across > 0 ? "2" : "1",
    countText(t.per_step),
    bytesText(t.bytes),
    t.buffer,
  ]);
  if (sent.length === 0 && moves.length === 0) return ["  none: one rank"];
  return [
    ...fitTable(columns, [...sent.slice(0, most).map(row), ...moves], { width }),
    ...(left.length > 0 ? [dim(`  … ${plural(left.length, "collective")} with ${bytesText(bytes)}; --top N shows more`)] : []),
  ];
}

/** Formats the schedule, cut in the middle to fit the width. */
export function printScheduleSection(plan: Plan, { schedule, derived }: Inspection, width: number): string[] {
  const orders = plan.programs.map((program) => program.order);
  const label = `stage ${orders.length - 1} | `.length + 2;
  const drawn = drawSchedule(orders, chunksPerStage(plan), Math.max(20, width - label));
  return [
    ...labelled(
      "schedule",
      `${microbatchText(derived.microbatches)}; ${schedule.legend}; ${countText(schedule.units)} units, bubble ${(100 * schedule.bubble).toFixed(1)} %`,
      width,
    ),
    ...drawn.rows.map((row) => `  ${row}`),
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
    const buffers = new BufferTable(program.buffers);
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
