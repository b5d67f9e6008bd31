/** Text of the summary of a plan, for `inspect`. */
import { printable } from "../../schemas/printable.ts";
import { memoryKinds, memoryNames } from "../analysis/memoryBreakdown.ts";
import { bytesText, countText, flopsText, plural, ranges, table } from "../units.ts";
import { type AxisView, type CollectiveView, type Inspection, type RoleView, type TransferView, withRelativeLayers } from "./inspect.ts";

/** Formats the summary of a plan as text. */
export function printInspect(view: Inspection): string {
  return [...printHead(view), "", ...printMemory(view), "", ...printRoles(view), ...printSchedule(view), ""].join("\n");
}

/** Formats name, digest, mesh and kernels. */
export function printHead({ name, digest, rankc, target, mesh, derived, kernels }: Inspection): string[] {
  const axis = ({ axis, grid, size, groups: n, cross_nodes, first_group }: AxisView): string[] => [
    axis,
    grid,
    countText(size),
    plural(n, "group"),
    `${first_group.length > 8 ? `${first_group.slice(0, 4).join(",")},…,${first_group.at(-1)}` : first_group.join(",")}`,
    size === 1 ? "" : cross_nodes === 0 ? "inside a node" : cross_nodes === n ? "all cross nodes" : `${cross_nodes} cross nodes`,
  ];
  const experts =
    derived.local_experts > 0 ? `, ${plural(derived.local_experts, "expert")} on a rank, expert-data (edp) ${derived.edp}` : "";
  return [
    `${printable(name)}: plan ${digest.slice(0, 16)}, rankc ${rankc}, target ${target}`,
    "",
    `mesh: ${plural(mesh.world, "rank")} on ${plural(mesh.nodes, "node")} of ${mesh.gpus_per_node}, ${mesh.per_stage} in a stage`,
    ...table([["axis", "grid", "size", "groups", "first", ""], ...mesh.axes.map(axis)], [2]),
    `derived: data ${derived.data}${experts}, ${plural(derived.microbatches, "microbatch").replace(/hs$/, "hes")} and ${countText(derived.tokens_per_step)} tokens a step`,
    ...rampText(derived),
    `model: ${countText(derived.parameters)} parameters; ${plural(kernels, "kernel")}`,
  ];
}

function rampText({ ramp_up }: Inspection["derived"]): string[] {
  if (ramp_up.length === 0) return [];
  const text = ({ batch, steps }: (typeof ramp_up)[number]) => `${countText(batch)} for ${plural(steps, "step")}`;
  const [shown, last] = [ramp_up.slice(0, 3), ramp_up.slice(3).slice(-1)];
  const more = ramp_up.length > 4 ? ["…"] : [];
  const steps = ramp_up.reduce((sum, p) => sum + p.steps, 0);
  return [`ramp-up: ${[...shown.map(text), ...more, ...last.map(text)].join(", ")}: ${plural(steps, "step")} before the batch is whole`];
}

/** Formats the memory of each stage as a table. */
export function printMemory({ roles, device }: Inspection): string[] {
  // omit the scratch column if no kernel needs scratch
  const kinds = memoryKinds.filter((kind) => kind !== "scratch" || roles.some(({ memory }) => memory.scratch > 0));
  const cells = ({ chunks, memory: m }: RoleView): string[] => [
    ...kinds.map((kind) =>
      kind === "activation" ? chunks.map((c) => `${bytesText(c.activation_per_slot)} x ${c.copies}`).join(" + ") : bytesText(m[kind]),
    ),
    bytesText(m.peak),
    countText(m.peak),
    `${((100 * m.peak) / device.memory).toFixed(1)} %`,
  ];
  const names = kinds.map((kind) => (kind === "activation" ? "activations x slots" : memoryNames[kind]));
  const head = ["role", "", ...names, "peak", "bytes", `of ${device.name}`];
  return [
    "memory of a rank:",
    ...table(
      [head, ...stageRows(roles, cells)],
      head.flatMap((_, column) => (column < 2 ? [] : [column])),
    ),
  ];
}

/** Formats the layers of a stage: `layers 0..3`; with several chunks `layers 0..3, 8..11`; with multi-token prediction `layers 8..11, mtp 0..0`. */
const layersText = (role: Pick<RoleView, "chunks" | "mtp">): string => `layers ${layerRanges(role)}`;
const layerRanges = ({ chunks, mtp }: Pick<RoleView, "chunks" | "mtp">): string =>
  `${chunks.map(({ layers: [from, to] }) => (from === to ? "none" : `${from}..${to - 1}`)).join(", ")}${mtp.length ? `, mtp ${mtp[0]}..${mtp.at(-1)}` : ""}`;
/** Returns the layers of a stage that has one range of them and nothing else. */
const onlyRange = ({ chunks: [first, ...more], mtp }: RoleView): readonly [number, number] | undefined =>
  first && more.length === 0 && mtp.length === 0 && first.layers[0] < first.layers[1] ? first.layers : undefined;

