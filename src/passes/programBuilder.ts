/**
 * One role under construction: its buffers by stable name, and the instructions of its blocks. Pieces of `shard` become
 * buffers here; `lower` fills forward and backward of each chunk, `update` the step block.
 */
import type { Job } from "../../schemas/job.ts";
import type { Buffer, BufferKind, Collective, Compute, Instruction, Program, Transfer } from "../../schemas/plan.ts";
import { bytesOf, elementsOf, shardCount } from "../../schemas/sharding.ts";
import { boundOfRows } from "../analysis/cost.ts";
import { type AnyOp, invariant, type Value } from "../ops/op.ts";
import { indexLength } from "../ops/transport.ts";
import { type Graph, idOf } from "./backward.ts";
import { layoutKey, type ReshardKind, type ShardedValue } from "./layout.ts";
import { axesName, isExpert, type Mesh } from "./mesh.ts";
import { chunkOfVirtual, type Pipeline, stageOfVirtual } from "./pipeline.ts";
import type { Schedule } from "./schedule.ts";
import type { ShardedGraph, ShardStep } from "./shard.ts";

/** A block under construction. */
export interface BlockBuilder {
  readonly kind: "forward" | "backward" | "step";
  readonly chunk: number;
  readonly list: (Instruction | Reshard)[];
}
/** A piece comes into another layout: what `messages` turns into a collective and the copies around it. */
export interface Reshard extends Omit<Collective, "kind" | "how" | "bytes"> {
  readonly kind: "reshard";
  readonly how: ReshardKind;
  /** Per slot, the factors by which blocks are counted on both sides. */
  readonly blockAxes: readonly (readonly number[])[];
}
/** What roles are made of. */
export interface Lowered {
  readonly graph: Graph;
  readonly sharded: ShardedGraph;
  readonly pipeline: Pipeline;
  /** By stage. */
  readonly order: readonly Schedule[];
}
export type ProgramBuilder = ReturnType<typeof programBuilder>;

