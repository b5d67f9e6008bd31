/**
 * Lowering of the sharded graph to programs. A program has buffers with stable names and blocks of instructions: forward and backward
 * of one microbatch for each chunk of layers, and one step block. Backward accumulates parameter gradients in place.
 */

import { touchedBy, transportOps, visitTouched, writesOf } from "../../schemas/effects.ts";
import type { Job } from "../../schemas/job.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { Buffer, Chunk, Compute, Instruction, Program } from "../../schemas/plan.ts";
import { type Block, blocksOf } from "../../schemas/program.ts";
import type { BufferTable } from "../analysis/bufferTable.ts";
import { accumulate } from "../ops/gemm.ts";
import { invariant } from "../ops/op.ts";
import { idOf } from "./backward.ts";
import { computeInstruction, partsOf } from "./computeInstruction.ts";
import { pairs, variantText } from "./layout.ts";
import { lowerCollectives } from "./lowerCollectives.ts";
import type { Mesh } from "./mesh.ts";
import { optimizerStep, reduceEvaluation } from "./optimizerStep.ts";
import { chunkOfVirtual, layersOf } from "./pipelineStages.ts";
import { type BlockBuilder, type Lowered, type ProgramBuilder, programBuilder } from "./programBuilder.ts";
import { expandRing, isRing } from "./ring.ts";
import type { ShardStep } from "./sharding/steps.ts";

/**
 * Returns one program per stage, without kernels and memory. `lowered` has the results of the passes before. `only`: the stages that are lowered;
 * default all.
 */
export function lower(job: Job, mesh: Mesh, lowered: Lowered, only?: ReadonlySet<number>): Program[] {
  const { graph, sharded, pipeline, evaluation } = lowered;
  return lowered.order.flatMap(({ order, copies }, stage): Program[] => {
    if (only && !only.has(stage)) return [];
    const role = programBuilder(job, mesh, lowered, stage);
    for (const p of graph.parameters) {
      const placed = sharded.placement.get(p);
      if (!placed || !role.isMine(placed.stage)) continue;
      const { layout } = placed;
      role.add({
        id: idOf(p),
        kind: "parameter",
        dtype: p.dtype,
        shape: role.local(p.sizes, layout.shardedBy),
        sizes: [...p.sizes],
        ragged: 0,
        shardedBy: layout.shardedBy.map((c) => [...c]),
        ...role.layerOf(p),
      });
    }
    const { forward: forwards, backward: backwards } = role.blocks;
    lowerMicrobatch(role, sharded.steps, new Set(graph.losses.map((l) => l.value)), (isBackward) => (isBackward ? backwards : forwards));
    const { parameters, metrics, mtp_losses } = optimizerStep(role, graph, sharded);
    if (evaluation)
      lowerMicrobatch(role, evaluation.sharded.steps, new Set(evaluation.graph.losses.map((l) => l.value)), () => role.blocks.evaluation);
    const losses = evaluation && reduceEvaluation(role, evaluation.sharded);
    const { forward, backward, step, ...evaluated } = lowerCollectives(role);
    const own = losses && { chunks: evaluated.evaluation, step: evaluated.evaluationStep, losses };
    const split = order.some(({ kind }) => kind === "weights");
    const chunks = pairs(pairs(forward, backward), copies).map(([[forwardBlock, backwardBlock], count], c) => ({
      layers: layersOf(pipeline, job, c * pipeline.stages + stage),
      copies: count,
      forward: forwardBlock,
      ...(split ? splitBackward(backwardBlock, role.buffers) : { backward: backwardBlock, weights: [] }),
    }));
    return [
      {
        stage,
        chunks,
        order: [...order],
        parameters,
        inputs: role.inputs,
        bounds: role.bounds,
        metrics,
        ...(mtp_losses && { mtp_losses }),
        buffers: assignKinds(role.buffers, { chunks, step, inputs: role.inputs, ...(own && { evaluation: own }) }),
        step,
        ...(own && { evaluation: own }),
      },
    ];
  });
}

/**
 * Splits a backward block in two. `weights` computes gradients of weights only, with the collectives and copies that nothing else
 * reads. `backward` has the rest, which the previous stage waits for.
 */
function splitBackward(block: readonly Instruction[], buffers: BufferTable): Pick<Chunk, "backward" | "weights"> {
  const ofWeights = new Set<Instruction>();
  /** Buffers that an instruction outside of `ofWeights` touches. */
  const needed = new Set<string>();
  for (const i of block.toReversed()) {
    const made = writesOf(i, buffers);
    const isGradient = i.kind === "compute" && made.every((id) => buffers.get(id).kind === "gradient");
    const serves =
      (i.kind === "collective" || (i.kind === "compute" && serving.has(i.op))) && made.every((id) => buffers.get(id).kind === "workspace");
    if (i.kind !== "send" && i.kind !== "recv" && made.length > 0 && (isGradient || serves) && !made.some((id) => needed.has(id)))
      ofWeights.add(i);
    else for (const id of touchedBy(i, buffers)) needed.add(id);
  }
  return { backward: block.filter((i) => !ofWeights.has(i)), weights: block.filter((i) => ofWeights.has(i)) };
}
/** Ops that serve a collective: those around it, and the op that adds gradients up. */
const serving: ReadonlySet<OpName> = new Set([...transportOps, accumulate.name]);

