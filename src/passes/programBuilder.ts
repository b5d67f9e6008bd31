/**
 * The program builder collects the buffers and the instructions of one stage. It maps sharded values to buffers with stable names.
 * `lower` fills the forward and backward blocks, `optimizerStep` the step block.
 */
import type { Job } from "../../schemas/job.ts";
import type { Buffer, BufferKind, Collective, Compute, HostInput, Instruction, Program, Transfer } from "../../schemas/plan.ts";
import { shardCount } from "../../schemas/sharding.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { boundOfRows } from "../analysis/cost.ts";
import type { Loss } from "../model/builder.ts";
import { layerAtPosition } from "../model/positions.ts";
import { type AnyOp, invariant, rowSourceOf, type Value } from "../ops/op.ts";
import { indexLength } from "../ops/rearrange.ts";
import { idOf } from "./backward.ts";
import { dimAxesName, layoutText } from "./bufferNames.ts";
import { computeInstruction } from "./computeInstruction.ts";
import { blockAxesText, layoutKey, type ReshardKind, type ShardedValue } from "./layout.ts";
import { axesName, isExpert, type Mesh } from "./mesh.ts";
import { chunkOfVirtual, type Pipeline, stageOfVirtual } from "./pipelineStages.ts";
import type { Schedule } from "./schedule.ts";
import type { Reason, ShardedGraph, ShardStep } from "./sharding/steps.ts";
import type { ShardedJob } from "./shardJob.ts";

/** A block under construction. */
export interface BlockBuilder {
  readonly kind: "forward" | "backward" | "step" | "evaluation" | "evaluation_step";
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
export interface Lowered extends ShardedJob {
  /** The schedule of each stage. */
  readonly order: readonly Schedule[];
}
/** Where a transfer begins and ends, as virtual stages. */
interface Ends {
  readonly from: number;
  readonly to: number;
}
interface Accumulator extends Pick<Loss, "name" | "depth"> {
  readonly buffer: string;
}

/** Returns an empty program builder for a stage. */
export const programBuilder = (job: Job, mesh: Mesh, lowered: Lowered, stage: number): ProgramBuilder =>
  new ProgramBuilder(job, mesh, lowered, stage);

/** Buffers and blocks of one stage. Methods that other passes take by name are properties, so that they keep their builder. */
export class ProgramBuilder {
  readonly pipeline: Pipeline;
  readonly placement: ShardedGraph["placement"];
  readonly buffers = new BufferTable();
  readonly blocks: {
    readonly forward: readonly BlockBuilder[];
    readonly backward: readonly BlockBuilder[];
    readonly step: BlockBuilder;
    readonly evaluation: readonly BlockBuilder[];
    readonly evaluationStep: BlockBuilder;
  };
  readonly inputs: Program["inputs"] = [];
  /** Per check, the buffer to which an instruction writes the number of rows that it needed, and the capacity. */
  readonly bounds: Program["bounds"] = [];
  /** Accumulators of losses, by name, depth and layout. Losses that are equal in these share one. */
  readonly accumulators = new Map<string, Accumulator>();
  readonly #losses: ReadonlyMap<Value, Loss>;
  /** How many messages of one name this stage may have in flight. */
  readonly #inFlight: number;
  readonly #idCounts = new Map<string, number>();
  /** Per index of rows, its layout as a part of names. */
  readonly #rowLayouts = new Map<string, string>();
  /** Buffers of sharded values: `shard` passes one object to all uses of a value in its layout. */
  readonly #bufferIds = new Map<ShardedValue, string>();

