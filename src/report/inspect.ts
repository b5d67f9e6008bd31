/** Summaries of a plan as data, the JSON output of `inspect`. inspectText.ts prints them. */

import { phasesOf } from "../../schemas/batchRampup.ts";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { devices } from "../../schemas/devices.ts";
import type { Buffer, Collective, Instruction, MeshAxis, Plan, Program, StreamName } from "../../schemas/plan.ts";
import { blocksOf, microbatchesIn, timesIn } from "../../schemas/program.ts";
import { elementsOf, rankAt } from "../../schemas/sharding.ts";
import { buffersOf } from "../analysis/bufferTable.ts";
import { flopsOf, sizesAgree } from "../analysis/cost.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { type MemoryBreakdown, memoryBreakdown } from "../analysis/memoryBreakdown.ts";
import { chunksPerStage, type StageOfPlan, stagesOf } from "../analysis/stages.ts";
import { ops } from "../ops/index.ts";
import { denseAxes, expertAxes, groups } from "../passes/mesh.ts";
import { largest } from "../units.ts";
import { type EstimateView, estimateView } from "./estimateView.ts";
import { type Link, linksOf, transferAcross } from "./links.ts";
import { type BlockPhase, phases } from "./programText.ts";
import { drawSchedule, type SchedulePicture } from "./schedulePicture.ts";

/** The version of the JSON that `inspect` prints. */
export const INSPECT_VERSION = "1.2";

/** One axis of the mesh. */
export interface AxisView {
  readonly axis: string;
  readonly grid: "dense" | "expert" | "both";
  readonly size: number;
  readonly groups: number;
  readonly cross_nodes: number;
  /** The largest number of nodes that a group is on. */
  readonly nodes: number;
  readonly first_group: readonly number[];
}

/** Collectives of the same kind and origin. */
export interface CollectiveView {
  readonly phase: BlockPhase;
  readonly name: string;
  readonly how: Collective["how"];
  readonly axes: string;
  readonly count: number;
  readonly per_step: number;
  /** Bytes that each rank sends per execution. */
  readonly bytes: number;
  readonly bytes_per_step: number;
  readonly link: Link;
  /** Of asynchronous collectives: the stream on which they run beside compute. */
  readonly stream?: StreamName;
  readonly because: string;
  readonly path: string;
  /** Their origins, with equal layers merged. */
  readonly ops: readonly string[];
}

/** The sends and receives of one buffer. */
export interface TransferView {
  readonly phase: BlockPhase;
  readonly kind: "send" | "recv";
  readonly peer: number;
  readonly buffer: string;
  /** The layer that the buffer belongs to. */
  readonly layer?: number;
  readonly bytes: number;
  readonly per_step: number;
  /** The share of the ranks whose peer is on another node. */
  readonly across: number;
}

/** The summary of one stage. */
export interface RoleView {
  readonly stage: number;
  readonly chunks: readonly { readonly layers: readonly [number, number]; readonly copies: number; readonly activation_per_slot: number }[];
  /** The layers of multi-token prediction of this stage. */
  readonly mtp: readonly number[];
  readonly ranks: readonly number[];
  readonly microbatches: number;
  /** How often a step runs a forward and a backward as a pair. */
  readonly pairs: number;
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
  /** The version of this form: a minor version adds keys. */
  readonly format_version: typeof INSPECT_VERSION;
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
  /** The seconds of a step; absent where no device profile is at hand. */
  readonly estimate?: EstimateView;
}

/** Options of `inspectPlan`: the profile by which a step is estimated, and the rows of the busiest expert rank over the mean. */
export interface InspectOptions {
  readonly profile?: DeviceProfile | undefined;
  readonly imbalance?: number | undefined;
  /** Estimates a plan, or knows its estimate; default: estimates it. */
  readonly estimateOf?: typeof estimateView;
}

/** Summarizes a plan. */
export function inspectPlan(plan: Plan, { profile, imbalance, estimateOf = estimateView }: InspectOptions = {}): Inspection {
  const { job, mesh } = plan;
  const timed = estimateOf(plan, profile, imbalance);
  const roles = stagesOf(plan).map((stage) => roleView(plan, stage));
  const microbatches = roles[0]?.microbatches ?? 0;
  return {
    format_version: INSPECT_VERSION,
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
      chunksPerStage(plan),
    ),
    kernels: plan.kernels.length,
    ...(timed && { estimate: timed }),
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
    cross_nodes: all.filter((group) => new Set(group.map(node)).size > 1).length,
    nodes: largest(all, (group) => new Set(group.map(node)).size),
    first_group: all[0] ?? [],
  };
}

