/**
 * lower: pieces and moves → one Program per role: buffers with stable names and instructions in blocks (forward and
 * backward of one microbatch; the step block once). Backward adds parameter gradients up where they lie; the step block
 * reduces what they owe, clips by the global norm, updates, and gathers the parameters again.
 */
import type { Job } from "../schemas/job.ts";
import { parts } from "../schemas/layout.ts";
import { type Buffer, type Compute, type Dtype, type Instruction, type Kind, type Move, type Parameter, type Program, bytesOf } from "../schemas/plan.ts";
import { boundOfRows, bytesSent, expectedRows } from "./cost.ts";
import { axesName, type Mesh, stageOf } from "./mesh.ts";
import { accumulate, cast } from "./ops/linear.ts";
import { type AnyOp, expand, sizesOf } from "./ops/op.ts";
import { adamw, clip, sumSquares } from "./ops/optimizer.ts";
import type { Schedule } from "./schedule.ts";
import { type Layout, layoutKey, type Piece, type Sharded, type Step } from "./shard.ts";
import { type Graph, idOf } from "./train.ts";

type Block = "forward" | "backward" | "step";

export function lower(job: Job, mesh: Mesh, graph: Graph, sharded: Sharded, order: readonly Schedule[]): Program[] {
  return order.map((s, stage) => lowerRole(job, mesh, graph, sharded, s, stage));
}