  constructor(
    readonly job: Job,
    readonly mesh: Mesh,
    { graph, sharded: { placement }, pipeline, order, evaluation }: Lowered,
    readonly stage: number,
  ) {
    this.placement = evaluation ? new Map([...placement, ...evaluation.sharded.placement]) : placement;
    this.pipeline = pipeline;
    this.#losses = new Map([...graph.losses, ...(evaluation?.graph.losses ?? [])].map((l) => [l.value, l]));
    this.#inFlight = order[stage]?.inFlight ?? 1;
    const emptyBlock = (kind: BlockBuilder["kind"], chunk = 0): BlockBuilder => ({ kind, chunk, list: [] });
    const each = (kind: BlockBuilder["kind"]) => Array.from({ length: pipeline.chunks }, (_, chunk) => emptyBlock(kind, chunk));
    this.blocks = {
      ...{ forward: each("forward"), backward: each("backward"), step: emptyBlock("step") },
      ...{ evaluation: each("evaluation"), evaluationStep: emptyBlock("evaluation_step") },
    };
  }

  /** Returns whether this stage runs a virtual stage. */
  readonly isMine = (virtual: number): boolean => stageOfVirtual(this.pipeline, virtual) === this.stage;

  /** Appends an instruction to a block. Repeated ids get a suffix: `#2`. */
  readonly emit = ({ list }: BlockBuilder, i: Instruction | Reshard): void => {
    const n = (this.#idCounts.get(i.id) ?? 0) + 1;
    this.#idCounts.set(i.id, n);
    list.push(n === 1 ? i : { ...i, id: `${i.id}#${n}` });
  };

  /** Adds a buffer unless its id exists. Returns the id. */
  readonly add = (b: Buffer): string => this.buffers.add(b);

  /** Adds an f32 scalar. Returns its id. */
  readonly scalar = (id: string, kind: BufferKind, partial: readonly number[] = []): string =>
    this.add({
      id,
      kind,
      dtype: "f32",
      shape: [],
      sizes: [],
      ragged: 0,
      shardedBy: [],
      ...(partial.length ? { partial: [...partial] } : {}),
    });

  /** Returns the layer of a value as a field of its buffer. Inputs belong to no layer: several layers may read one. */
  layerOf({ node, leaf }: Value): Pick<Buffer, "layer"> {
    const position = node?.namedAt ?? node?.position ?? (leaf?.kind === "input" ? undefined : leaf?.position);
    const layer = position === undefined ? undefined : layerAtPosition(this.job.model, position);
    return layer === undefined ? {} : { layer };
  }
  /** Returns the local shape of a tensor. */
  local(sizes: readonly number[], shardedBy: ShardedValue["layout"]["shardedBy"]): number[] {
    return sizes.map((n, dim) => n / shardCount(this.mesh, shardedBy[dim] ?? []));
  }
  /** Returns the bytes of a buffer on one rank. */
  bytes(id: string): number {
    return this.buffers.bytesOf(id);
  }
  /** Returns a layout as part of a name. */
  layoutText(shardedValue: ShardedValue, expert = isExpert(shardedValue.value)): string {
    return layoutText(this.mesh, shardedValue, expert);
  }

  /** Returns the layout in the name of an index of rows. Throws an invariant if the buffer is no index. */
  rowLayout(rows: string): string {
    const found = this.#rowLayouts.get(rows);
    invariant(found !== undefined, () => `${rows} is no index of rows`);
    return found;
  }

  /** Declares that the host fills a buffer. Returns the id of the buffer. */
  input(source: HostInput, buffer: string): string {
    if (!this.inputs.some((i) => i.buffer === buffer)) this.inputs.push({ ...source, buffer });
    return buffer;
  }

  /** Adds the i32 buffer for the number of rows that `id` needed, with its capacity. Returns its id. */
  needed(id: string, bound: number, layer: Pick<Buffer, "layer">): string {
    const scalar = { dtype: "i32" as const, shape: [], sizes: [], ragged: 0, shardedBy: [] };
    const buffer = this.add({ id: `${id}.needed`, kind: "gradient", ...scalar, ...layer });
    if (!this.bounds.some((b) => b.needed === buffer)) this.bounds.push({ needed: buffer, bound, of: "rows" });
    return buffer;
  }

  /** Returns the id of the accumulator of a loss; undefined for any other value. */
  lossBuffer(value: Value): string | undefined {
    const loss = this.#losses.get(value);
    if (loss === undefined) return undefined;
    const { name, depth = 1 } = loss;
    const shardedValue = { value, layout: this.#placementOf(value) };
    const base = depth > 1 ? `${name}_${depth}` : name;
    const key = `${base}|${layoutKey(shardedValue)}`;
    const known = this.accumulators.get(key);
    if (known) return known.buffer;
    const another = [...this.accumulators.values()].some((a) => a.name === name && a.depth === depth);
    const buffer = another ? base + this.layoutText(shardedValue) : base;
    this.accumulators.set(key, { name, depth, buffer });
    return buffer;
  }

  /** Adds the buffer of a sharded value unless it exists. Returns its id. */
  readonly bufferOf = (shardedValue: ShardedValue): string => {
    const known = this.#bufferIds.get(shardedValue);
    if (known !== undefined && this.buffers.has(known)) return known;
    const id = this.#addBuffer(shardedValue);
    this.#bufferIds.set(shardedValue, id);
    return id;
  };

  #addBuffer(shardedValue: ShardedValue): string {
    const { value: v, layout } = shardedValue;
    const placed = this.#placementOf(v);
    // most values are used in the layout in which they were placed: comparing texts takes longer
    const isPlacement =
      (layout === placed && shardedValue.variant === undefined) || layoutKey(shardedValue) === layoutKey({ value: v, layout: placed });
    const loss = this.lossBuffer(v);
    const id = loss ?? idOf(v) + (isPlacement ? "" : this.layoutText(shardedValue));
    if (this.buffers.has(id)) return id;
    if (v.leaf?.source && isPlacement) this.input(v.leaf.source, id);
    const partial = [...layout.partialSum, ...layout.partialMax];
    const shape = this.local(v.sizes, layout.shardedBy);
    const common = {
      ...{ id, dtype: v.dtype, sizes: [...v.sizes], ragged: v.ragged, shardedBy: layout.shardedBy.map((fs) => [...fs]) },
      ...(partial.length ? { partial } : {}),
      ...(loss === undefined && this.layerOf(v)),
    };
    // state that one microbatch passes to the next lives for the whole step and is zeroed with the gradients
    const isLasting = loss !== undefined || isUpdatedInPlace(v);
    if (!v.ragged) return this.add({ ...common, kind: isLasting ? "gradient" : "workspace", shape });
    const bound = boundOfRows(this.mesh, v, layout.shardedBy, this.job.model.moe?.rows_bound ?? "worst");
    return this.add({
      ...{ ...common, kind: "workspace", shape: [bound, ...shape.slice(3)], fanout: v.fanout },
      ...(v.meanFanout !== undefined && { meanFanout: v.meanFanout }),
      ...(v.quota ? { quota: { ...v.quota } } : {}),
      rows: this.#rowsOf(shardedValue, bound),
    });
  }

  /** Emits a reshard step of `shard` between two buffers. */
  reshard(
    block: BlockBuilder,
    s: Extract<ShardStep, { kind: "collective" }>,
    from: string,
    to: string,
    expert = isExpert(s.from.value),
  ): void {
    const name = nameOf(s);
    this.emit(block, {
      kind: "reshard",
      // no collective names the axes of a regrid
      id: `${to}${s.how === "regrid" ? this.layoutText(s.to) : ""}.${name}`,
      ...{ how: s.how, name, axes: axesName(this.mesh, s.subAxes, expert), subAxes: [...s.subAxes], from, to },
      blockAxes: s.blockAxes,
      why: this.#why(s.why),
    });
  }

  /** Emits a send or a receive between two virtual stages. All transfers between them in one kind of block use one channel. */
  transfer(block: BlockBuilder, kind: Transfer["kind"], buffer: string, { from, to }: Ends, why: Reason, tag: string): void {
    const { pipeline, stage } = this;
    const peer = stageOfVirtual(pipeline, kind === "send" ? to : from);
    invariant(peer !== stage, `${tag}: stage ${stage} would send to itself`);
    const chunk = chunkOfVirtual(pipeline, from);
    const channel = block.kind === "step" ? "step" : `${block.kind}${pipeline.chunks > 1 ? ` of chunk ${chunk}` : ""}`;
    const isAhead = kind === "send" && block.kind !== "step" && chunk !== chunkOfVirtual(pipeline, to) && this.#inFlight > 1;
    this.emit(block, {
      ...{ kind, id: `${tag}.${kind}`, buffer, tag, peer, channel, bytes: this.bytes(buffer) },
      ...(isAhead ? { in_flight: this.#inFlight } : {}),
      why: this.#why(why),
    });
  }

  /** Returns a compute instruction that applies an op to all local elements of its buffers. */
  readonly elementwise = (
    op: AnyOp,
    id: string,
    reads: Record<string, string>,
    writes: Record<string, string>,
    attrs: Record<string, number> = {},
  ): Compute => {
    const dims: Compute["dims"] = {};
    for (const { name, dimSpecs } of op.inputs.filter((o) => !o.any)) {
      const { sizes, shardedBy } = this.buffers.get(reads[name] ?? `${id}.${name}`);
      for (const [at, { dim }] of dimSpecs.entries()) dims[dim] = [sizes[at] ?? 1, [...(shardedBy[at] ?? [])]];
    }
    return computeInstruction({ op, id, reads, writes, dims, attrs });
  };

  /** Returns an origin as the plan stores it. */
  #why({ position, ...why }: Reason): Collective["why"] {
    const layer = position === undefined ? undefined : layerAtPosition(this.job.model, position);
    return layer === undefined ? why : { ...why, layer };
  }
  #placementOf(v: Value): ShardedValue["layout"] {
    const placed = this.placement.get(v);
    invariant(placed !== undefined, () => `${idOf(v)} has no placement`);
    return placed.layout;
  }

  /** Adds the index buffer of a ragged value; all values with the same rows share it. Returns its id. */
  #rowsOf({ value: v, layout, variant }: ShardedValue, bound: number): string {
    const rowDims = layout.shardedBy.slice(0, 3);
    const axes = rowDims.map((fs) => (fs.length ? dimAxesName(this.mesh, fs, true) : "-"));
    // for an intermediate reshard result, the rows depend on how blocks are numbered
    const counted = variant?.blockAxes && blockAxesText(variant.blockAxes.slice(0, 3));
    const rowLayout = `@${axes.join(",")}${counted === undefined ? "" : `~${counted}`}`;
    const id = `${rowsetOf(v)}.rows${rowLayout}`;
    this.#rowLayouts.set(id, rowLayout);
    const [, , experts = 1] = this.local(v.sizes.slice(0, 3), rowDims);
    const length = indexLength(bound, experts);
    return this.add({
      id,
      kind: "workspace",
      dtype: "i32",
      shape: [length],
      sizes: [length],
      ragged: 0,
      shardedBy: [[]],
      ...this.layerOf(v),
    });
  }
}

/** Returns whether the op that makes a value also reads it, as state that microbatches pass on. */
const isUpdatedInPlace = ({ node, out }: Value): boolean => {
  const name = node?.op.outputs[out]?.name;
  return name !== undefined && node?.op.inPlace?.includes(name) === true;
};

/** Returns what people call a reshard step: rows are dispatched to the ranks of their experts, and combined on the way back. */
function nameOf({ how, subAxes: [first], from, to }: Extract<ShardStep, { kind: "collective" }>): string {
  const shardsExperts = (l: ShardedValue["layout"]) => first !== undefined && l.shardedBy[2]?.includes(first);
  if (from.value.ragged === 0 || how !== "all_to_all") return how;
  return shardsExperts(to.layout) ? "dispatch" : shardsExperts(from.layout) ? "combine" : how;
}

/** Returns the id of the routing that a ragged value comes from. Values of one routing have the same rows. */
function rowsetOf(v: Value): string {
  const { node } = v;
  invariant(node !== undefined, () => `${idOf(v)} is ragged and has no routing`);
  const source = node.op.rows ? node.args[node.op.inputs.findIndex((i) => i.name === "c")] : rowSourceOf(node);
  invariant(source !== undefined, () => `${node.id} has no ragged operand`);
  return node.op.rows ? idOf(source) : rowsetOf(source);
}
