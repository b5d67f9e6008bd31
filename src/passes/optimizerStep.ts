/**
 * The step block of a stage. It reduces partial gradients in place, computes the global norm over all ranks, and runs the updates that
 * `shard` placed: each rank updates its shard of the f32 weights, and parameters are gathered. A parameter with a declared update rule
 * (expert bias) has token counts in place of a gradient, which the norm excludes.
 */
import type { BufferKind, Collective, Compute, InputSource, Parameter, Program } from "../../schemas/plan.ts";
import { shardCount } from "../../schemas/sharding.ts";
import { isCount } from "../model/builder.ts";
import { cast } from "../ops/gemm.ts";
import { invariant, type Value } from "../ops/op.ts";
import * as optimizer from "../ops/optimizer.ts";
import { idOf } from "./backward.ts";
import { computeInstruction, partsOf } from "./computeInstruction.ts";
import { layoutKey, type ShardedValue } from "./layout.ts";
import { isExpert } from "./mesh.ts";
import { hostScalars } from "./parameterGroups.ts";
import type { BlockBuilder, ProgramBuilder } from "./programBuilder.ts";
import type { CollectiveStep, ShardedGraph } from "./sharding/steps.ts";
import { returnTied, shareTied } from "./tiedParameters.ts";
import { isReducedInBf16, type ParameterUpdate, type TrainingGraph } from "./updateGraph.ts";

/** Fills the step block. Returns the parameters of this stage, and per metric the buffers whose sum is its value. */
export function optimizerStep(
  role: ProgramBuilder,
  graph: TrainingGraph,
  sharded: ShardedGraph,
): Pick<Program, "parameters" | "metrics" | "mtp_losses"> {
  const mine = graph.updates.filter(({ parameter }) => role.isMine(placementOf(sharded, parameter).stage));
  const { gradients, reducedLoss } = reduceDeferred(role, graph, sharded);
  const gradientOf = (p: Value): string => gradients.get(p) ?? `${idOf(p)}.grad`;
  shareTied(role, graph, gradientOf);
  const losses: Program["metrics"] = {};
  const depths: string[][] = [];
  for (const { name, depth = 1, buffer } of role.accumulators.values()) {
    const reduced = reducedLoss.get(buffer) ?? buffer;
    if (name !== "evaluation") (losses[name] ??= []).push(reduced);
    if (name === "mtp_loss") (depths[depth - 1] ??= []).push(reduced);
  }

  const squared = squaredNorm(role, mine, gradientOf, losses);
  const { job, blocks, scalar, emit, elementwise } = role;
  const scale = scalar("clip.scale", "workspace");
  const norm = scalar("grad_norm", "optimizer");
  const input = (source: InputSource): string => role.input({ source }, scalar(source, "optimizer"));
  const limit = { max: job.train.optimizer.clip };
  if (job.train.precision !== "fp16") emit(blocks.step, elementwise(optimizer.clip, "clip", { sq: squared }, { scale, norm }, limit));
  else emit(blocks.step, elementwise(optimizer.clipScaled, "clip", { sq: squared, by: input("loss_scale") }, { scale, norm }, limit));
  for (const name of hostScalars(job.train)) input(name);

  const buffers = new UpdateBuffers(role, sharded, mine, gradientOf);
  for (const step of sharded.updates) {
    if (!role.isMine(step.stage)) continue;
    if (step.kind === "compute") emit(blocks.step, computeInstruction(partsOf(step, (v) => buffers.of(v))));
    else if (step.kind === "collective") emitReshard(role, step, buffers);
    else invariant(false, `${step.kind} in the update of a parameter`);
  }
  returnTied(role, graph);
  const parameters = mine.map((u) => parameterOf(u, gradientOf(u.parameter), buffers.weights(u)));
  const squares = job.train.metrics?.parameter_norm ? { parameter_squares: [parameterSquares(role, mine, buffers)] } : {};
  return { parameters, metrics: { grad_norm: [norm], ...losses, ...squares }, ...(depths.length > 1 && { mtp_losses: depths }) };
}

function placementOf({ placement }: ShardedGraph, v: Value) {
  const placed = placement.get(v);
  invariant(placed !== undefined, `${idOf(v)} has no placement`);
  return placed;
}

/** Fills the last block of an evaluation: the reductions of its losses. Returns the buffers whose sum is the loss of each source. */
export function reduceEvaluation(role: ProgramBuilder, sharded: ShardedGraph): string[] {
  const { reducedLoss } = reduceDeferred(role, { updates: [] }, sharded, role.blocks.evaluationStep);
  const own = [...role.accumulators.values()].filter(({ name }) => name === "evaluation");
  return own.map(({ buffer }) => reducedLoss.get(buffer) ?? buffer);
}