export function programBuilder(job: Job, mesh: Mesh, { graph, sharded: { placement }, pipeline, order }: Lowered, stage: number) {
  const buffers = new Map<string, Buffer>();
  const draft = (kind: BlockBuilder["kind"], chunk = 0): BlockBuilder => ({ kind, chunk, list: [] });
  const each = Array.from({ length: pipeline.chunks }, (_, chunk) => chunk);
  const blocks = { forward: each.map((c) => draft("forward", c)), backward: each.map((c) => draft("backward", c)), step: draft("step") };
  /** Whether a virtual stage is this role's. */
  const isMine = (virtual: number): boolean => stageOfVirtual(pipeline, virtual) === stage;
  const inputs: Record<string, string> = {};
  const losses = new Map(graph.losses.map((l) => [l.value, l.name]));
  /** Losses of one name that owe the same share an accumulator; by name and layout. */
  const accumulators = new Map<string, { readonly name: string; readonly buffer: string }>();
  const taken = new Map<string, number>();

  const emit = ({ list }: BlockBuilder, i: Instruction | Reshard): void => {
    const n = (taken.get(i.id) ?? 0) + 1;
    taken.set(i.id, n);
    list.push(n === 1 ? i : { ...i, id: `${i.id}#${n}` });
  };
  const add = (b: Buffer): string => {
    if (!buffers.has(b.id)) buffers.set(b.id, b);
    return b.id;
  };
  const local = (sizes: readonly number[], shardedBy: ShardedValue["layout"]["shardedBy"]) =>
    sizes.map((n, slot) => n / shardCount(mesh, shardedBy[slot]!));
  const scalar = (id: string, kind: BufferKind, partial: readonly number[] = []): string =>
    add({ id, kind, dtype: "f32", shape: [], sizes: [], ragged: 0, shardedBy: [], ...(partial.length ? { partial: [...partial] } : {}) });

  /** Where an instruction says how many rows it needed, and how many there is room for. */
  const bounds: Program["bounds"] = [];
  const needed = (id: string, bound: number): string => {
    const buffer = add({ id: `${id}.needed`, kind: "gradient", dtype: "i32", shape: [], sizes: [], ragged: 0, shardedBy: [] });
    if (!bounds.some((b) => b.needed === buffer)) bounds.push({ needed: buffer, bound, of: "rows" });
    return buffer;
  };

  /** The axes that cut a slot; where a smaller stride is the outer one, which is rare, each factor by itself: `ep>edp`. */
  const cutName = (fs: readonly number[], expert: boolean): string =>
    fs.every((f, i) => i === 0 || f < fs[i - 1]!) ? axesName(mesh, fs, expert) : fs.map((f) => axesName(mesh, [f], expert)).join(">");
  /** A layout as part of a name: `@dp,tp,-` says which axes cut each slot, `+tp` over which a sum is owed. */
  const layoutText = ({ layout: l, value: v, note = "" }: ShardedValue, expert = isExpert(v)): string => {
    const name = (fs: readonly number[]) => cutName(fs, expert);
    const shardedBy = l.shardedBy.map((fs) => (fs.length ? name(fs) : "-")).join(",");
    return `@${shardedBy}${l.partialSum.length ? `+${name(l.partialSum)}` : ""}${l.partialMax.length ? `^${name(l.partialMax)}` : ""}${note.replace(/~[\d.,]*/, "~")}`;
  };

  /** The index buffer of a ragged piece, shared by all values with the same rows. */
  function rowsOf({ value: v, layout, note = "" }: ShardedValue, bound: number): string {
    const shardedBy = layout.shardedBy.slice(0, 3).map((fs) => (fs.length ? cutName(fs, true) : "-"));
    // halfway between two moves, which rows are here depends on the blocks they are counted in
    const counted = /~([\d.]*,[\d.]*,[\d.]*)/.exec(note)?.[1];
    const id = `${rowsetOf(v)}.rows@${shardedBy.join(",")}${counted === undefined ? "" : `~${counted}`}`;
    const length = indexLength(bound, v.sizes[2]! / shardCount(mesh, layout.shardedBy[2]!));
    return add({ id, kind: "workspace", dtype: "i32", shape: [length], sizes: [length], ragged: 0, shardedBy: [[]] });
  }
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
  function bufferOf(shardedValue: ShardedValue): string {
    const { value: v, layout } = shardedValue;
    const atHome = layoutKey(shardedValue) === layoutKey({ value: v, layout: placement.get(v)!.layout });
    const loss = lossBuffer(v);
    const id = loss ?? idOf(v) + (atHome ? "" : layoutText(shardedValue));
    if (buffers.has(id)) return id;
    if (v.leaf?.kind === "input" && atHome) inputs[v.leaf.name] = id;
    const partial = [...layout.partialSum, ...layout.partialMax];
    const common = {
      id,
      dtype: v.dtype,
      sizes: [...v.sizes],
      ragged: v.ragged,
      shardedBy: layout.shardedBy.map((c) => [...c]),
      ...(partial.length ? { partial } : {}),
    };
    // what one microbatch leaves to the next is kept over the step, and zeroed with the gradients
    const kept = loss !== undefined || v.node?.op.inPlace?.includes(v.node.op.outputs[v.out]!.name);
    if (!v.ragged) return add({ ...common, kind: kept ? "gradient" : "workspace", shape: local(v.sizes, layout.shardedBy) });
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

  function move(
    block: BlockBuilder,
    s: Extract<ShardStep, { kind: "collective" }>,
    from: string,
    to: string,
    expert = isExpert(s.from.value),
  ): void {
    const ragged = s.from.value.ragged > 0;
    const slotOf = (l: ShardedValue["layout"]) => l.shardedBy.findIndex((c) => c.includes(s.subAxes[0]!));
    // rows that go to where their experts are, and come back
    const name =
      !ragged || s.how !== "all_to_all" ? s.how : slotOf(s.to.layout) === 2 ? "dispatch" : slotOf(s.from.layout) === 2 ? "combine" : s.how;
    emit(block, {
      kind: "reshard",
      // no collective names the axes of a fold
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
  /** `from` and `to` are virtual stages; whatever goes from one to another in one kind of block goes by one channel. */
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
  /** An op over whole buffers. */
  function elementwise(
    op: AnyOp,
    id: string,
    reads: Record<string, string>,
    writes: Record<string, string>,
    attrs: Record<string, number> = {},
  ): Compute {
    const any = [...op.inputs, ...op.outputs].find((o) => o.any);
    const like = any && buffers.get(reads[any.name] ?? writes[any.name]!)!;
    const dims: Compute["dims"] = Object.fromEntries(like ? like.sizes.map((n, i) => [`#${i}`, [n, [...like.shardedBy[i]!]]]) : []);
    for (const { name, dimSpecs } of op.inputs)
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
    move,
    transfer,
    elementwise,
  };
}

interface Ends {
  readonly from: number;
  readonly to: number;
}

/** Values made from the same routing have the same rows: the id of the routing they came from. */
function rowsetOf(v: Value): string {
  const node = v.node!;
  if (node.op.rows) return idOf(node.args[node.op.inputs.findIndex((i) => i.name === "c")]!);
  return rowsetOf(node.args.find((a) => a.ragged)!);
}
