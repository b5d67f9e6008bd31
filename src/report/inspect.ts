/** Summaries of a plan: `inspectPlan` returns the data (the JSON output), `printInspect` the text. */

import { phasesOf } from "../../schemas/batchRampup.ts";
import { devices } from "../../schemas/devices.ts";
import type { Collective, Instruction, MeshAxis, Plan, Program } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { type Block, blocksOf, microbatchesIn } from "../../schemas/program.ts";
import { elementsOf, groupMembers, numberInStage, rankAt, rankCoordinate, stageOfRank } from "../../schemas/sharding.ts";
import { flopsOf, sizesAgree } from "../analysis/cost.ts";
import { anyLayer, fromLayer } from "../analysis/layerNames.ts";
import { type MemoryBreakdown, memoryBreakdown, memoryKinds, memoryNames } from "../analysis/memoryBreakdown.ts";
import { ops } from "../ops/index.ts";
import { denseAxes, expertAxes, type GridAxis, groups } from "../passes/mesh.ts";
import { bytesText, countText, flopsText, plural, ranges, table } from "../units.ts";
import { type BlockPhase, blockLines, blockName, phases, timesText } from "./programText.ts";
import { drawSchedule, type SchedulePicture } from "./schedulePicture.ts";

interface AxisView {
  readonly axis: string;
  readonly grid: "dense" | "expert" | "both";
  readonly size: number;
  readonly groups: number;
  readonly cross_nodes: number;
  readonly first_group: readonly number[];
}

/** Collectives of the same kind and origin. */
interface CollectiveView {
  readonly phase: BlockPhase;
  readonly name: string;
  readonly how: Collective["how"];
  readonly axes: string;
  readonly count: number;
  readonly per_step: number;
  /** Bytes that each rank sends per execution. */
  readonly bytes: number;
  readonly bytes_per_step: number;
  readonly because: string;
  readonly path: string;
  /** Their origins, with equal layers merged. */
  readonly ops: readonly string[];
}

interface TransferView {
  readonly phase: BlockPhase;
  readonly kind: "send" | "recv";
  readonly peer: number;
  readonly buffer: string;
  readonly bytes: number;
  readonly per_step: number;
}

/** The summary of one stage. */
export interface RoleView {
  readonly stage: number;
  readonly chunks: readonly { readonly layers: readonly [number, number]; readonly copies: number; readonly activation_per_slot: number }[];
  /** The layers of multi-token prediction of this stage. */
  readonly mtp: readonly number[];
  readonly ranks: readonly number[];
  readonly microbatches: number;
  readonly instructions: { readonly [P in BlockPhase]: number } & { readonly per_step: number };
  readonly parameters: { readonly tensors: number; readonly elements: number };
  /** Memory in bytes; the parts sum to the peak. */
  readonly memory: MemoryBreakdown & { readonly peak: number };
  readonly flops: { readonly [P in BlockPhase]: number } & { readonly per_step: number };
  readonly collectives: readonly CollectiveView[];
  readonly transfers: readonly TransferView[];
  readonly host_syncs_per_step: number;
}

/** The summary of a plan. */
export interface Inspection {
  readonly name: string;
  readonly digest: string;
  readonly rankc: string;
  readonly target: string;
  readonly mesh: {
    readonly world: number;
    readonly per_stage: number;
    readonly nodes: number;
    readonly gpus_per_node: number;
    readonly axes: readonly AxisView[];
  };
  readonly derived: {
    readonly data: number;
    readonly edp: number;
    readonly local_experts: number;
    readonly microbatches: number;
    readonly tokens_per_step: number;
    /** The batch sizes of the ramp-up. */
    readonly ramp_up: readonly { readonly batch: number; readonly steps: number }[];
    readonly parameters: number;
  };
  readonly device: { readonly name: string; readonly memory: number };
  readonly roles: readonly RoleView[];
  readonly schedule: SchedulePicture;
  readonly kernels: number;
}