/** Returns a row for each stage. Consecutive stages with equal cells share one: the middle stages are often equal. */
function stageRows(roles: readonly RoleView[], cellsOf: (role: RoleView) => string[]): string[][] {
  const rows: { readonly from: RoleView; to: RoleView; readonly cells: string[] }[] = [];
  for (const role of roles) {
    const cells = cellsOf(role);
    const last = rows.at(-1);
    if (last?.cells.join("|") === cells.join("|")) last.to = role;
    else rows.push({ from: role, to: role, cells });
  }
  return rows.map(({ from, to, cells }) => {
    if (from === to) return [`stage ${from.stage}`, layersText(from), ...cells];
    const [first, last] = [onlyRange(from), onlyRange(to)];
    const span = first && last ? `${first[0]}..${last[1] - 1}` : `${layerRanges(from)} … ${layerRanges(to)}`;
    return [`stages ${from.stage}..${to.stage}`, `layers ${span}`, ...cells];
  });
}

/** Formats the stages. A stage that equals the preceding one except for its layers is only named. */
export function printRoles({ roles }: Inspection): string[] {
  const blocks: { readonly lines: string[]; readonly form: string; readonly first: RoleView; last: RoleView }[] = [];
  for (const role of roles) {
    const lines = printRole(role);
    // peers relative to the stage, and layers relative to its first
    const { transfers } = withRelativeLayers(role);
    const relative = printRole({ ...role, transfers: transfers.map((t) => ({ ...t, peer: t.peer - role.stage })) });
    const form = relative.slice(1).join("\n").replace(/ +/g, " ");
    const before = blocks.at(-1);
    if (before?.form === form) before.last = role;
    else blocks.push({ lines, form, first: role, last: role });
  }
  return blocks.flatMap(({ lines, first, last }) => {
    if (first === last) return [...lines, ""];
    const one = last.stage === first.stage + 1;
    return [
      ...lines,
      `role of stage${one ? "" : "s"} ${one ? "" : `${first.stage + 1}..`}${last.stage}: the same on ${one ? "its" : "their"} layers`,
      "",
    ];
  });
}

function printRole(role: RoleView): string[] {
  const { instructions: n, flops, microbatches, collectives, transfers } = role;
  const weights = (of: number, text: (n: number) => string): string => (n.weights > 0 ? ` + ${text(of)} weights` : "");
  return [
    `role of stage ${role.stage}: ${layersText(role)}, ranks ${ranges(role.ranks)}`,
    `  instructions  ${n.forward} forward + ${n.backward} backward${weights(n.weights, String)} (x ${microbatches}) + ${n.step} step = ${countText(n.per_step)} a step`,
    `  parameters    ${countText(role.parameters.elements)} on a rank, in ${plural(role.parameters.tensors, "tensor")}`,
    `  flops         ${flopsText(flops.per_step)} a step: ${flopsText(flops.forward)} forward + ${flopsText(flops.backward)} backward${weights(flops.weights, flopsText)} (x ${microbatches}) + ${flopsText(flops.step)}`,
    ...(n.evaluation > 0
      ? [
          `  evaluation    ${n.evaluation} forward (x ${microbatches}) + ${n.evaluation_step} a batch, ${flopsText(flops.evaluation)} forward`,
        ]
      : []),
    `  host syncs    ${countText(role.host_syncs_per_step)} a step`,
    ...(transfers.length > 0 ? ["  transfers:", ...table(transfers.map(transferRow), [5], "    ")] : []),
    ...printCollectives(collectives, "  "),
  ];
}

const transferRow = (t: TransferView): string[] => [
  t.phase,
  t.kind,
  t.kind === "send" ? `to stage ${t.peer}` : `from stage ${t.peer}`,
  t.buffer,
  `x ${t.per_step}`,
  bytesText(t.bytes),
];

function printCollectives(collectives: readonly CollectiveView[], indent: string): string[] {
  if (collectives.length === 0) return [`${indent}collectives: none`];
  const total = collectives.reduce((sum, c) => sum + c.bytes_per_step, 0);
  const row = (c: CollectiveView): string[] => [
    c.phase,
    (c.name === c.how ? c.name : `${c.name} (${c.how})`) + (c.stream ? `, stream ${c.stream}` : ""),
    c.axes,
    countText(c.count),
    countText(c.per_step),
    bytesText(c.bytes),
    bytesText(c.bytes_per_step),
    `${c.ops.slice(0, 3).join(", ")}${c.ops.length > 3 ? `, +${c.ops.length - 3}` : ""}: ${c.because} (${c.path})`,
  ];
  const head = ["", "collective", "axes", "count", "a step", "each", "sent a step", "needed by: because (job key)"];
  return [
    `${indent}collectives: each rank sends ${bytesText(total)} a step`,
    ...table([head, ...collectives.map(row)], [3, 4, 5, 6], `${indent}  `),
  ];
}

/** Formats the schedule. */
export const printSchedule = ({ schedule, derived }: Inspection): string[] => [
  `schedule: ${plural(derived.microbatches, "microbatch").replace(/hs$/, "hes")}; ${schedule.legend}; ${schedule.units} units, bubble ${(100 * schedule.bubble).toFixed(1)} %`,
  ...schedule.rows.map((row) => `  ${row}`),
];