/** Emits the deferred reductions of gradients, each in the bytes of its accumulator, and of losses. Returns the reduced buffers. */
function reduceDeferred(
  role: ProgramBuilder,
  graph: Pick<TrainingGraph, "updates">,
  sharded: ShardedGraph,
  block: BlockBuilder = role.blocks.step,
) {
  const gradients = new Map<Value, string>();
  const reducedLoss = new Map<string, string>();
  const updateOfGradient = new Map(graph.updates.map((u) => [u.gradient, u]));
  for (const s of sharded.deferred) {
    if (s.kind !== "collective" || !role.isMine(s.stage)) continue;
    const update = updateOfGradient.get(s.from.value);
    const p = update?.parameter;
    const { shardedBy, partialSum } = s.to.layout;
    const accumulator = p ? `${idOf(p)}.grad` : role.lossBuffer(s.from.value);
    invariant(accumulator !== undefined, `${idOf(s.from.value)} is neither a gradient nor a loss`);
    const sum = (p ? gradients.get(p) : reducedLoss.get(accumulator)) ?? accumulator;
    const { partial: _, ...source } = role.buffers.get(sum);
    const isRounded = update !== undefined && sum === accumulator && isReducedInBf16(update, role.job.train);
    const from = isRounded ? rounded(role, block, accumulator) : sum;
    const to = role.add({
      ...source,
      dtype: role.buffers.get(from).dtype,
      id: p ? `${accumulator}${role.layoutText(s.to, isExpert(p))}` : `${from}.reduced`,
      ...(p && { within: source.within ?? source.id }),
      shape: role.local(s.to.value.sizes, shardedBy),
      shardedBy: shardedBy.map((c) => [...c]),
      ...(partialSum.length ? { partial: [...partialSum] } : {}),
    });
    if (p) gradients.set(p, to);
    else reducedLoss.set(accumulator, to);
    role.reshard(block, s, from, to, p && isExpert(p));
  }
  return { gradients, reducedLoss };
}

/** Emits the rounding of an accumulated gradient to the type in which it is sent. Returns the rounded copy. */
function rounded(role: ProgramBuilder, block: BlockBuilder, gradient: string): string {
  const { within: _, ...own } = role.buffers.get(gradient);
  const copy = role.add({ ...own, id: `${gradient}.bf16`, kind: "workspace", dtype: "bf16" });
  role.emit(block, role.elementwise(cast, `${gradient}.cast`, { x: gradient }, { y: copy }));
  return copy;
}

/**
 * Emits the sum of the squares of all gradients. It counts every element once over all ranks; a stage without parameters adds zero.
 * Returns the buffer of the sum.
 */
function squaredNorm(
  role: ProgramBuilder,
  mine: readonly ParameterUpdate[],
  gradientOf: (p: Value) => string,
  losses: Program["metrics"],
): string {
  const { blocks, emit, elementwise, scalar } = role;
  const own = scalar("grad_norm.squared", "gradient");
  for (const { parameter: p, weights } of mine) {
    if (p.leaf?.tiedTo || weights === p) continue;
    addSquares(role, `${idOf(p)}.grad.squared`, gradientOf(p), own);
  }
  // a loss that is not finite skips the step too; the mark is part of the sum that all ranks reduce, so all ranks agree
  for (const [name, ids] of Object.entries(losses))
    for (const x of isCount(name) ? [] : ids)
      emit(blocks.step, elementwise(optimizer.markNonfinite, `${name}.mark_nonfinite`, { x }, { y: own }));
  return sumOverWorld(
    role,
    own,
    "workspace",
    {},
    {
      ...{ op: "clip", because: "the norm is of the gradient of the whole model", path: "train.optimizer.clip" },
    },
  );
}

/** What only logged steps run. */
const logged = { only: "logged" } as const;

/** Emits the sum of the squares of all updated weights in logged steps. Returns the buffer of the sum, which is equal on all ranks. */
function parameterSquares(role: ProgramBuilder, mine: readonly ParameterUpdate[], buffers: UpdateBuffers): string {
  const own = role.scalar("parameter_squares", "gradient");
  for (const update of mine) {
    const { parameter: p, weights } = update;
    if (!p.leaf?.tiedTo && weights !== p) addSquares(role, `${idOf(p)}.squared`, buffers.weights(update), own, logged);
  }
  return sumOverWorld(role, own, "gradient", logged, {
    ...{ op: "sum_squares", because: "the norm is of the weights of the whole model", path: "train.metrics.parameter_norm" },
  });
}