/** Summarizes a plan. */
export function inspectPlan(plan: Plan): Inspection {
  const { job, mesh } = plan;
  const roles = plan.programs.map((program) => roleView(plan, program));
  const microbatches = roles[0]!.microbatches;
  return {
    name: job.name,
    digest: plan.digests.plan,
    rankc: plan.toolchain.rankc,
    target: plan.toolchain.target,
    mesh: {
      world: mesh.world,
      per_stage: mesh.per_stage,
      nodes: job.cluster.nodes,
      gpus_per_node: mesh.gpus_per_node,
      axes: ([...denseAxes, ...expertAxes, "pp"] as const).map((axis) => axisView(plan, axis)),
    },
    derived: {
      data: mesh.sizes.dp,
      edp: mesh.sizes.edp,
      local_experts: job.model.moe ? job.model.moe.experts / mesh.sizes.ep : 0,
      microbatches,
      tokens_per_step: job.train.global_batch * job.model.seq,
      ramp_up: phasesOf(job.train)
        .slice(0, -1)
        .map(({ batch, steps }) => ({ batch, steps })),
      parameters: plan.programs.reduce((sum, program) => sum + globalElements(program), 0),
    },
    device: { name: job.cluster.device, memory: devices[job.cluster.device].memory },
    roles,
    schedule: drawSchedule(
      plan.programs.map((program) => program.order),
      plan.programs[0]!.chunks.length,
    ),
    kernels: plan.kernels.length,
  };
}

function axisView(plan: Plan, axis: MeshAxis): AxisView {
  const all = groups(plan.mesh, [axis]);
  const node = (rank: number): number => Math.floor(rank / plan.mesh.gpus_per_node);
  return {
    axis,
    grid: axis === "pp" ? "both" : (denseAxes as readonly string[]).includes(axis) ? "dense" : "expert",
    size: plan.mesh.sizes[axis],
    groups: all.length,
    cross_nodes: all.filter((group) => group.some((rank) => node(rank) !== node(group[0]!))).length,
    first_group: all[0]!,
  };
}

function roleView(plan: Plan, program: Program): RoleView {
  const { mesh } = plan;
  const memory = plan.memory.find((m) => m.stage === program.stage)!;
  const microbatches = microbatchesIn(program);
  const times = ({ kind }: Block): number => (kind === "step" ? 1 : microbatches);
  const blocks = blocksOf(program);
  const each = (count: (instructions: readonly Instruction[]) => number) => {
    const sums = { forward: 0, backward: 0, weights: 0, step: 0, per_step: 0 };
    for (const block of blocks) {
      const n = count(block.instructions);
      sums[block.kind] += n;
      sums.per_step += n * times(block);
    }
    return sums;
  };
  const buffers = new Map(program.buffers.map((buffer) => [buffer.id, buffer]));
  const buffer = (id: string) => buffers.get(id)!;
  const collectives = phases.flatMap((kind) => {
    const all = blocks.filter((block) => block.kind === kind);
    return all.length
      ? collectiveViews(
          all.flatMap((block) => block.instructions),
          kind,
          times(all[0]!),
        )
      : [];
  });
  return {
    stage: program.stage,
    chunks: program.chunks.map(({ layers, copies }, c) => ({ layers, copies, activation_per_slot: memory.activation[c]! })),
    mtp: [...new Set(program.parameters.flatMap(({ name }) => /^mtp\.(\d+)\./.exec(name)?.[1] ?? []))].map(Number).sort((a, b) => a - b),
    ranks: Array.from({ length: mesh.per_stage }, (_, n) => rankAt(mesh, program.stage, n)),
    microbatches,
    instructions: each((instructions) => instructions.length),
    parameters: {
      tensors: program.parameters.length,
      elements: program.parameters.reduce((sum, p) => sum + elementsOf(buffer(p.buffer).shape), 0),
    },
    memory: { ...memoryBreakdown(program, memory), peak: memory.peak },
    flops: each((instructions) =>
      instructions.reduce((sum, i) => sum + (i.kind === "compute" ? flopsOf(ops[i.op], i, mesh, buffer) : 0), 0),
    ),
    collectives,
    transfers: blocks.flatMap((block) =>
      block.instructions.flatMap((i) =>
        i.kind === "send" || i.kind === "recv"
          ? [{ phase: block.kind, kind: i.kind, peer: i.peer, buffer: i.buffer, bytes: i.bytes, per_step: times(block) }]
          : [],
      ),
    ),
    host_syncs_per_step: blocks.reduce(
      (sum, block) => sum + block.instructions.filter((i) => i.kind === "collective" && !sizesAgree(i, mesh, buffer)).length * times(block),
      0,
    ),
  };
}

