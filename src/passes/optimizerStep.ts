/**
 * The step block of a stage. It reduces partial gradients in place, computes the global norm over all ranks, updates each rank's shard
 * of the f32 master weights, and gathers the parameters. A parameter with a custom update rule (expert bias) has token counts in place
 * of a gradient. The norm excludes it, and its op updates all of it on every rank.
 */
import type { Job } from "../../schemas/job.ts";
import type { Parameter, Transfer } from "../../schemas/plan.ts";
import { shardCount } from "../../schemas/sharding.ts";
import { isCount } from "../model/builder.ts";
import { accumulate, cast } from "../ops/linear.ts";
import { invariant, type Value } from "../ops/op.ts";
import * as optimizer from "../ops/optimizer.ts";
import { type Graph, idOf } from "./backward.ts";
import { axesName, isExpert } from "./mesh.ts";
import { headAt } from "./pipeline.ts";
import type { ProgramBuilder } from "./programBuilder.ts";
import type { ShardedGraph } from "./sharding/steps.ts";

/** Fills the step block. Returns the parameters of this stage, and per metric the buffers whose sum is its value. */
export function optimizerStep(
  role: ProgramBuilder,
  graph: Graph,
  sharded: ShardedGraph,
): { parameters: Parameter[]; metrics: Record<string, string[]> } {
  const { job, mesh, isMine, placement, buffers, blocks, emit, scalar, elementwise } = role;
  const mine = graph.parameters.filter((p) => isMine(placement.get(p)!.stage));
  const { gradients, reducedLoss } = reduceDeferred(role, graph, sharded);
  const gradientOf = (p: Value) => gradients.get(p) ?? `${idOf(p)}.grad`;
  shareTied(role, graph, gradientOf);
  const owned = mine.filter((p) => !p.leaf!.tiedTo);
  const losses: Record<string, string[]> = {};
  for (const { name, buffer } of role.accumulators.values()) (losses[name] ??= []).push(reducedLoss.get(buffer) ?? buffer);

  // the global norm counts every element once over all ranks; a stage without parameters adds zero
  scalar("grad_norm.squared", "gradient");
  for (const p of owned) {
    if (p.leaf!.rule) continue;
    const g = buffers.get(gradientOf(p))!;
    const scale = shardCount(mesh, g.shardedBy.flat()) / mesh.per_stage;
    emit(blocks.step, elementwise(optimizer.sumSquares, `${idOf(p)}.grad.squared`, { g: g.id }, { y: "grad_norm.squared" }, { scale }));
  }
  // a loss that is not finite skips the step too; the mark is part of the sum that all ranks reduce, so all ranks agree
  for (const [name, ids] of Object.entries(losses).filter(([name]) => !isCount(name)))
    for (const x of ids)
      emit(blocks.step, elementwise(optimizer.markNonfinite, `${name}.mark_nonfinite`, { x }, { y: "grad_norm.squared" }));
  let squared = "grad_norm.squared";
  if (mesh.world > 1) {
    squared = scalar("grad_norm.squared.total", "workspace");
    emit(blocks.step, {
      kind: "reshard",
      id: `${squared}.all_reduce`,
      how: "all_reduce",
      name: "all_reduce",
      axes: "world",
      subAxes: mesh.subAxes.map((_, f) => f),
      world: true,
      from: "grad_norm.squared",
      to: squared,
      blockAxes: [],
      why: { op: "clip", because: "the norm is of the gradient of the whole model", path: "train.optimizer.clip" },
    });
  }
  const scale = scalar("clip.scale", "workspace");
  const norm = scalar("grad_norm", "optimizer");
  const { optimizer: how, precision } = job.train;
  const input = (name: string): string => (role.inputs[name] = scalar(name, "optimizer"));
  const limit = { max: how.clip };
  if (precision !== "fp16") emit(blocks.step, elementwise(optimizer.clip, "clip", { sq: squared }, { scale, norm }, limit));
  else emit(blocks.step, elementwise(optimizer.clipScaled, "clip", { sq: squared, by: input("loss_scale") }, { scale, norm }, limit));
  input("lr");
  if (how.type !== "sgd") input("step");
  if (isScheduled(how)) input("weight_decay");

  const masters = new Map(owned.map((p) => [p, updateParameter(role, sharded, p, gradientOf(p), scale)]));
  returnTied(role, graph);
  const parameters = mine.map((p): Parameter => {
    const { name, init, rule, tiedTo } = p.leaf!;
    return {
      name,
      init: init!,
      rule: rule?.name ?? how.type,
      buffer: name,
      gradient: gradientOf(p),
      master: masters.get(p) ?? name,
      ...(tiedTo === undefined ? {} : { tied_to: name }),
    };
  });
  return { parameters, metrics: { grad_norm: [norm], ...losses } };
}

