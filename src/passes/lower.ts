/**
 * lower: pieces and moves → one Program per role: buffers with stable names and instructions in blocks (forward and
 * backward of one microbatch, for each chunk of layers; the step block once). Backward adds parameter gradients up where they
 * lie.
 */
import type { Job } from "../../schemas/job.ts";
import type { Buffer, Chunk, Compute, Instruction, Program } from "../../schemas/plan.ts";
import { type Block, blocksOf } from "../../schemas/program.ts";
import { accumulate } from "../ops/linear.ts";
import { expand, invariant } from "../ops/op.ts";
import * as messages from "../ops/transport.ts";
import { idOf } from "./backward.ts";
import { lowerCollectives } from "./lowerCollectives.ts";
import type { Mesh } from "./mesh.ts";
import { optimizerStep } from "./optimizerStep.ts";
import { chunkOfVirtual, layersOf } from "./pipeline.ts";
import { type BlockBuilder, type Lowered, type ProgramBuilder, programBuilder } from "./programBuilder.ts";
import { expandRing, isRing } from "./ring.ts";
import type { ShardStep } from "./shard.ts";

export function lower(job: Job, mesh: Mesh, lowered: Lowered): Program[] {
  const { graph, sharded, pipeline } = lowered;
  return lowered.order.map(({ order, copies }, stage) => {
    const role = programBuilder(job, mesh, lowered, stage);
    for (const p of graph.parameters) {
      const { layout, stage: at } = sharded.placement.get(p)!;
      if (!role.isMine(at)) continue;
      role.add({
        id: idOf(p),
        kind: "parameter",
        dtype: p.dtype,
        shape: role.local(p.sizes, layout.shardedBy),
        sizes: [...p.sizes],
        ragged: 0,
        shardedBy: layout.shardedBy.map((c) => [...c]),
      });
    }
    lowerMicrobatch(role, sharded.steps, new Set(graph.losses.map((l) => l.value)));
    const { parameters, metrics } = optimizerStep(role, graph, sharded);
    const { forward, backward, step } = lowerCollectives(role);
    const split = order.some((tag) => tag.startsWith("W"));
    const chunks = forward.map((block, c) => ({
      layers: layersOf(pipeline, job, c * pipeline.stages + stage),
      copies: copies[c]!,
      forward: block,
      ...(split ? apart(backward[c]!, role.buffers) : { backward: backward[c]!, weights: [] }),
    }));
    return {
      stage,
      chunks,
      order: [...order],
      parameters,
      inputs: role.inputs,
      bounds: role.bounds,
      metrics,
      buffers: place(role.buffers, { chunks, step, inputs: role.inputs }),
      step,
    };
  });
}

/**
 * Backward in two: what makes the gradients of weights and nothing else, with the moves and copies that serve it alone, and the
 * rest, which the stage before waits for.
 */
function apart(block: readonly Instruction[], buffers: ReadonlyMap<string, Buffer>): Pick<Chunk, "backward" | "weights"> {
  const ofWeights = new Set<Instruction>();
  /** Read by an instruction that is no gradient of weights, or kept beyond the block. */
  const wanted = new Set<string>();
  for (const i of block.toReversed()) {
    const made = madeBy(i, buffers);
    const isGradient = i.kind === "compute" && made.every((id) => buffers.get(id)!.kind === "gradient");
    const serves =
      (i.kind === "collective" || (i.kind === "compute" && surrounds.has(i.op))) &&
      made.every((id) => buffers.get(id)!.kind === "workspace");
    if (i.kind !== "send" && i.kind !== "recv" && made.length > 0 && (isGradient || serves) && !made.some((id) => wanted.has(id)))
      ofWeights.add(i);
    else for (const id of touched(i, buffers)) wanted.add(id);
  }
  return { backward: block.filter((i) => !ofWeights.has(i)), weights: block.filter((i) => ofWeights.has(i)) };
}
/** Ops that stand around a collective, and what makes two gradients one. */
const surrounds = new Set([...Object.values(messages).flatMap((o) => (typeof o === "object" ? o.name : [])), accumulate.name]);

function madeBy(i: Instruction, buffers: ReadonlyMap<string, Buffer>): string[] {
  if (i.kind === "compute") return [...Object.values(i.writes), ...(i.rows ? [i.rows] : [])];
  if (i.kind === "send") return [];
  const to = i.kind === "collective" ? i.to : i.buffer;
  const { rows } = buffers.get(to)!;
  return rows ? [to, rows] : [to];
}

