/**
 * The program builder collects the buffers and the instructions of one stage. It maps sharded values to buffers with stable names.
 * `lower` fills the forward and backward blocks, `optimizerStep` the step block.
 */
import type { Job } from "../../schemas/job.ts";
import type { Buffer, BufferKind, Collective, Compute, HostInput, Instruction, Program, Transfer } from "../../schemas/plan.ts";
import { bytesOf, elementsOf, shardCount } from "../../schemas/sharding.ts";
import { boundOfRows } from "../analysis/cost.ts";
import { type AnyOp, invariant, type Value } from "../ops/op.ts";
import { indexLength } from "../ops/transport.ts";
import { idOf } from "./backward.ts";
import { blockAxesText, layoutKey, type ReshardKind, type ShardedValue, variantText } from "./layout.ts";
import { axesName, isExpert, type Mesh } from "./mesh.ts";
import { chunkOfVirtual, type Pipeline, stageOfVirtual } from "./pipeline.ts";
import type { Schedule } from "./schedule.ts";
import type { ShardedGraph, ShardStep } from "./sharding/steps.ts";
import type { TrainingGraph } from "./updateGraph.ts";

/** A block under construction. */
export interface BlockBuilder {
  readonly kind: "forward" | "backward" | "step";
  readonly chunk: number;
  readonly list: (Instruction | Reshard)[];
}
/** One reshard step. `lowerCollectives` replaces it by a collective and the copies before and after it. */
export interface Reshard extends Omit<Collective, "kind" | "how" | "bytes"> {
  readonly kind: "reshard";
  readonly how: ReshardKind;
  /** Per dim, the sub-axes that number the blocks on both sides. */
  readonly blockAxes: readonly (readonly number[])[];
}
/** Results of the passes before lowering. */
export interface Lowered {
  readonly graph: TrainingGraph;
  readonly sharded: ShardedGraph;
  readonly pipeline: Pipeline;
  /** The schedule of each stage. */
  readonly order: readonly Schedule[];
}
/** Buffers, blocks and the functions that add to them. */
export type ProgramBuilder = ReturnType<typeof programBuilder>;

