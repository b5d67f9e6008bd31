/** The first screen of `inspect`: model, mesh, memory, communication, schedule and warnings in at most 40 lines of 80 columns. */
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import { memoryKinds, memoryNames } from "../analysis/memoryBreakdown.ts";
import { bytesText, countText, flopsText, largest, plural, ranges } from "../units.ts";
import { timeLines } from "./estimateView.ts";
import type { AxisView, Inspection, RoleView } from "./inspect.ts";
import { linkText } from "./links.ts";
import { bar, bold, type Column, dim, fitLines, fitTable, inPartColour, labelled, textWidth, warn, wrap } from "./textLayout.ts";

/** The lines of a screen. */
const LINES = 40;

/** A warning about a plan: the code of its rule, and what it found. */
export interface Warning {
  readonly code: string;
  readonly title: string;
  readonly found: string;
}

/** The letters of the parts of the memory in bars. */
const memoryLetters = { parameter: "P", gradient: "G", optimizer: "O", activation: "A", workspace: "W", scratch: "S" } as const;

/** Formats the first screen. With many stages or axes, tables are cut so that it has at most 40 lines of 80 columns. */
export function printOverview(plan: Plan, view: Inspection, warnings: readonly Warning[], width: number): string {
  let lines: string[] = [];
  for (const most of [8, 6, 5, 4, 3, 2]) {
    lines = [
      ...headLines(plan, view, width),
      "",
      ...meshLines(plan, view, width, most < 5 ? 2 : 3),
      ...axesTable(view.mesh.axes, width),
      "",
      ...memoryLines(view, width, most),
      "",
      ...communicationLines(view, width, most),
      "",
      ...scheduleLines(plan, view, width),
      ...timeLines(view.estimate, width),
      ...warnings.slice(0, most).map((warning) => warningLine(warning, width)),
      ...(warnings.length > most ? [`… and ${plural(warnings.length - most, "more warning")}`] : []),
      ...fitLines([dim("more: --time --mesh --memory --comms --schedule --kernels --rank R --op ID --why ID")], width),
    ];
    if (lines.length <= LINES) break;
  }
  return lines.join("\n");
}

/** Formats a warning on one line: its text is cut at a word, and left out where no word fits. */
function warningLine({ code, title, found }: Warning, width: number): string {
  const head = `${warn(`warning ${code}`)} ${title}`;
  if (textWidth(head) > width) return `${wrap(head, width - 2)[0] ?? ""} …`;
  const [first = "", ...more] = wrap(found, width - textWidth(head) - 4);
  if (textWidth(head) + textWidth(first) + 4 > width) return head;
  return `${head}: ${first}${more.length > 0 ? " …" : ""}`;
}

function headLines({ job }: Plan, { name, digest, rankc, target, derived }: Inspection, width: number): string[] {
  const { model, train } = job;
  const experts = model.moe ? `, ${model.moe.experts} experts top ${model.moe.top_k} of ${countText(model.moe.ffn)}` : "";
  const { microbatches, data, edp, local_experts } = derived;
  const split = model.moe ? `; ${plural(local_experts, "expert")} a rank, on ${plural(edp, "expert data rank")}` : "";
  return [
    ...wrap(`${bold(printable(name, 60))}  plan ${digest.slice(0, 16)}, rankc ${rankc}, target ${target}`, width),
    ...labelled(
      "model",
      `${countText(derived.parameters)} parameters: ${plural(model.layers, "layer")} of ${countText(model.hidden)}${experts}`,
      width,
    ),
    ...labelled(
      "step",
      `${plural(train.global_batch, "sequence")} of ${countText(model.seq)} = ${countText(derived.tokens_per_step)} tokens; ${plural(data, "data rank")} x ${microbatchText(microbatches)} of ${train.micro_batch}${split}`,
      width,
    ),
  ];
}

/** The mesh as a grid: a row for a node, a column for a GPU of it. Nodes in the middle are left out. */
export function meshLines({ mesh }: Plan, { mesh: m, device }: Inspection, width: number, most: number): string[] {
  const stages = m.world / m.per_stage;
  const head = `${plural(m.world, "rank")} on ${plural(m.nodes, "node")} of ${m.gpus_per_node} ${device.name}${stages > 1 ? `; ${stages} stages of ${m.per_stage}` : ""}`;
  const nodes = Array.from({ length: Math.ceil(m.world / m.gpus_per_node) }, (_, node) => node);
  const kept = nodes.length <= most ? nodes : [...nodes.slice(0, most - 1), nodes.length - 1];
  const digits = String(m.world - 1).length;
  const row = (node: number): string => {
    const from = node * m.gpus_per_node;
    const ranks = Array.from({ length: Math.min(m.gpus_per_node, m.world - from) }, (_, i) => from + i);
    const own = new Set(ranks.map((rank) => stageOfRank(mesh, rank)));
    const where = stages > 1 ? `  ${dim(`stage${own.size > 1 ? "s" : ""} ${ranges(own)}`)}` : "";
    const label = `  node ${String(node).padStart(String(nodes.length - 1).length)}  `;
    const cells = ranks.map((rank) => String(rank).padStart(digits)).join(" ");
    const fits = label.length + cells.length + 14 <= width;
    return `${label}${fits ? cells : `ranks ${from}..${from + ranks.length - 1}`}${where}`;
  };
  const rows = kept.map(row);
  if (kept.length < nodes.length) rows.splice(-1, 0, dim(`  … ${nodes.length - kept.length} nodes`));
  return [...labelled("mesh", head, width), ...rows];
}