/** The steps of one microbatch that concern this role, as instructions. */
function lowerMicrobatch(role: ProgramBuilder, steps: readonly ShardStep[], losses: ReadonlySet<unknown>): void {
  const { isMine, pipeline, blocks, buffers, bufferOf, emit } = role;
  const producers = new Map<string, { at: number; block: BlockBuilder; out: string }>();
  const blockOf = (backward: boolean, virtual: number): BlockBuilder =>
    blocks[backward ? "backward" : "forward"][chunkOfVirtual(pipeline, virtual)]!;

  function compute({ stage, node, ins, outs, dims: shardedBy }: Extract<ShardStep, { kind: "compute" }>) {
    const { inputs, outputs } = expand(node);
    const block = blockOf(node.backward, stage);
    const dims: Compute["dims"] = {};
    for (const { dim } of [...inputs, ...outputs].flatMap((o) => o.dimSpecs))
      dims[dim] = [node.size[dim]!, [...(shardedBy.get(dim) ?? [])]];
    const reads = Object.fromEntries(inputs.map((o, i) => [o.name, bufferOf(ins[i]!)]));
    const writes = Object.fromEntries(outputs.map((o, i) => [o.name, bufferOf(outs[i]!)]));
    const accumulates = outputs.filter((o, i) => losses.has(outs[i]!.value) || node.op.inPlace?.includes(o.name)).map((o) => o.name);
    for (const [out, by] of Object.entries(node.op.limits ?? {}))
      role.bounds.push({ needed: writes[out]!, bound: node.attrs[by]!, of: "rounds" });
    const rows = node.op.rows ? buffers.get(writes[outputs[0]!.name]!)!.rows! : undefined;
    const instruction: Compute = {
      kind: "compute",
      id: node.id,
      op: node.op.name,
      kernel: "",
      reads,
      writes,
      dims,
      attrs: { ...node.attrs },
      ...(accumulates.length ? { accumulates } : {}),
      ...(rows ? { rows } : {}),
    };
    if (node.ring && isRing(role, { instruction, ...node.ring })) {
      expandRing(role, block, { instruction, ...node.ring });
      return;
    }
    emit(block, instruction);
    for (const o of outputs) producers.set(writes[o.name]!, { at: block.list.length - 1, block, out: o.name });
  }
  /** Points the op that made a gradient at the accumulator; where the gradient was moved since, adds it up. */
  function accumulateInto({ stage, parameter, shardedValue }: Extract<ShardStep, { kind: "accumulate" }>) {
    const target = `${idOf(parameter)}.grad`;
    const made = bufferOf(shardedValue);
    role.add({ ...buffers.get(made)!, id: target, kind: "gradient", dtype: "f32" });
    const by = producers.get(made);
    if (!by) return emit(blockOf(true, stage), role.elementwise(accumulate, `${target}.accumulate`, { x: made }, { y: target }));
    const i = by.block.list[by.at] as Compute;
    by.block.list[by.at] = { ...i, writes: { ...i.writes, [by.out]: target }, accumulates: [...(i.accumulates ?? []), by.out] };
    buffers.delete(made);
  }

  for (const s of steps) {
    if (s.kind === "send") {
      const ends = { from: s.stage, to: s.to };
      const tag = idOf(s.shardedValue.value) + (s.received.note ?? "");
      if (isMine(s.stage)) role.transfer(blockOf(s.backward, s.stage), "send", bufferOf(s.shardedValue), ends, s.why, tag);
      if (isMine(s.to)) role.transfer(blockOf(s.backward, s.to), "recv", bufferOf(s.received), ends, s.why, tag);
    } else if (!isMine(s.stage)) continue;
    else if (s.kind === "compute") compute(s);
    else if (s.kind === "collective") role.move(blockOf(s.backward, s.stage), s, bufferOf(s.from), bufferOf(s.to));
    else accumulateInto(s);
  }
}

/** Buffers that a later block of a microbatch still reads are activations (one copy per microbatch in flight); drops those nobody uses. */
function place(buffers: ReadonlyMap<string, Buffer>, program: Pick<Program, "chunks" | "step" | "inputs">): Buffer[] {
  const inputs = new Set(Object.values(program.inputs));
  const usedIn = new Map<string, Set<Block>>();
  for (const block of blocksOf(program))
    for (const i of block.instructions) for (const id of touched(i, buffers)) usedIn.set(id, (usedIn.get(id) ?? new Set()).add(block));
  return [...buffers.values()].flatMap((b) => {
    const used = [...(usedIn.get(b.id) ?? [])];
    if (used.length === 0 && b.kind === "workspace") return [];
    if (b.kind !== "workspace" || used.length === 1) return [b];
    const [chunk, another] = new Set(used.map((u) => u.chunk));
    // what the host fills it fills for each block, where one copy does not serve all
    if (another !== undefined && inputs.has(b.id)) return [b];
    invariant(
      used.every((u) => u.kind !== "step" && u.chunk === chunk),
      `${b.id} is used by blocks that share no copy of it`,
    );
    return [{ ...b, kind: "activation" as const, ...(chunk ? { chunk } : {}) }];
  });
}

/** The buffers an instruction reads or writes, index buffers included. */
export function touched(i: Instruction, buffers: ReadonlyMap<string, Buffer>): Set<string> {
  const ids = new Set<string>();
  const add = (id: string) => {
    ids.add(id);
    const rows = buffers.get(id)?.rows;
    if (rows) ids.add(rows);
  };
  if (i.kind === "compute") {
    for (const name in i.reads) add(i.reads[name]!);
    for (const name in i.writes) add(i.writes[name]!);
    if (i.rows) ids.add(i.rows);
  } else if (i.kind === "collective") {
    add(i.from);
    add(i.to);
  } else add(i.buffer);
  return ids;
}