function collectiveViews(instructions: readonly Instruction[], phase: BlockPhase, times: number): CollectiveView[] {
  const found = new Map<string, CollectiveView & { ops: string[] }>();
  for (const i of instructions) {
    if (i.kind !== "collective") continue;
    const { name, how, axes, bytes, why } = i;
    const key = [name, how, axes, bytes, anyLayer(why.because), why.path].join("\n");
    const before = found.get(key);
    const op = anyLayer(why.op);
    const ops = before?.ops ?? [];
    if (!ops.includes(op)) ops.push(op);
    const count = (before?.count ?? 0) + 1;
    const because = anyLayer(why.because);
    found.set(key, {
      phase,
      name,
      how,
      axes,
      count,
      per_step: count * times,
      bytes,
      bytes_per_step: bytes * count * times,
      because,
      path: why.path,
      ops,
    });
  }
  return [...found.values()];
}

/** Counts the parameters of the whole model; tied copies are not counted. */
function globalElements(program: Program): number {
  const buffers = new Map(program.buffers.map((buffer) => [buffer.id, buffer]));
  return program.parameters.reduce((sum, p) => sum + (p.tied_to ? 0 : elementsOf(buffers.get(p.buffer)!.sizes)), 0);
}

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
  const [shown, last] = [ramp_up.slice(0, 3), ramp_up.at(-1)!];
  const more = ramp_up.length > 4 ? ["…"] : [];
  const steps = ramp_up.reduce((sum, p) => sum + p.steps, 0);
  return [
    `ramp-up: ${[...shown.map(text), ...more, ...(ramp_up.length > 3 ? [text(last)] : [])].join(", ")}: ${plural(steps, "step")} before the batch is whole`,
  ];
}

/** Formats the memory of each stage as a table. */
export function printMemory({ roles, device }: Inspection): string[] {
  // omit the scratch column if no kernel needs scratch
  const kinds = memoryKinds.filter((kind) => kind !== "scratch" || roles.some(({ memory }) => memory.scratch > 0));
  const row = ({ stage, chunks, mtp, memory: m }: RoleView): string[] => [
    `stage ${stage}`,
    layersText({ chunks, mtp }),
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
      [head, ...sameRows(roles.map(row))],
      head.flatMap((_, column) => (column < 2 ? [] : [column])),
    ),
  ];
}

/** Formats the layers of a stage: `layers 0..3`; with several chunks `layers 0..3, 8..11`; with multi-token prediction `layers 8..11, mtp 0..0`. */
const layersText = ({ chunks, mtp }: Pick<RoleView, "chunks" | "mtp">): string =>
  `layers ${chunks.map(({ layers: [from, to] }) => (from === to ? "none" : `${from}..${to - 1}`)).join(", ")}${mtp.length ? `, mtp ${mtp[0]}..${mtp.at(-1)}` : ""}`;

/** Merges rows that differ only in the stage: the middle stages are often equal. */
function sameRows(rows: readonly (readonly string[])[]): string[][] {
  const out: { from: string; to: string; row: readonly string[] }[] = [];
  for (const row of rows) {
    const last = out.at(-1);
    if (last && last.row.slice(2).join("|") === row.slice(2).join("|")) last.to = row.slice(0, 2).join(" ");
    else out.push({ from: row.slice(0, 2).join(" "), to: row.slice(0, 2).join(" "), row });
  }
  const stage = (text: string): string => text.split(" ")[1]!;
  const layers = (text: string): string => text.split(" ").slice(3).join(" ");
  // for stages with one layer range each: the first and the last layer
  const span = (from: string, to: string): string =>
    [from, to].every((text) => /^\d+\.\.\d+$/.test(text)) ? `${from.split("..")[0]}..${to.split("..")[1]}` : `${from} … ${to}`;
  return out.map(({ from, to, row }) =>
    from === to ? [...row] : [`stages ${stage(from)}..${stage(to)}`, `layers ${span(layers(from), layers(to))}`, ...row.slice(2)],
  );
}