/** Emits the deferred reductions of gradients, each in the bytes of its accumulator, and of losses. Returns the reduced buffers. */
function reduceDeferred(role: ProgramBuilder, graph: Graph, sharded: ShardedGraph) {
  const { isMine, buffers, add, local } = role;
  const gradients = new Map<Value, string>();
  const reducedLoss = new Map<string, string>();
  const parameterOf = new Map(graph.parameters.map((p) => [sharded.accumulated.get(p)!.value, p]));
  for (const s of sharded.deferred) {
    if (s.kind !== "collective" || !isMine(s.stage)) continue;
    const p = parameterOf.get(s.from.value);
    const { shardedBy, partialSum } = s.to.layout;
    if (!p) {
      const loss = role.lossBuffer(s.from.value)!;
      const from = reducedLoss.get(loss) ?? loss;
      const { partial: _, ...like } = buffers.get(from)!;
      const shape = local(s.to.value.sizes, shardedBy);
      const to = add({
        ...like,
        id: `${from}.reduced`,
        shape,
        shardedBy: shardedBy.map((c) => [...c]),
        ...(partialSum.length ? { partial: [...partialSum] } : {}),
      });
      reducedLoss.set(loss, to);
      role.reshard(role.blocks.step, s, from, to);
      continue;
    }
    const from = gradients.get(p) ?? `${idOf(p)}.grad`;
    const { partial: _, ...source } = buffers.get(from)!;
    const to = add({
      ...source,
      id: `${idOf(p)}.grad${role.layoutText(s.to, isExpert(p))}`,
      within: source.within ?? source.id,
      shape: local(p.sizes, shardedBy),
      shardedBy: shardedBy.map((c) => [...c]),
      ...(partialSum.length ? { partial: [...partialSum] } : {}),
    });
    gradients.set(p, to);
    role.reshard(role.blocks.step, s, from, to, isExpert(p));
  }
  return { gradients, reducedLoss };
}

type OptimizerOptions = Job["train"]["optimizer"];
/** Returns whether weight decay changes over the run, so that it is an input of the step. */
const isScheduled = ({ weight_decay_schedule }: OptimizerOptions): boolean => weight_decay_schedule !== "constant";

/** Returns the update op with constant and with scheduled weight decay, the scalars that it reads, its moments and its attributes. */
function methodOf({ type, betas, eps, momentum }: OptimizerOptions) {
  const adaptive = { reads: { lr: "lr", step: "step" }, moments: ["m", "v"], attrs: { beta1: betas[0]!, beta2: betas[1]!, eps } };
  if (type === "adamw") return { own: optimizer.adamw, scheduledOp: optimizer.adamwScheduled, ...adaptive };
  if (type === "adam") return { own: optimizer.adam, scheduledOp: optimizer.adamScheduled, ...adaptive };
  const reads = { lr: "lr" };
  if (momentum === 0) return { own: optimizer.sgd, scheduledOp: optimizer.sgdScheduled, reads, moments: [], attrs: {} };
  return { own: optimizer.sgdMomentum, scheduledOp: optimizer.sgdMomentumScheduled, reads, moments: ["m"], attrs: { momentum } };
}