/** The axes with more than one rank, and the links of their groups. */
export function axesTable(axes: readonly AxisView[], width: number): string[] {
  const columns: Column[] = [
    { head: "axis" },
    { head: "ranks", right: true },
    { head: "groups", right: true },
    { head: "first group" },
    { head: "links" },
  ];
  const list = (group: readonly number[]): string =>
    group.length > 4 ? `${group.slice(0, 3).join(",")},…,${group.at(-1)}` : group.join(",");
  const rows = axes
    .filter(({ size }) => size > 1)
    .map((a) => [
      `${axisNames[a.axis] ?? ""} ${a.axis}`.trim(),
      countText(a.size),
      countText(a.groups),
      list(a.first_group),
      `${linkText({ ranks: a.size, nodes: a.nodes })}${a.cross_nodes > 0 && a.cross_nodes < a.groups ? ` (${countText(a.cross_nodes)} groups)` : ""}`,
    ]);
  return rows.length === 0 ? ["  one rank: no groups"] : fitTable(columns, rows, { width });
}

/** Counts microbatches. */
export const microbatchText = (n: number): string => `${countText(n)} microbatch${n === 1 ? "" : "es"}`;

/** Returns the name of an axis, or of several, with its short form: `expert (ep)`, `tp*dp`. */
export const axisTitle = (axes: string): string => (axisNames[axes] ? `${axisNames[axes]} (${axes})` : axes);

const axisNames: Readonly<Record<string, string>> = {
  tp: "tensor",
  cp: "context",
  dp: "data",
  etp: "expert tensor",
  ep: "expert",
  edp: "expert data",
  pp: "pipeline",
};

/** Stages with equal memory share a row. */
function memoryLines({ roles, device }: Inspection, width: number, most: number): string[] {
  const equal = new Map<string, { readonly role: RoleView; readonly stages: number[] }>();
  for (const role of roles) {
    const key = JSON.stringify(role.memory);
    const same = equal.get(key);
    if (same) same.stages.push(role.stage);
    else equal.set(key, { role, stages: [role.stage] });
  }
  const rows = [...equal.values()];
  const fullest = [...rows].sort((a, b) => b.role.memory.peak - a.role.memory.peak).slice(0, rows.length > most ? most - 1 : most);
  const kept = rows.filter((row) => fullest.includes(row));
  const label = ({ stages }: (typeof rows)[number]): string => `stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`;
  const widest = largest(kept, (row) => label(row).length);
  const room = Math.max(10, width - widest - 28);
  // a job that fills a small part of the device has a scale of its own
  const top = largest(rows, ({ role }) => role.memory.peak);
  const scale = device.memory > 8 * top ? top : device.memory;
  const kinds = memoryKinds.filter((kind) => roles.some(({ memory }) => memory[kind] > 0));
  const key = kinds.map((kind) => inPartColour(memoryKinds.indexOf(kind), `${memoryLetters[kind]} ${memoryNames[kind]}`)).join(", ");
  const row = (one: (typeof rows)[number]): string => {
    const { memory } = one.role;
    const parts = memoryKinds.map((kind) => ({ letter: memoryLetters[kind], size: memory[kind] }));
    const text = `${label(one).padEnd(widest)}  ${bytesText(memory.peak).padStart(10)} ${((100 * memory.peak) / device.memory).toFixed(1).padStart(5)} %`;
    return `  ${memory.peak > device.memory ? warn(text) : text}  ${bar(parts, scale, room)}`;
  };
  const left = rows.length - kept.length;
  return [
    ...labelled(
      "memory",
      `a rank, of ${bytesText(device.memory)} (${device.name})${scale === device.memory ? "" : `; bars end at ${bytesText(scale)}`}`,
      width,
    ),
    ...fitLines([`  ${key}`], width),
    ...kept.map(row),
    ...(left > 0 ? [dim(`  … ${plural(left, "stage")} with less`)] : []),
  ];
}

