/**
 * lower: pieces and moves → one Program per role: buffers with stable names and instructions in blocks (forward and
 * backward of one microbatch; the step block once). Backward adds parameter gradients up where they lie.
 */
import type { Job } from "../schemas/job.ts";
import type { Buffer, Compute, Instruction, Program } from "../schemas/plan.ts";
import { type Mesh, stageOf } from "./mesh.ts";
import { toMessages } from "./messages.ts";
import { accumulate } from "./ops/linear.ts";
import { expand } from "./ops/op.ts";
import { type Block, openRole, type Role } from "./role.ts";
import type { Schedule } from "./schedule.ts";
import type { Sharded, Step } from "./shard.ts";
import { type Graph, idOf } from "./train.ts";
import { updateStep } from "./update.ts";

export function lower(job: Job, mesh: Mesh, graph: Graph, sharded: Sharded, order: readonly Schedule[]): Program[] {
  return order.map(({ order, slots }, stage) => {
    const role = openRole(job, mesh, graph, sharded, stage);
    for (const p of graph.parameters) {
      const { layout, stage: at } = sharded.home.get(p)!;
      if (at !== stage) continue;
      role.add({
        id: idOf(p),
        kind: "parameter",
        dtype: p.dtype,
        shape: role.local(p.sizes, layout.cuts),
        sizes: [...p.sizes],
        ragged: 0,
        cuts: layout.cuts.map((c) => [...c]),
      });
    }
    lowerMicrobatch(role, sharded.steps, new Set(graph.losses.map((l) => l.value)));
    const { parameters, metrics } = updateStep(role, graph, sharded);
    const blocks = toMessages(role);
    const layers = Array.from({ length: job.model.layers }, (_, l) => l).filter((l) => stageOf(job, 1 + l) === stage);
    return {
      stage,
      layers: [layers[0]!, layers.at(-1)! + 1],
      slots,
      order: [...order],
      parameters,
      inputs: role.inputs,
      bounds: role.bounds,
      metrics,
      buffers: place(role.buffers, blocks),
      ...blocks,
    };
  });
}

/** The steps of one microbatch that concern this role, as instructions. */
function lowerMicrobatch(role: Role, steps: readonly Step[], losses: ReadonlySet<unknown>): void {
  const { stage, blocks, buffers, bufferOf, emit } = role;
  const producers = new Map<string, { at: number; block: Block; out: string }>();
  const blockOf = (backward: boolean): Block => (backward ? "backward" : "forward");

  function compute({ node, ins, outs, dims: cuts }: Extract<Step, { kind: "compute" }>) {
    const { inputs, outputs } = expand(node);
    const block = blockOf(node.backward);
    const dims: Compute["dims"] = {};
    for (const { dim } of [...inputs, ...outputs].flatMap((o) => o.slots)) dims[dim] = [node.size[dim]!, [...(cuts.get(dim) ?? [])]];
    const reads = Object.fromEntries(inputs.map((o, i) => [o.name, bufferOf(ins[i]!)]));
    const writes = Object.fromEntries(outputs.map((o, i) => [o.name, bufferOf(outs[i]!)]));
    const keeps = outputs.filter((o, i) => losses.has(outs[i]!.value) || node.op.updates?.includes(o.name)).map((o) => o.name);
    for (const [out, by] of Object.entries(node.op.limits ?? {}))
      role.bounds.push({ needed: writes[out]!, bound: node.attrs[by]!, of: "rounds" });
    const rows = node.op.rows ? buffers.get(writes[outputs[0]!.name]!)!.rows! : undefined;
    emit(block, {
      kind: "compute",
      id: node.id,
      op: node.op.name,
      kernel: "",
      reads,
      writes,
      dims,
      attrs: { ...node.attrs },
      ...(keeps.length ? { keeps } : {}),
      ...(rows ? { rows } : {}),
    });
    for (const o of outputs) producers.set(writes[o.name]!, { at: blocks[block].length - 1, block, out: o.name });
  }
  /** Points the op that made a gradient at the accumulator; where the gradient was moved since, adds it up. */
  function accumulateInto({ parameter, piece }: Extract<Step, { kind: "accumulate" }>) {
    const target = `${idOf(parameter)}.grad`;
    const made = bufferOf(piece);
    role.add({ ...buffers.get(made)!, id: target, kind: "gradient", dtype: "f32" });
    const by = producers.get(made);
    if (!by) return emit("backward", role.elementwise(accumulate, `${target}.accumulate`, { x: made }, { y: target }));
    const i = blocks[by.block][by.at] as Compute;
    blocks[by.block][by.at] = { ...i, writes: { ...i.writes, [by.out]: target }, keeps: [...(i.keeps ?? []), by.out] };
    buffers.delete(made);
  }

  for (const s of steps) {
    if (s.kind === "send") {
      if (s.stage === stage) role.transfer(blockOf(s.backward), "send", bufferOf(s.piece), s.to, s.why);
      if (s.to === stage) role.transfer(blockOf(s.backward), "recv", bufferOf(s.piece), s.stage, s.why);
    } else if (s.stage !== stage) continue;
    else if (s.kind === "compute") compute(s);
    else if (s.kind === "move") role.move(blockOf(s.backward), s, bufferOf(s.from), bufferOf(s.to));
    else accumulateInto(s);
  }
}

/** Buffers that backward still reads are activations (one copy per microbatch in flight); drops those nobody uses. */
function place(buffers: ReadonlyMap<string, Buffer>, blocks: Readonly<Record<Block, readonly Instruction[]>>): Buffer[] {
  const usedIn = new Map<string, Set<Block>>();
  for (const b of ["forward", "backward", "step"] as const)
    for (const i of blocks[b]) for (const id of touched(i, buffers)) usedIn.set(id, (usedIn.get(id) ?? new Set()).add(b));
  return [...buffers.values()].flatMap((b) => {
    const used = usedIn.get(b.id);
    if (!used && b.kind === "workspace") return [];
    const kept = used?.has("forward") && used.has("backward");
    return [b.kind === "workspace" && kept ? { ...b, kind: "activation" as const } : b];
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
  } else if (i.kind === "move") {
    add(i.from);
    add(i.to);
  } else add(i.buffer);
  return ids;
}