/** Formats the stages. A stage that equals the preceding one except for its layers is only named. */
export function printRoles({ roles }: Inspection): string[] {
  const blocks: { readonly lines: string[]; readonly shape: string; readonly first: RoleView; last: RoleView }[] = [];
  for (const role of roles) {
    const lines = printRole(role);
    const relative = lines
      .slice(1)
      .map((line) =>
        fromLayer(line, role.chunks[0]!.layers[0]).replace(/stage (\d+)/g, (_, n: string) => `stage ${Number(n) - role.stage}`),
      );
    const shape = relative.join("\n").replace(/ +/g, " ");
    const before = blocks.at(-1);
    if (before?.shape === shape) before.last = role;
    else blocks.push({ lines, shape, first: role, last: role });
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
    c.name === c.how ? c.name : `${c.name} (${c.how})`,
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
export const printSchedule = ({ schedule, roles }: Inspection): string[] => [
  `schedule: ${plural(roles[0]!.microbatches, "microbatch").replace(/hs$/, "hes")}; ${schedule.legend}; ${schedule.units} units, bubble ${(100 * schedule.bubble).toFixed(1)} %`,
  ...schedule.rows.map((row) => `  ${row}`),
];

/** The view of one rank. */
export interface RankInspection {
  readonly rank: number;
  readonly stage: number;
  readonly node: number;
  readonly axes: readonly {
    readonly axis: string;
    readonly coordinate: number;
    readonly size: number;
    readonly group: readonly number[];
  }[];
  readonly program: readonly { readonly block: string; readonly times: string; readonly lines: readonly string[] }[];
  readonly order: readonly string[];
}

/** Returns the coordinates, the groups and the program of a rank. The rank must exist. */
export function inspectRank(plan: Plan, rank: number): RankInspection {
  const { mesh } = plan;
  const stage = stageOfRank(mesh, rank);
  const local = numberInStage(mesh, rank);
  const program = plan.programs.find((p) => p.stage === stage)!;
  const axis = (name: GridAxis) => {
    const subAxes = mesh.axes[name];
    let coordinate = 0;
    for (const f of [...subAxes].reverse()) coordinate = coordinate * mesh.subAxes[f]!.size + rankCoordinate(mesh, local, f);
    const group = groupMembers(mesh, local, subAxes).map((n) => rankAt(mesh, stage, n));
    return { axis: name, coordinate, size: mesh.sizes[name], group };
  };
  const stages = Array.from({ length: mesh.sizes.pp }, (_, s) => rankAt(mesh, s, local));
  return {
    rank,
    stage,
    node: Math.floor(rank / mesh.gpus_per_node),
    axes: [...[...denseAxes, ...expertAxes].map(axis), { axis: "pp", coordinate: stage, size: mesh.sizes.pp, group: stages }],
    program: blocksOf(program).map((block) => ({
      block: blockName(block, program),
      times: timesText(block),
      lines: blockLines(program, block).map((line) => line.text),
    })),
    order: program.order,
  };
}

/** Formats the view of one rank as text. */
export function printRank({ rank, stage, node, axes, program, order }: RankInspection): string {
  return [
    `rank ${rank}: stage ${stage}, node ${node}`,
    ...table(axes.map((a) => [a.axis, `${a.coordinate} of ${a.size}`, `group ${a.group.join(",")}`])),
    "",
    `order: ${order.join(" ")} then the step`,
    "",
    ...program.flatMap(({ block, times, lines }) => [`${block}, ${times}:`, ...lines, ""]),
  ].join("\n");
}