/** Emits the update of this rank's shard and the all-gather of the parameter, or its custom rule. Returns the buffer of the f32 weights. */
function updateParameter(
  { job, mesh, placement, buffers, blocks, add, emit, elementwise }: ProgramBuilder,
  sharded: ShardedGraph,
  p: Value,
  gradient: string,
  scale: string,
): string {
  const name = idOf(p);
  const { rule } = p.leaf!;
  if (rule) {
    const [n, own] = [rule.op.inputs[0]!.name, rule.op.outputs[0]!.name];
    emit(blocks.step, elementwise(rule.op, `${name}.update`, { [n]: gradient, scale }, { [own]: name }, rule.attrs));
    return name;
  }
  const { optimizer: how } = job.train;
  const { within: _, partial: __, ...state } = buffers.get(gradient)!;
  const like = (suffix: string) => add({ ...state, id: `${name}.${suffix}`, kind: "optimizer", dtype: "f32" });
  const parameterSharding = placement.get(p)!.layout.shardedBy;
  const shard = sharded.update.get(p)!.layout.shardedBy;
  const subAxes = shard
    .flat()
    .filter((f) => !parameterSharding.flat().includes(f))
    .sort((a, b) => a - b);
  const master = subAxes.length || p.dtype !== "f32" ? like("master") : name;
  const { own, scheduledOp, reads, moments, attrs } = methodOf(how);
  // weight decay applies to parameters with two or more dims
  const decays = p.sizes.length > 1;
  const scheduled = decays && isScheduled(how);
  emit(
    blocks.step,
    elementwise(
      scheduled ? scheduledOp : own,
      `${name}.${how.type}`,
      { g: gradient, scale, ...reads, ...(scheduled ? { decay: "weight_decay" } : {}) },
      { w: master, ...Object.fromEntries(moments.map((m) => [m, like(m)])) },
      { ...attrs, ...(scheduled ? {} : { decay: decays ? how.weight_decay : 0 }) },
    ),
  );
  let from = master;
  if (p.dtype !== "f32") {
    from = subAxes.length ? add({ ...state, id: `${name}.cast`, kind: "workspace", dtype: p.dtype }) : name;
    emit(blocks.step, elementwise(cast, `${name}.cast`, { x: master }, { y: from }));
  }
  if (subAxes.length)
    emit(blocks.step, {
      kind: "reshard",
      id: `${name}.all_gather`,
      how: "all_gather",
      name: "all_gather",
      axes: axesName(mesh, subAxes, isExpert(p)),
      subAxes,
      from,
      to: name,
      blockAxes: shard,
      why: { op: `${name}.${how.type}`, because: "each rank updated its shard", path: "parallel.distributed_optimizer" },
    });
  return master;
}

/** Returns the tied copies of parameters with their owner, the origin of their transfers, and a name that is unique per owner. */
function tiedPairs({ job }: ProgramBuilder, graph: Graph) {
  const copies = graph.parameters.filter((p) => p.leaf!.tiedTo);
  return copies.map((copy, i) => {
    const { tiedTo, position } = copy.leaf!;
    const nth = copies.slice(0, i).filter((other) => other.leaf!.tiedTo === tiedTo).length;
    const isMtp = position < headAt(job.model);
    const why: Transfer["why"] = isMtp
      ? { op: "mtp.0.embedding", because: "the embedding is used on the first stage and by multi-token prediction", path: "model.mtp" }
      : { op: "logits", because: "the embedding is used on the first and on the last stage", path: "model.tie_embeddings" };
    return { copy, owner: tiedTo!, name: `tied${nth > 0 ? nth + 1 : ""}`, why };
  });
}

/** Emits the transfer of the gradient of each tied copy to the stage of its owner, and its addition there. */
function shareTied(role: ProgramBuilder, graph: Graph, gradientOf: (p: Value) => string): void {
  for (const { copy, owner, name, why } of tiedPairs(role, graph)) {
    const [from, to] = [role.placement.get(copy)!.stage, role.placement.get(owner)!.stage];
    const tag = `${idOf(owner)}.grad.${name}`;
    const ends = { from, to };
    if (role.isMine(from)) role.transfer(role.blocks.step, "send", gradientOf(copy), ends, why, tag);
    if (!role.isMine(to)) continue;
    const { within: _, ...own } = role.buffers.get(gradientOf(owner))!;
    invariant(!own.partial?.length, `${tag}: the gradient of the owner is still partial`);
    const received = role.add({ ...own, id: tag, kind: "workspace" });
    role.transfer(role.blocks.step, "recv", received, ends, why, tag);
    role.emit(role.blocks.step, role.elementwise(accumulate, `${tag}.accumulate`, { x: received }, { y: own.id }));
  }
}

/** Emits the transfer of the updated parameter from its owner to each tied copy. */
function returnTied(role: ProgramBuilder, graph: Graph): void {
  for (const { copy, owner, name, why } of tiedPairs(role, graph)) {
    const [from, to] = [role.placement.get(owner)!.stage, role.placement.get(copy)!.stage];
    const tag = `${idOf(owner)}.${name}`;
    if (role.isMine(from)) role.transfer(role.blocks.step, "send", idOf(owner), { from, to }, why, tag);
    if (role.isMine(to)) role.transfer(role.blocks.step, "recv", idOf(copy), { from, to }, why, tag);
  }
}