/** Creates an empty program builder for a stage. */
export function programBuilder(job: Job, mesh: Mesh, { graph, sharded: { placement }, pipeline, order }: Lowered, stage: number) {
  const buffers = new Map<string, Buffer>();
  const emptyBlock = (kind: BlockBuilder["kind"], chunk = 0): BlockBuilder => ({ kind, chunk, list: [] });
  const each = Array.from({ length: pipeline.chunks }, (_, chunk) => chunk);
  const blocks = {
    forward: each.map((c) => emptyBlock("forward", c)),
    backward: each.map((c) => emptyBlock("backward", c)),
    step: emptyBlock("step"),
  };
  /** Returns whether this stage runs a virtual stage. */
  const isMine = (virtual: number): boolean => stageOfVirtual(pipeline, virtual) === stage;
  const inputs: Program["inputs"] = [];
  /** Declares that the host fills a buffer. Returns the id of the buffer. */
  const input = (source: HostInput, buffer: string): string => {
    if (!inputs.some((i) => i.buffer === buffer)) inputs.push({ ...source, buffer });
    return buffer;
  };
  const losses = new Map(graph.losses.map((l) => [l.value, l.name]));
  /** Accumulators of losses, by name and layout. Losses with equal names and layouts share one. */
  const accumulators = new Map<string, { readonly name: string; readonly buffer: string }>();
  const idCounts = new Map<string, number>();

  /** Appends an instruction to a block. Repeated ids get a suffix: `#2`. */
  const emit = ({ list }: BlockBuilder, i: Instruction | Reshard): void => {
    const n = (idCounts.get(i.id) ?? 0) + 1;
    idCounts.set(i.id, n);
    list.push(n === 1 ? i : { ...i, id: `${i.id}#${n}` });
  };
  /** Adds a buffer unless its id exists. Returns the id. */
  const add = (b: Buffer): string => {
    if (!buffers.has(b.id)) buffers.set(b.id, b);
    return b.id;
  };
  /** Returns the local shape of a tensor. */
  const local = (sizes: readonly number[], shardedBy: ShardedValue["layout"]["shardedBy"]) =>
    sizes.map((n, slot) => n / shardCount(mesh, shardedBy[slot]!));
  /** Adds an f32 scalar. Returns its id. */
  const scalar = (id: string, kind: BufferKind, partial: readonly number[] = []): string =>
    add({ id, kind, dtype: "f32", shape: [], sizes: [], ragged: 0, shardedBy: [], ...(partial.length ? { partial: [...partial] } : {}) });

  /** Per check, the buffer to which an instruction writes the number of rows that it needed, and the capacity. */
  const bounds: Program["bounds"] = [];
  /** Adds the i32 buffer for the number of rows that `id` needed, with its capacity. Returns its id. */
  const needed = (id: string, bound: number): string => {
    const buffer = add({ id: `${id}.needed`, kind: "gradient", dtype: "i32", shape: [], sizes: [], ragged: 0, shardedBy: [] });
    if (!bounds.some((b) => b.needed === buffer)) bounds.push({ needed: buffer, bound, of: "rows" });
    return buffer;
  };

  /** Returns the name of the sub-axes of a dim. If the outer one has the smaller stride, which is rare, each is named: `ep>edp`. */
  const dimAxesName = (fs: readonly number[], expert: boolean): string =>
    fs.every((f, i) => i === 0 || f < fs[i - 1]!) ? axesName(mesh, fs, expert) : fs.map((f) => axesName(mesh, [f], expert)).join(">");
  /** Returns a layout as part of a name: `@dp,tp,-` gives the axes of each dim, `+tp` a pending sum, `^tp` a pending maximum. */
  const layoutText = ({ layout: l, value: v, variant = {} }: ShardedValue, expert = isExpert(v)): string => {
    const name = (fs: readonly number[]) => dimAxesName(fs, expert);
    const shardedBy = l.shardedBy.map((fs) => (fs.length ? name(fs) : "-")).join(",");
    return `@${shardedBy}${l.partialSum.length ? `+${name(l.partialSum)}` : ""}${l.partialMax.length ? `^${name(l.partialMax)}` : ""}${variantText(variant, "")}`;
  };

  /** Adds the index buffer of a ragged value; all values with the same rows share it. Returns its id. */
  function rowsOf({ value: v, layout, variant }: ShardedValue, bound: number): string {
    const shardedBy = layout.shardedBy.slice(0, 3).map((fs) => (fs.length ? dimAxesName(fs, true) : "-"));
    // for an intermediate reshard result, the rows depend on how blocks are numbered
    const counted = variant?.blockAxes && blockAxesText(variant.blockAxes.slice(0, 3));
    const id = `${rowsetOf(v)}.rows@${shardedBy.join(",")}${counted === undefined ? "" : `~${counted}`}`;
    const length = indexLength(bound, v.sizes[2]! / shardCount(mesh, layout.shardedBy[2]!));
    return add({ id, kind: "workspace", dtype: "i32", shape: [length], sizes: [length], ragged: 0, shardedBy: [[]] });
  }
  /** Returns the id of the accumulator of a loss; undefined for any other value. */
  function lossBuffer(value: Value): string | undefined {
    const name = losses.get(value);
    if (!name) return undefined;
    const shardedValue = { value, layout: placement.get(value)!.layout };
    const key = `${name}|${layoutKey(shardedValue)}`;
    const known = accumulators.get(key);
    if (known) return known.buffer;
    const another = [...accumulators.values()].some((a) => a.name === name);
    const buffer = another ? name + layoutText(shardedValue) : name;
    accumulators.set(key, { name, buffer });
    return buffer;
  }
  /** Adds the buffer of a sharded value unless it exists. Returns its id. */
  function bufferOf(shardedValue: ShardedValue): string {
    const { value: v, layout } = shardedValue;
    const isPlacement = layoutKey(shardedValue) === layoutKey({ value: v, layout: placement.get(v)!.layout });
    const loss = lossBuffer(v);
    const id = loss ?? idOf(v) + (isPlacement ? "" : layoutText(shardedValue));
    if (buffers.has(id)) return id;
    if (v.leaf?.source && isPlacement) input(v.leaf.source, id);
    const partial = [...layout.partialSum, ...layout.partialMax];
    const common = {
      id,
      dtype: v.dtype,
      sizes: [...v.sizes],
      ragged: v.ragged,
      shardedBy: layout.shardedBy.map((c) => [...c]),
      ...(partial.length ? { partial } : {}),
    };
    // state that one microbatch passes to the next lives for the whole step and is zeroed with the gradients
    const lasting = loss !== undefined || v.node?.op.inPlace?.includes(v.node.op.outputs[v.out]!.name);
    if (!v.ragged) return add({ ...common, kind: lasting ? "gradient" : "workspace", shape: local(v.sizes, layout.shardedBy) });
    const bound = boundOfRows(mesh, v, layout.shardedBy, job.model.moe?.rows_bound ?? "worst");
    const rest = local(v.sizes, layout.shardedBy).slice(3);
    return add({
      ...common,
      kind: "workspace",
      shape: [bound, ...rest],
      fanout: v.fanout,
      ...(v.quota ? { quota: { ...v.quota } } : {}),
      rows: rowsOf(shardedValue, bound),
    });
  }
  const bytes = (id: string): number => bytesOf[buffers.get(id)!.dtype] * elementsOf(buffers.get(id)!.shape);

  /** Emits a reshard step of `shard` between two buffers. */
  function reshard(
    block: BlockBuilder,
    s: Extract<ShardStep, { kind: "collective" }>,
    from: string,
    to: string,
    expert = isExpert(s.from.value),
  ): void {
    const ragged = s.from.value.ragged > 0;
    const dimOf = (l: ShardedValue["layout"]) => l.shardedBy.findIndex((c) => c.includes(s.subAxes[0]!));
    // ragged rows are sent to the ranks of their experts, and back
    const name =
      !ragged || s.how !== "all_to_all" ? s.how : dimOf(s.to.layout) === 2 ? "dispatch" : dimOf(s.from.layout) === 2 ? "combine" : s.how;
    emit(block, {
      kind: "reshard",
      // no collective names the axes of a regrid
      id: `${to}${s.how === "regrid" ? layoutText(s.to) : ""}.${name}`,
      how: s.how,
      name,
      axes: axesName(mesh, s.subAxes, expert),
      subAxes: [...s.subAxes],
      from,
      to,
      blockAxes: s.blockAxes,
      why: { ...s.why },
    });
  }
  /** Emits a send or a receive between two virtual stages. All transfers between them in one kind of block use one channel. */
  function transfer(
    block: BlockBuilder,
    kind: Transfer["kind"],
    buffer: string,
    { from, to }: Ends,
    why: Transfer["why"],
    tag: string,
  ): void {
    const peer = stageOfVirtual(pipeline, kind === "send" ? to : from);
    invariant(peer !== stage, `${tag}: stage ${stage} would send to itself`);
    const [chunk, next] = [from, to].map((v) => chunkOfVirtual(pipeline, v));
    const channel = block.kind === "step" ? "step" : `${block.kind}${pipeline.chunks > 1 ? ` of chunk ${chunk}` : ""}`;
    const { inFlight } = order[stage]!;
    const several = kind === "send" && block.kind !== "step" && chunk !== next && inFlight > 1;
    const ahead = several ? { in_flight: inFlight } : {};
    emit(block, { kind, id: `${tag}.${kind}`, buffer, tag, peer, channel, bytes: bytes(buffer), ...ahead, why: { ...why } });
  }
  /** Returns a compute instruction that applies an op to all local elements of its buffers. */
  function elementwise(
    op: AnyOp,
    id: string,
    reads: Record<string, string>,
    writes: Record<string, string>,
    attrs: Record<string, number> = {},
  ): Compute {
    const dims: Compute["dims"] = {};
    for (const { name, dimSpecs } of op.inputs.filter((o) => !o.any))
      for (const [i, { dim }] of dimSpecs.entries())
        dims[dim] = [buffers.get(reads[name]!)!.sizes[i]!, [...buffers.get(reads[name]!)!.shardedBy[i]!]];
    return {
      kind: "compute",
      id,
      op: op.name,
      kernel: "",
      reads,
      writes,
      dims,
      attrs,
      ...(op.inPlace?.length ? { accumulates: [...op.inPlace] } : {}),
    };
  }

  return {
    job,
    mesh,
    pipeline,
    stage,
    isMine,
    placement,
    buffers,
    blocks,
    inputs,
    input,
    bounds,
    needed,
    accumulators,
    emit,
    add,
    local,
    scalar,
    layoutText,
    lossBuffer,
    bufferOf,
    bytes,
    reshard,
    transfer,
    elementwise,
  };
}

interface Ends {
  readonly from: number;
  readonly to: number;
}

/** Returns the id of the routing that a ragged value comes from. Values of one routing have the same rows. */
function rowsetOf(v: Value): string {
  const node = v.node!;
  if (node.op.rows) return idOf(node.args[node.op.inputs.findIndex((i) => i.name === "c")]!);
  return rowsetOf(node.args.find((a) => a.ragged)!);
}