function roleView({ mesh }: Plan, { program, memory }: StageOfPlan): RoleView {
  const microbatches = microbatchesIn(program);
  const blocks = blocksOf(program);
  const each = (count: (i: Instruction) => number) => {
    const sums = { forward: 0, backward: 0, weights: 0, step: 0, evaluation: 0, evaluation_step: 0, per_step: 0 };
    for (const block of blocks) {
      for (const i of block.instructions) {
        const n = count(i);
        sums[block.kind] += n;
        sums.per_step += n * timesIn(program, block, i);
      }
    }
    return sums;
  };
  const buffers = buffersOf(program);
  const buffer = (id: string) => buffers.get(id);
  const linkOf = linksOf(mesh, program.stage);
  const collectives = phases.flatMap((kind) => {
    const instructions = blocks.flatMap((block) => (block.kind === kind ? block.instructions : []));
    return collectiveViews(program, instructions, kind, linkOf);
  });
  return {
    stage: program.stage,
    chunks: program.chunks.map(({ layers, copies }, c) => ({ layers, copies, activation_per_slot: memory.activation[c] ?? 0 })),
    mtp: mtpDepthsOf(program),
    ranks: Array.from({ length: mesh.per_stage }, (_, n) => rankAt(mesh, program.stage, n)),
    microbatches,
    pairs: program.order.filter(({ paired }) => paired).length,
    instructions: each(() => 1),
    parameters: {
      tensors: program.parameters.length,
      elements: program.parameters.reduce((sum, p) => sum + elementsOf(buffer(p.buffer).shape), 0),
    },
    memory: { ...memoryBreakdown(program, memory), peak: memory.peak },
    flops: each((i) => (i.kind === "compute" ? flopsOf(ops[i.op], i, mesh, buffer) : 0)),
    collectives,
    transfers: blocks.flatMap((block) =>
      block.instructions.flatMap((i) =>
        i.kind === "send" || i.kind === "recv"
          ? [
              {
                ...{
                  phase: block.kind,
                  kind: i.kind,
                  peer: i.peer,
                  buffer: i.buffer,
                  bytes: i.bytes,
                  per_step: timesIn(program, block, i),
                },
                ...layerField(buffer(i.buffer)),
                across: transferAcross(mesh, program.stage, i.peer),
              },
            ]
          : [],
      ),
    ),
    host_syncs_per_step: blocks.reduce(
      (sum, block) =>
        sum +
        block.instructions.reduce(
          (n, i) => n + (i.kind === "collective" && !sizesAgree(i, mesh, buffer) ? timesIn(program, block, i) : 0),
          0,
        ),
      0,
    ),
  };
}

function collectiveViews(
  program: Program,
  instructions: readonly Instruction[],
  phase: BlockPhase,
  linkOf: ReturnType<typeof linksOf>,
): CollectiveView[] {
  const found = new Map<string, CollectiveView & { ops: string[] }>();
  for (const i of instructions) {
    if (i.kind !== "collective") continue;
    const { name, how, axes, bytes, why, stream } = i;
    const because = anyLayer(why.because, why.layer);
    const times = timesIn(program, { kind: phase }, i);
    const key = [name, how, axes, bytes, because, why.path, stream, times].join("\n");
    const before = found.get(key);
    const op = anyLayer(why.op, why.layer);
    const ops = before?.ops ?? [];
    if (!ops.includes(op)) ops.push(op);
    const count = (before?.count ?? 0) + 1;
    found.set(key, {
      phase,
      name,
      how,
      axes,
      count,
      per_step: count * times,
      bytes,
      bytes_per_step: bytes * count * times,
      link: linkOf(i),
      ...(stream && { stream }),
      because,
      path: why.path,
      ops,
    });
  }
  return [...found.values()];
}

const layerField = ({ layer }: Pick<Buffer, "layer">): Pick<TransferView, "layer"> => (layer === undefined ? {} : { layer });

/** Returns a stage whose transfers name layers relative to its first, so that stages which differ only in their layers have equal texts. */
export function withRelativeLayers(role: RoleView): RoleView {
  const first = role.chunks[0]?.layers[0] ?? 0;
  const relative = ({ buffer, layer }: TransferView): string =>
    layer === undefined ? buffer : `${layer - first} ${anyLayer(buffer, layer)}`;
  return { ...role, transfers: role.transfers.map((t) => ({ ...t, buffer: relative(t) })) };
}

/** Returns the depths of multi-token prediction of a stage, from 0. Each embeds the ids ahead: the input of the source `ids` with a depth from 1. */
function mtpDepthsOf({ inputs }: Program): number[] {
  const depths = inputs.flatMap(({ source, depth }) => (source === "ids" && depth !== undefined ? [depth - 1] : []));
  return [...new Set(depths)].sort((a, b) => a - b);
}

/** Counts the parameters of the whole model; tied copies are not counted. */
function globalElements(program: Program): number {
  const buffers = buffersOf(program);
  return program.parameters.reduce((sum, p) => sum + (p.tied_to ? 0 : elementsOf(buffers.get(p.buffer).sizes)), 0);
}