function lowerRole(job: Job, mesh: Mesh, graph: Graph, sharded: Sharded, { order, slots }: Schedule, stage: number): Program {
  const { home } = sharded;
  const buffers = new Map<string, Buffer>();
  const blocks: Record<Block, Instruction[]> = { forward: [], backward: [], step: [] };
  const inputs: Record<string, string> = {};
  const losses = new Map(graph.losses.map((l) => [l.value, l.name]));
  const rowsFactor = job.model.moe?.rows_bound ?? "worst";
  let block: Block = "forward";

  const taken = new Map<string, number>();
  const emit = (i: Instruction) => {
    const n = (taken.get(i.id) ?? 0) + 1;
    taken.set(i.id, n);
    blocks[block].push(n === 1 ? i : { ...i, id: `${i.id}#${n}` });
  };
  const add = (b: Buffer): string => {
    if (!buffers.has(b.id)) buffers.set(b.id, b);
    return b.id;
  };

  // -- pieces become buffers
  const text = ({ layout: l, value: v, note = "" }: Piece) => {
    const name = (fs: readonly number[]) => axesName(mesh, fs, v.ragged > 0);
    const cuts = l.cuts.map((fs) => (fs.length ? name(fs) : "-")).join(",");
    return `@${cuts}${l.sum.length ? `+${name(l.sum)}` : ""}${l.max.length ? `^${name(l.max)}` : ""}${note.replace(/~[\d.,]*/, "~")}`;
  };
  const localSize = (size: number, cut: readonly number[]) => size / parts(mesh, cut);
  const expert = (v: Piece["value"]) => v.ragged > 0;

  /** The index buffer of a ragged piece, shared by all values with the same rows. */
  function rowsOf(piece: Piece, bound: number): string {
    const { value: v, layout, note = "" } = piece;
    const cuts = layout.cuts.slice(0, 3);
    const name = `${rowsetOf(v)}.rows@${cuts.map((fs) => (fs.length ? axesName(mesh, fs, true) : "-")).join(",")}${note.includes("~") ? "~" : ""}`;
    return add({ id: name, kind: "workspace", dtype: "i32", shape: [1 + 3 * bound], sizes: [1 + 3 * bound], ragged: 0, cuts: [[]] });
  }
  /** Losses of one name that owe the same share an accumulator. */
  const accumulators = new Map<string, string>();
  function lossBuffer(name: string, piece: Piece): string {
    const key = `${name}|${layoutKey(piece)}`;
    if (!accumulators.has(key)) accumulators.set(key, [...accumulators.values()].includes(name) ? name + text(piece) : name);
    return accumulators.get(key)!;
  }
  function bufferOf(piece: Piece): string {
    const { value: v, layout } = piece;
    const loss = losses.get(v);
    if (v.leaf?.kind === "parameter" && layoutKey(piece) === layoutKey({ value: v, layout: home.get(v)!.layout })) return v.leaf.name;
    const here = layoutKey(piece) === layoutKey({ value: v, layout: home.get(v)!.layout });
    const id = loss ? lossBuffer(loss, piece) : idOf(v) + (here ? "" : text(piece));
    const known = buffers.get(id);
    if (known) return id;
    if (v.leaf?.kind === "input" && here) inputs[v.leaf.name] = id;
    const owes = [...layout.sum, ...layout.max];
    const common = { id, dtype: v.dtype, sizes: [...v.sizes], ragged: v.ragged, cuts: layout.cuts.map((c) => [...c]), ...(owes.length ? { owes } : {}) };
    if (!v.ragged)
      return add({ ...common, kind: loss ? "gradient" : "workspace", shape: v.sizes.map((n, slot) => localSize(n, layout.cuts[slot]!)) });
    const bound = boundOfRows(mesh, v.sizes, layout.cuts, v.fanout, rowsFactor);
    const rest = v.sizes.slice(3).map((n, i) => localSize(n, layout.cuts[3 + i]!));
    return add({ ...common, kind: "workspace", shape: [bound, ...rest], fanout: v.fanout, rows: rowsOf(piece, bound) });
  }
  const bytes = (id: string) => {
    const b = buffers.get(id)!;
    const rows = b.ragged ? expectedRows(mesh, b.sizes, b.cuts, b.fanout!) : 1;
    return bytesOf[b.dtype] * rows * b.shape.slice(b.ragged ? 1 : 0).reduce((n, x) => n * x, 1);
  };

  const mine = graph.parameters.filter((p) => home.get(p)!.stage === stage);
  const dtype: Dtype = job.train.precision === "bf16" ? "bf16" : "f32";
  for (const p of mine) {
    const { layout } = home.get(p)!;
    add({
      id: p.leaf!.name, kind: "parameter", dtype, shape: p.sizes.map((n, i) => localSize(n, layout.cuts[i]!)),
      sizes: [...p.sizes], ragged: 0, cuts: layout.cuts.map((c) => [...c]),
    });
  }

  // -- steps become instructions
  const written = new Set<string>();
  const producers = new Map<string, { at: number; block: Block; out: string }>();
  function compute(s: Extract<Step, { kind: "compute" }>) {
    const { node } = s;
    const { inputs: ins, outputs: outs } = expand(node);
    const size = sizesOf(node);
    const dims: Compute["dims"] = {};
    for (const slot of [...ins, ...outs].flatMap((o) => o.slots)) dims[slot.dim] = [size[slot.dim]!, [...(s.dims.get(slot.dim) ?? [])]];
    const reads = Object.fromEntries(ins.map((o, i) => [o.name, bufferOf(s.ins[i]!)]));
    const writes = Object.fromEntries(outs.map((o, i) => [o.name, bufferOf(s.outs[i]!)]));
    const keeps = outs.filter((_, i) => losses.has(s.outs[i]!.value)).map((o) => o.name);
    const rows = node.op.rows ? buffers.get(writes[outs[0]!.name]!)!.rows! : undefined;
    if (rows) written.add(rows);
    emit({ kind: "compute", id: node.id, op: node.op.name, reads, writes, dims, attrs: { ...node.attrs }, ...(keeps.length ? { keeps } : {}), ...(rows ? { rows } : {}) });
    for (const o of outs) producers.set(writes[o.name]!, { at: blocks[block].length - 1, block, out: o.name });
  }
  function move(s: Extract<Step, { kind: "move" }>, from = bufferOf(s.from), to = bufferOf(s.to)) {
    const { value: v } = s.from;
    const slotAt = (l: Layout) => l.cuts.findIndex((c) => c.includes(s.factors[0]!));
    const name = v.ragged && s.how === "all_to_all" ? (slotAt(s.to.layout) === 2 ? "dispatch" : slotAt(s.from.layout) === 2 ? "combine" : s.how) : s.how;
    const axes = axesName(mesh, s.factors, expert(v) || s.why.path.includes("expert"));
    emit({
      kind: "move", id: `${to}.${name}`, how: s.how, name, axes, factors: [...s.factors], from, to,
      radix: s.radix.map((r) => [...r]),
      bytes: bytesSent(s.how, parts(mesh, s.factors), bytes(from), bytes(to)),
      host_sync: v.ragged > 0 && s.how !== "slice",
      why: { ...s.why },
    });
  }
  function transfer(s: Extract<Step, { kind: "send" }>, kind: "send" | "recv") {
    const buffer = bufferOf(s.piece);
    emit({ kind, id: `${buffer}.${kind}`, buffer, peer: kind === "send" ? s.to : s.stage, bytes: Math.round(bytes(buffer)), why: { ...s.why } });
  }
  /** Points the op that made a gradient at the accumulator; where the gradient was moved since, adds it up. */
  function accumulateInto(s: Extract<Step, { kind: "accumulate" }>) {
    const target = `${idOf(s.parameter)}.grad`;
    const made = bufferOf(s.piece);
    const b = buffers.get(made)!;
    add({ ...b, id: target, kind: "gradient", dtype: "f32" });
    const by = producers.get(made);
    if (by && by.block === block) {
      const i = blocks[block][by.at] as Compute;
      blocks[block][by.at] = { ...i, writes: { ...i.writes, [by.out]: target }, keeps: [...(i.keeps ?? []), by.out] };
      buffers.delete(made);
    } else emit(elementwise(accumulate, `${target}.accumulate`, { x: made }, { y: target }, {}, ["y"]));
  }
  /** An op over whole buffers, dims `...`. */
  function elementwise(op: AnyOp, id: string, reads: Record<string, string>, writes: Record<string, string>, attrs: Record<string, number> = {}, keeps = op.updates ?? []): Compute {
    const anyOperand = [...op.inputs, ...op.outputs].find((o) => o.any);
    const like = anyOperand && buffers.get(reads[anyOperand.name] ?? writes[anyOperand.name]!)!;
    const dims: Compute["dims"] = Object.fromEntries(like ? like.sizes.map((n, i) => [`#${i}`, [n, [...like.cuts[i]!]]]) : []);
    return { kind: "compute", id, op: op.name, reads, writes, dims, attrs, ...(keeps.length ? { keeps: [...keeps] } : {}) };
  }

  for (const s of sharded.steps) {
    if (s.kind === "send") {
      block = s.backward ? "backward" : "forward";
      if (s.stage === stage) transfer(s, "send");
      if (s.to === stage) transfer(s, "recv");
      continue;
    }
    if (s.stage !== stage) continue;
    block = s.kind === "compute" ? (s.node.backward ? "backward" : "forward") : s.kind === "move" ? (s.backward ? "backward" : "forward") : "backward";
    if (s.kind === "compute") compute(s);
    else if (s.kind === "move") move(s);
    else accumulateInto(s);
  }

  // -- the step block
  block = "step";
  const scalar = (id: string, kind: Kind, owes?: number[]) =>
    add({ id, kind, dtype: "f32", shape: [], sizes: [], ragged: 0, cuts: [], ...(owes?.length ? { owes } : {}) });

  // what each parameter's gradient owes is reduced where it lies
  const gradients = new Map<string, string>();
  const reducedAs = new Map<string, string>();
  const parameterOf = new Map(graph.parameters.map((p) => [sharded.accumulated.get(p)!.value, p]));
  for (const s of sharded.deferred) {
    if (s.kind !== "move" || s.stage !== stage) continue;
    const p = parameterOf.get(s.from.value);
    if (!p) {
      const loss = lossBuffer(losses.get(s.from.value)!, { value: s.from.value, layout: home.get(s.from.value)!.layout });
      const from = reducedAs.get(loss) ?? loss;
      const to = scalar(`${from}.reduced`, "gradient", [...s.to.layout.sum]);
      reducedAs.set(loss, to);
      move(s, from, to);
      continue;
    }
    const from = gradients.get(p.leaf!.name) ?? `${p.leaf!.name}.grad`;
    const source = buffers.get(from)!;
    const owes = [...s.to.layout.sum];
    const { owes: _, ...rest } = source;
    const to = add({
      ...rest, id: `${p.leaf!.name}.grad${text(s.to)}`, within: source.within ?? source.id,
      shape: p.sizes.map((n, i) => localSize(n, s.to.layout.cuts[i]!)), cuts: s.to.layout.cuts.map((c) => [...c]), ...(owes.length ? { owes } : {}),
    });
    gradients.set(p.leaf!.name, to);
    move(s, from, to);
  }

  // the global norm: every element counted once over all ranks
  const gradientOf = (name: string) => gradients.get(name) ?? `${name}.grad`;
  scalar("grad_norm.squared", "gradient");
  for (const p of mine) {
    const g = buffers.get(gradientOf(p.leaf!.name))!;
    const copies = mesh.per_stage / parts(mesh, g.cuts.flat());
    emit(elementwise(sumSquares, `${p.leaf!.name}.grad.squared`, { g: g.id }, { y: "grad_norm.squared" }, { scale: 1 / copies }));
  }
  let squared = "grad_norm.squared";
  if (mesh.world > 1) {
    squared = scalar("grad_norm.squared.total", "workspace");
    emit({
      kind: "move", id: `${squared}.all_reduce`, how: "all_reduce", name: "all_reduce", axes: "world", factors: mesh.factors.map((_, f) => f), world: true,
      from: "grad_norm.squared", to: squared, radix: [], bytes: bytesSent("all_reduce", mesh.world, 4, 4), host_sync: false,
      why: { op: "clip", because: "the norm is of the gradient of the whole model", path: "train.optimizer.clip" },
    });
  }
  const o = job.train.optimizer;
  const scale = scalar("clip.scale", "workspace");
  const norm = scalar("grad_norm", "optimizer");
  emit(elementwise(clip, "clip", { sq: squared }, { scale, norm }, { max: o.clip }));
  inputs.lr = scalar("lr", "optimizer");
  inputs.step = scalar("step", "optimizer");

  const parameters: Parameter[] = mine.map((p) => {
    const name = p.leaf!.name;
    const target = sharded.update.get(p)!;
    const state = buffers.get(gradientOf(name))!;
    const moved = state.cuts.join("/") !== buffers.get(name)!.cuts.join("/");
    const { within: _, owes: __, ...shape } = state;
    const like = (suffix: string) => add({ ...shape, id: `${name}.${suffix}`, kind: "optimizer", dtype: "f32" });
    const master = moved || dtype !== "f32" ? like("master") : name;
    // weight decay: parameters with two or more dims
    const attrs = { beta1: o.betas[0]!, beta2: o.betas[1]!, eps: o.eps, decay: p.sizes.length > 1 ? o.weight_decay : 0 };
    emit(elementwise(adamw, `${name}.adamw`, { g: state.id, scale, lr: "lr", step: "step" }, { w: master, m: like("m"), v: like("v") }, attrs));
    if (master !== name) {
      let from = master;
      if (dtype !== "f32") {
        from = moved ? add({ ...shape, id: `${name}.cast`, kind: "workspace", dtype }) : name;
        emit(elementwise(cast, `${name}.cast`, { x: master }, { y: from }));
      }
      if (moved) {
        const factors = target.layout.cuts.flat().filter((f) => !home.get(p)!.layout.cuts.flat().includes(f)).sort((a, b) => a - b);
        const expertOwned = home.get(p)!.layout.cuts.flat().some((f) => mesh.axes.ep!.includes(f)) && name.includes(".w");
        emit({
          kind: "move", id: `${name}.all_gather`, how: "all_gather", name: "all_gather", axes: axesName(mesh, factors, expertOwned), factors, from, to: name,
          radix: target.layout.cuts.map((c) => [...c]), bytes: bytesSent("all_gather", parts(mesh, factors), bytes(from), bytes(name)), host_sync: false,
          why: { op: `${name}.adamw`, because: "each rank updated its shard", path: "parallel.distributed_optimizer" },
        } satisfies Move);
      }
    }
    return { name, init: p.leaf!.init!, buffer: name, gradient: state.id, master };
  });

  const metrics: Record<string, string[]> = { grad_norm: [norm] };
  for (const [key, id] of accumulators) (metrics[key.split("|")[0]!] ??= []).push(reducedAs.get(id) ?? id);
  const layers = Array.from({ length: job.model.layers }, (_, l) => l).filter((l) => stageOf(job, l) === stage);
  const all = place(buffers, blocks);
  return { stage, layers: [layers[0]!, layers.at(-1)! + 1], slots, order: [...order], parameters, inputs, metrics, buffers: all, ...blocks };
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
export function touched(i: Instruction, buffers: ReadonlyMap<string, Buffer>): string[] {
  const own =
    i.kind === "compute" ? [...Object.values(i.reads), ...Object.values(i.writes), ...(i.rows ? [i.rows] : [])]
    : i.kind === "move" ? [i.from, i.to]
    : [i.buffer];
  return own.flatMap((id) => {
    const rows = buffers.get(id)?.rows;
    return rows ? [id, rows] : [id];
  });
}

/** Values made from the same routing have the same rows: the id of the routing they came from. */
function rowsetOf(v: Piece["value"]): string {
  const node = v.node!;
  if (node.op.rows) return idOf(node.args[node.op.inputs.findIndex((i) => i.name === "p")]!);
  return rowsetOf(node.args.find((a) => a.ragged)!);
}