/** What the ranks of a stage send over the links of one axis in a step. */
export interface AxisTraffic {
  readonly axes: string;
  /** The links in words. */
  readonly link: string;
  /** Names of the collectives, by falling bytes. */
  readonly what: readonly string[];
  readonly per_step: number;
  /** Mean bytes of a rank to ranks of its node, and to other nodes. */
  readonly inside: number;
  readonly across: number;
}

/** Returns the traffic of a stage by axes, by falling bytes. Transfers between stages are the axis pp; receives are not counted. */
export function trafficOf({ collectives, transfers }: RoleView): AxisTraffic[] {
  const sums = new Map<string, { link: string; what: Map<string, number>; per_step: number; inside: number; across: number }>();
  const add = (axes: string, link: string, name: string, times: number, bytes: number, across: number): void => {
    const sum = sums.get(axes) ?? { link, what: new Map(), per_step: 0, inside: 0, across: 0 };
    sums.set(axes, sum);
    sum.per_step += times;
    sum.inside += bytes * (1 - across);
    sum.across += bytes * across;
    sum.what.set(name, (sum.what.get(name) ?? 0) + bytes);
  };
  for (const c of collectives) add(c.axes, linkText(c.link), c.name, c.per_step, c.bytes_per_step, c.link.across);
  for (const t of transfers)
    if (t.kind === "send") add("pp", t.across > 0 ? "across nodes" : "inside a node", "send", t.per_step, t.bytes * t.per_step, t.across);
  return [...sums]
    .map(([axes, { what, ...sum }]) => ({ axes, ...sum, what: [...what].sort(([, a], [, b]) => b - a).map(([name]) => name) }))
    .sort((a, b) => b.inside + b.across - a.inside - a.across);
}

const sent = (rows: readonly AxisTraffic[]): number => rows.reduce((sum, t) => sum + t.inside + t.across, 0);

/** Returns the traffic of the stage that sends most. */
export function busiestTraffic({ roles }: Pick<Inspection, "roles">): { readonly stage: number; readonly rows: AxisTraffic[] } {
  const all = roles.map((role) => ({ stage: role.stage, rows: trafficOf(role) }));
  return all.sort((a, b) => sent(b.rows) - sent(a.rows))[0] ?? { stage: 0, rows: [] };
}

function communicationLines({ roles, device }: Inspection, width: number, most: number): string[] {
  const busiest = busiestTraffic({ roles });
  if (busiest.rows.length === 0) return [`${bold("traffic")}   none`];
  const kept = busiest.rows.length > most ? busiest.rows.slice(0, most - 1) : busiest.rows;
  const rest = busiest.rows.slice(kept.length);
  const columns: Column[] = [
    { head: "axes" },
    { head: "inside a node", right: true },
    { head: "across nodes", right: true },
    { head: "a step", right: true, drop: 1 },
    { head: "links", drop: 2 },
    { head: "collectives" },
  ];
  const bytes = (n: number): string => (n < 1 ? "-" : bytesText(Math.round(n)));
  const row = (t: AxisTraffic): string[] => [t.axes, bytes(t.inside), bytes(t.across), countText(t.per_step), t.link, shortList(t.what)];
  const restText = rest.length > 0 ? `, and ${bytesText(Math.round(sent(rest)))} over other axes` : "";
  const where = roles.length > 1 ? `of stage ${busiest.stage}, which sends most` : `on ${device.name}`;
  return [
    ...fitLines([`${bold("traffic")}   a rank ${where}, in a step: ${bytesText(Math.round(sent(busiest.rows)))}${restText}`], width),
    ...fitTable(columns, kept.map(row), { width }),
  ];
}

const shortList = (names: readonly string[]): string => `${names.slice(0, 2).join(", ")}${names.length > 2 ? ` +${names.length - 2}` : ""}`;

function scheduleLines({ job }: Plan, { roles, schedule, kernels, derived }: Inspection, width: number): string[] {
  const chunks = roles[0]?.chunks.length ?? 1;
  const name =
    roles.length === 1 ? "no pipeline" : `${job.parallel.schedule}, ${roles.length} stages${chunks > 1 ? ` x ${chunks} chunks` : ""}`;
  const most = largest(roles, ({ flops }) => flops.per_step);
  const syncs = largest(roles, (role) => role.host_syncs_per_step);
  return [
    ...labelled("schedule", `${name}, ${microbatchText(derived.microbatches)}: bubble ${(100 * schedule.bubble).toFixed(1)} %`, width),
    ...labelled(
      "compute",
      `${flopsText(most)} a step on the busiest rank; ${plural(kernels, "kernel")}; ${syncs === 0 ? "no host syncs" : `${countText(syncs)} host syncs a step`}`,
      width,
    ),
  ];
}