/** Emits the addition of the squares of a buffer to a sum that counts every element once over all ranks. */
function addSquares(role: ProgramBuilder, id: string, g: string, y: string, only: Pick<Compute, "only"> = {}): void {
  const { mesh, blocks, buffers, emit, elementwise } = role;
  const scale = shardCount(mesh, buffers.get(g).shardedBy.flat()) / mesh.per_stage;
  emit(blocks.step, { ...elementwise(optimizer.sumSquares, id, { g }, { y }, { scale }), ...only });
}

/** Emits the sum of a scalar over all ranks. Returns its buffer. */
function sumOverWorld(
  { mesh, blocks, emit, scalar }: ProgramBuilder,
  own: string,
  kind: BufferKind,
  only: Pick<Compute, "only">,
  why: Collective["why"],
): string {
  if (mesh.world === 1) return own;
  const total = scalar(`${own}.total`, kind);
  emit(blocks.step, {
    kind: "reshard",
    id: `${total}.all_reduce`,
    how: "all_reduce",
    name: "all_reduce",
    axes: "world",
    subAxes: mesh.subAxes.map((_, f) => f),
    world: true,
    from: own,
    to: total,
    ...{ blockAxes: [], why, ...only },
  });
  return total;
}

/** Names and adds the buffers of the values of updates. */
class UpdateBuffers {
  readonly #role: ProgramBuilder;
  readonly #sharded: ShardedGraph;
  readonly #gradientOf: (p: Value) => string;
  /** Per leaf or result of an update, the update. */
  readonly #updates: ReadonlyMap<Value, ParameterUpdate>;

  constructor(role: ProgramBuilder, sharded: ShardedGraph, updates: readonly ParameterUpdate[], gradientOf: (p: Value) => string) {
    this.#role = role;
    this.#sharded = sharded;
    this.#gradientOf = gradientOf;
    this.#updates = new Map(
      updates.flatMap((u) =>
        [u.gradient, u.weights, ...u.state, ...u.nodes.flatMap((n) => n.outs)].map((v): [Value, ParameterUpdate] => [v, u]),
      ),
    );
  }

  /** Returns the update that a value is part of; undefined for a scalar of the step. */
  updateOf(v: Value): ParameterUpdate | undefined {
    return this.#updates.get(v);
  }
  /** Returns the buffer of the f32 weights of a parameter. */
  weights({ parameter, weights, nodes }: ParameterUpdate): string {
    return nodes.length > 0 ? this.of({ value: weights, layout: placementOf(this.#sharded, weights).layout }) : idOf(parameter);
  }
  /** Returns the buffer of a sharded value. Adds it unless it exists. */
  of(shardedValue: ShardedValue): string {
    const { value, layout } = shardedValue;
    const update = this.updateOf(value);
    if (!update) return idOf(value);
    const { parameter, gradient, weights } = update;
    if (value === gradient) return this.#gradientOf(parameter);
    const leaf = value.leaf ? value : value.updates;
    const isResult = value === update.result || (leaf === weights && parameter.dtype === weights.dtype);
    if (isResult && this.#isPlacement(parameter, layout)) return idOf(parameter);
    const isState = leaf !== undefined && this.#isPlacement(leaf, layout);
    const id = isState
      ? idOf(leaf)
      : idOf(value) + (this.#isPlacement(value, layout) ? "" : this.#role.layoutText(shardedValue, isExpert(parameter)));
    return this.#role.add({
      id,
      kind: isState ? "optimizer" : "workspace",
      dtype: value.dtype,
      shape: this.#role.local(value.sizes, layout.shardedBy),
      sizes: [...value.sizes],
      ragged: 0,
      shardedBy: layout.shardedBy.map((c) => [...c]),
      ...this.#role.layerOf(parameter),
    });
  }

  #isPlacement(v: Value, layout: ShardedValue["layout"]): boolean {
    const placed = placementOf(this.#sharded, v).layout;
    return layout === placed || layoutKey({ layout }) === layoutKey({ layout: placed });
  }
}

/** Emits a reshard within an update. */
function emitReshard(role: ProgramBuilder, step: CollectiveStep, buffers: UpdateBuffers): void {
  const update = buffers.updateOf(step.from.value);
  invariant(update !== undefined, `${idOf(step.from.value)} is no value of an update`);
  role.reshard(role.blocks.step, step, buffers.of(step.from), buffers.of(step.to), isExpert(update.parameter));
}

function parameterOf({ parameter, rule }: ParameterUpdate, gradient: string, master: string): Parameter {
  const { leaf } = parameter;
  invariant(leaf?.init !== undefined, `${idOf(parameter)} has no initial values`);
  const { name, init, tiedTo } = leaf;
  return { name, init, rule, buffer: name, gradient, master, ...(tiedTo === undefined ? {} : { tied_to: name }) };
}