/**
 * Lowers the steps of one microbatch that run on this stage. Values in `losses` accumulate over microbatches. `blocks` returns the blocks of
 * forward or of backward steps by chunk.
 */
function lowerMicrobatch(
  role: ProgramBuilder,
  steps: readonly ShardStep[],
  losses: ReadonlySet<unknown>,
  blocks: (isBackward: boolean) => readonly BlockBuilder[],
): void {
  const { isMine, pipeline, buffers, bufferOf, emit } = role;
  const producers = new Map<string, { at: number; block: BlockBuilder; out: string }>();
  const blockOf = (backward: boolean, virtual: number): BlockBuilder => {
    const block = blocks(backward)[chunkOfVirtual(pipeline, virtual)];
    invariant(block !== undefined, () => `no chunk has the virtual stage ${virtual}`);
    return block;
  };

  function compute(step: Extract<ShardStep, { kind: "compute" }>) {
    const { stage, node, outs } = step;
    const block = blockOf(node.backward, stage);
    const parts = partsOf(step, bufferOf);
    const { writes } = parts;
    const added = new Set(outs.flatMap((v) => (losses.has(v.value) ? bufferOf(v) : [])));
    const accumulates = Object.entries(writes).flatMap(([name, id]) => (added.has(id) || node.op.inPlace?.includes(name) ? [name] : []));
    for (const [out, by] of Object.entries(node.op.limits ?? {})) {
      const [needed, bound] = [writes[out], node.attrs[by]];
      invariant(needed !== undefined && bound !== undefined, () => `${node.id} has no output ${out} or no attribute ${by}`);
      role.bounds.push({ needed, bound, of: "rounds" });
    }
    const rows = node.op.rows
      ? Object.values(writes)
          .map((id) => buffers.get(id).rows)
          .find((id) => id !== undefined)
      : undefined;
    const instruction = computeInstruction({ ...parts, accumulates, rows });
    if (node.ring && isRing(role, { instruction, ...node.ring })) {
      expandRing(role, block, { instruction, ...node.ring });
      return;
    }
    emit(block, instruction);
    for (const [out, id] of Object.entries(writes)) producers.set(id, { at: block.list.length - 1, block, out });
  }
  /** Redirects the op that writes a gradient to the accumulator. A gradient that was resharded since is added by an op instead. */
  function accumulateInto({ stage, parameter, shardedValue }: Extract<ShardStep, { kind: "accumulate" }>) {
    const target = `${idOf(parameter)}.grad`;
    const made = bufferOf(shardedValue);
    role.add({ ...buffers.get(made), id: target, kind: "gradient" });
    const by = producers.get(made);
    if (!by) return emit(blockOf(true, stage), role.elementwise(accumulate, `${target}.accumulate`, { x: made }, { y: target }));
    const i = by.block.list[by.at] as Compute;
    by.block.list[by.at] = { ...i, writes: { ...i.writes, [by.out]: target }, accumulates: [...(i.accumulates ?? []), by.out] };
    buffers.delete(made);
  }

  for (const s of steps) {
    if (s.kind === "send") {
      const ends = { from: s.stage, to: s.to };
      const tag = idOf(s.shardedValue.value) + variantText(s.received.variant ?? {}, "");
      if (isMine(s.stage)) role.transfer(blockOf(s.backward, s.stage), "send", bufferOf(s.shardedValue), ends, s.why, tag);
      if (isMine(s.to)) role.transfer(blockOf(s.backward, s.to), "recv", bufferOf(s.received), ends, s.why, tag);
    } else if (!isMine(s.stage)) continue;
    else if (s.kind === "compute") compute(s);
    else if (s.kind === "collective") role.reshard(blockOf(s.backward, s.stage), s, bufferOf(s.from), bufferOf(s.to));
    else accumulateInto(s);
  }
}

/**
 * Decides which buffers are activations: those that several blocks of one microbatch use. They exist once per microbatch in flight.
 * Drops workspace that no instruction uses. Throws an invariant if blocks without a common copy use one buffer.
 */
function assignKinds(buffers: BufferTable, program: Pick<Program, "chunks" | "step" | "inputs" | "evaluation">): Buffer[] {
  const inputs = new Set(program.inputs.map(({ buffer }) => buffer));
  const usedIn = new Map<string, Set<Block>>();
  for (const block of blocksOf(program)) {
    const use = (id: string): void => {
      const known = usedIn.get(id);
      if (known) known.add(block);
      else usedIn.set(id, new Set([block]));
    };
    for (const i of block.instructions) visitTouched(i, buffers, use);
  }
  return [...buffers.values()].flatMap((b) => {
    const used = [...(usedIn.get(b.id) ?? [])];
    if (used.length === 0 && b.kind === "workspace") return [];
    if (b.kind !== "workspace" || used.length === 1) return [b];
    const [chunk, another] = new Set(used.map((u) => u.chunk));
    // several chunks read this input: it stays workspace, and the host fills it for each block
    if (another !== undefined && inputs.has(b.id)) return [b];
    invariant(
      used.every((u) => u.kind !== "step" && u.chunk === chunk),
      `${b.id} is used by blocks that have no common activation copy`,
    );
    return [{ ...b, kind: "activation" as const, ...(chunk ? { chunk } : {}) }];
  });
}
