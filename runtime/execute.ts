/**
 * execute: plan × fleet → trained steps. Walks each rank's program in the plan's order: forward and backward of every
 * microbatch, then the step block. The ranks of this process run as coroutines, which meet at collectives.
 */
import { elementsOf, numberInStage, rankAt, stageOfRank } from "../schemas/layout.ts";
import type { Buffer, Instruction, Kind, Plan } from "../schemas/plan.ts";
import { orderOf, workOf } from "../schemas/program.ts";
import { batchAt } from "../schemas/rampup.ts";
import type { Timing } from "../schemas/timing.ts";
import { Trouble } from "../schemas/trouble.ts";
import { fillNormal } from "../src/ops/philox.ts";
import { positionOf } from "../src/ops/positions.ts";
import type { Backend, Comm, Fleet, HostData, Position } from "./backend.ts";
import type { Batch, BatchOf } from "./batches.ts";
import { courseOf, type Milestone } from "./course.ts";
import { pieceOf as pieceIn, type Ranges, rangesIn, visitRuns } from "./pieces.ts";
import { rememberedBy } from "./remembered.ts";

export interface StepResult {
  /** 1-based. */
  readonly step: number;
  /** Mean cross-entropy over all tokens of the step that are learnt from, nats; as train.loss_weighting says. */
  readonly loss: number;
  /** Of multi-token prediction, where the model has it: the mean of that over the depths. model.mtp.coeff of it is added to the loss. */
  readonly mtp_loss?: number;
  /** What balancing adds to it; 0 where nothing is balanced. */
  readonly aux_loss: number;
  /** Before clipping. */
  readonly grad_norm: number;
  readonly lr: number;
  readonly tokens: number;
  readonly seconds: number;
  /** In fp16, what the loss was multiplied by before backward. */
  readonly loss_scale?: number;
  /** In fp16, whether gradients overflowed: then the step changed no weights, and grad_norm is no finite number. */
  readonly skipped?: boolean;
}
export interface Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}
export interface Run {
  /** Whether another step begins: with other processes, all of them have agreed to it. Asked once before each step. */
  mayBegin(): boolean;
  /** Asks that no further step begins. */
  stop(): void;
  /** This process speaks for all: it holds rank 0. */
  readonly leads: boolean;
  step(): Promise<StepResult>;
  /** How far the run is, steps before it began counted. */
  milestone(): Milestone;
  /** What a rank of this process holds of a buffer, between two steps. */
  read(rank: number, buffer: Buffer): Promise<HostData>;
  /** The gradient of the last step by parameter name: mean over the step's tokens, before clipping, put together from all ranks. */
  gradients(): Promise<Map<string, Tensor>>;
  parameters(): Promise<Map<string, Tensor>>;
  /** A buffer named in `watch`, per microbatch, put together from all ranks; tokens as they lie (src/ops/positions.ts). */
  watched(id: string): Promise<Tensor[]>;
  /** What ran when in the last step, where it was opened with `profile`. */
  profile(): Promise<readonly Timing[]>;
  /** With what went wrong, if something did. */
  close(error?: Error): Promise<void>;
}
/** What a plan is run with: opened before, and closed with the run. */
export interface Given {
  readonly fleet: Fleet;
  readonly batch: BatchOf;
  /** The weights to start from, read before this returns; without them, those of the job's seed. */
  readonly checkpoint?: { read(name: string, shape: readonly number[]): Float32Array };
  /** Where another run was, which this one goes on from: all that it remembered, by name, in whatever pieces this plan has. */
  readonly from?: { readonly milestone: Milestone; piece(name: string, ranges: Ranges): Float32Array };
  /** Buffers to keep a copy of when they are written, for tests and debugging. */
  readonly watch?: readonly string[];
}

/** Writes the parameters; the run then stands before its first step. Knows no files and no process: it works in a browser too. */
export function runOn(plan: Plan, { fleet, batch, checkpoint, from, watch = [] }: Given): Run {
  const { mesh, programs, job } = plan;
  const { train, model } = job;
  const { ranks, comm } = fleet;
  const programOf = (r: number) => programs[stageOfRank(mesh, r)]!;
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const bufferOf = (r: number, id: string): Buffer => buffers[programOf(r).stage]!.get(id)!;
  const perMicrobatch = train.micro_batch * job.parallel.data;
  const kept = new Map<string, Promise<HostData>[][]>();
  const course = courseOf(job, from?.milestone);
  /** What the gradients of the last step were multiplied by. */
  let scaled = 1;

  /** One parameter after the other, on all ranks that have it: a checkpoint's is in memory once, and no longer than it must. */
  function initialize(): void {
    const all = new Map<string, { r: number; p: Plan["programs"][number]["parameters"][number] }[]>();
    for (const r of ranks) for (const p of programOf(r).parameters) all.set(p.name, [...(all.get(p.name) ?? []), { r, p }]);
    for (const [name, places] of all) {
      let whole: Float32Array | undefined;
      for (const { r, p } of places)
        for (const id of new Set([p.buffer, p.master])) {
          const b = bufferOf(r, id);
          if (checkpoint) whole ??= checkpoint.read(name, b.sizes);
          fleet.backend(r).write(b, 0, whole ? pieceOf(whole, b, r) : initial(name, p.init, b, r));
        }
    }
  }

  /** All that the other run remembered; copies of parameters, and those in 16 bits beside a main one, follow from that. */
  function goOn({ piece }: NonNullable<Given["from"]>): void {
    for (const r of ranks) {
      const p = programOf(r);
      const names = new Map(rememberedBy(p).map(({ name, buffer }) => [buffer.id, name]));
      for (const { name, buffer, master } of p.parameters) names.set(buffer, name).set(master, name);
      for (const [id, name] of names) {
        const b = bufferOf(r, id);
        fleet.backend(r).write(b, 0, piece(name, ranges(b, r)));
      }
    }
  }

  const ranges = (b: Buffer, r: number): Ranges => rangesIn(mesh, b, numberInStage(mesh, r));
  const pieceOf = <T extends HostData>(whole: T, b: Buffer, r: number): T =>
    whole.length === elementsOf(b.shape) ? whole : pieceIn(whole, b, ranges(b, r));
  function initial(name: string, init: { type: string; std: number }, b: Buffer, r: number): Float32Array {
    const out = new Float32Array(elementsOf(b.shape));
    if (init.type !== "normal") return out.fill(init.type === "ones" ? 1 : 0);
    visitRuns(b.sizes, ranges(b, r), (global, local, n) => fillNormal(out.subarray(local, local + n), train.seed, name, global, init.std));
    return out;
  }
  /** A value put together from the pieces of the ranks of one stage. */
  async function assemble(stage: number, id: string, data: (r: number) => Promise<HostData>): Promise<Tensor> {
    const b = buffers[stage]!.get(id)!;
    const out = new Float32Array(elementsOf(b.sizes));
    for (let n = 0; n < mesh.per_stage; n++) {
      const r = rankAt(mesh, stage, n);
      const piece = await data(r);
      visitRuns(b.sizes, ranges(b, r), (global, local, n) => out.set(piece.subarray(local, local + n), global));
    }
    return { shape: b.sizes, data: out };
  }
  type Parameter = Plan["programs"][number]["parameters"][number];
  async function collect(pick: (p: Parameter) => string, wanted: (p: Parameter) => boolean = () => true): Promise<Map<string, Tensor>> {
    if (ranks.length < mesh.world)
      throw new Trouble(
        `the ranks of ${job.name} run in ${mesh.world} processes, none of which holds all values`,
        "run it with --backend cpu or webgpu, which hold all ranks in one process",
      );
    const all = new Map<string, Tensor>();
    for (const p of programs)
      for (const q of p.parameters)
        if (!q.tied_to && wanted(q))
          all.set(q.name, await assemble(p.stage, pick(q), (r) => fleet.backend(r).read(bufferOf(r, pick(q)), 0)));
    return all;
  }

  /** One rank's step. Yields where it has to wait, saying for what. */
  function* walk(
    r: number,
    backend: Backend,
    comm: Comm,
    feed: (b: Buffer, name: string, microbatch: number) => HostData,
    order: (stage: number) => readonly string[],
    replayed: boolean,
  ): Generator<string> {
    const p = programOf(r);
    function* block(instructions: readonly Instruction[], at: Position): Generator<string> {
      if (replayed) return;
      for (const i of instructions) {
        if (i.kind === "compute") {
          backend.compute(i, at.slot);
          for (const id of watch) if (Object.values(i.writes).includes(id)) keep(id, at, r);
        } else if (i.kind === "move") while (!comm.move(r, i, at)) yield `${i.id} (${i.name} over ${i.axes}), ${at.tag}`;
        else if (i.kind === "send") comm.send(r, i, at);
        else while (!comm.recv(r, i, at)) yield `${i.id} from stage ${i.peer}, ${at.tag}`;
      }
    }
    /** Those of the inputs that a block reads; elsewhere their bytes may be another's. */
    const fill = (block: readonly Instruction[], kinds: readonly Kind[], slot: number, m: number) => {
      const read = inputsReadBy(block);
      for (const [name, id] of Object.entries(p.inputs)) {
        const b = bufferOf(r, id);
        if (read.has(id) && kinds.includes(b.kind)) backend.write(b, slot, feed(b, name, m));
      }
    };
    backend.zeroGradients();
    fill(p.step, ["optimizer"], 0, 0);
    for (const tag of order(p.stage)) {
      const { kind, microbatch, chunk } = workOf(tag);
      const at = { tag, microbatch, slot: microbatch % p.chunks[chunk]!.slots };
      const instructions = p.chunks[chunk]![kind];
      // workspace is filled for each block; activations are written by the forward block and stay
      fill(instructions, kind === "forward" ? ["workspace", "activation"] : ["workspace"], at.slot, microbatch);
      yield* block(instructions, at);
    }
    yield* block(p.step, { tag: "step", microbatch: -1, slot: 0 });
  }
  function keep(id: string, at: Position, r: number): void {
    const all = kept.get(id) ?? [];
    kept.set(id, all);
    (all[at.microbatch] ??= [])[r] = fleet.backend(r).read(bufferOf(r, id), at.slot);
  }

  /** Tokens of each sequence as they lie over the ranks that share it. */
  function inOrder(given: Batch): Readonly<Record<string, HostData>> {
    const { context } = job.parallel;
    if (context === 1) return given;
    const place = Int32Array.from({ length: model.seq }, (_, i) => positionOf(i, model.seq / (2 * context), context));
    const laid = <T extends HostData>(whole: T) => whole.map((_, i) => whole[i - (i % model.seq) + place[i % model.seq]!]!);
    return Object.fromEntries(Object.entries(given).map(([name, data]) => [name, data.length === 1 ? data : laid(data)]));
  }

  /** Losses summed over the stages, and the gradient norm, which is the same on all. */
  async function numbers(): Promise<number[]> {
    const losses = ["loss", "aux_loss", "mtp_loss"];
    const sums = [0, 0, 0, 0];
    for (const { stage, metrics } of programs) {
      const rank = rankAt(mesh, stage, 0);
      if (!ranks.includes(rank)) continue;
      const names = stage === 0 ? [...losses, "grad_norm"] : losses;
      for (const [i, name] of names.entries())
        for (const id of metrics[name] ?? []) sums[i]! += (await fleet.backend(rank).read(bufferOf(rank, id), 0))[0]!;
    }
    return fleet.combine ? fleet.combine(sums) : sums;
  }

  if (from) goOn(from);
  else initialize();
  let stopped = false;
  const orders = new Map<number, readonly (readonly string[])[]>();
  /** By stage; many steps have one. */
  function ordersOf(microbatches: number): readonly (readonly string[])[] {
    const known = orders.get(microbatches) ?? programs.map((p) => orderOf(p, microbatches));
    orders.set(microbatches, known);
    return known;
  }
  const read = (first: number, rows: number): Batch | Error => {
    try {
      return batch(first, rows);
    } catch (error) {
      return error as Error;
    }
  };
  /** The batch of the step to come, or what is wrong with it: that matters once the step begins. */
  let next: Batch | Error | undefined;
  return {
    leads: ranks.includes(0),
    mayBegin: () => fleet.mayBegin?.() ?? !stopped,
    stop() {
      stopped = true;
      fleet.stop?.();
    },
    milestone: () => course.milestone(),
    read: (rank, buffer) => fleet.backend(rank).read(buffer, 0),
    async step() {
      const begun = performance.now();
      const leg = course.leg();
      const { lr, lossScale, upscale } = leg;
      const now = next ?? read(leg.first, leg.batch);
      if (now instanceof Error) throw now;
      const given = inOrder(now);
      // sequences by their number since the run began: what is random goes by it
      const samples = Int32Array.from({ length: leg.batch }, (_, i) => leg.first + i);
      scaled = lossScale;
      kept.clear();
      /** What the gradient of a loss begins with. */
      const begin = lossScale * upscale;
      const rows = (whole: HostData, m: number) => whole.subarray(m * perMicrobatch * model.seq, (m + 1) * perMicrobatch * model.seq);
      const feedOf =
        (r: number) =>
        (b: Buffer, name: string, m: number): HostData => {
          switch (name) {
            case "sample":
              return pieceOf(samples.subarray(m * perMicrobatch, (m + 1) * perMicrobatch), b, r);
            case "one":
              return Float32Array.of(begin);
            case "mtp_coeff":
              return Float32Array.of(begin * model.mtp!.coeff);
            case "aux_weight":
              return Float32Array.of(begin * given.aux_weight![0]!);
            case "lr":
              return Float32Array.of(lr);
            case "step":
              return Float32Array.of(leg.update);
            case "weight_decay":
              return Float32Array.of(leg.weightDecay);
            case "loss_scale":
              return Float32Array.of(lossScale);
            default: {
              const whole = given[name];
              if (!whole) throw new Error(`rankc: the plan asks for an input ${name}, which this runtime does not know`);
              return b.sizes.length === 0 ? whole : pieceOf(rows(whole, m), b, r);
            }
          }
        };
      const replayed = fleet.beginStep?.(leg.microbatches) ?? false;
      const order = ordersOf(leg.microbatches);
      runTogether(ranks.map((r) => walk(r, fleet.backend(r), comm, feedOf(r), (stage) => order[stage]!, replayed)));
      // the next batch is read while the device works
      const after = leg.first + leg.batch;
      [, next] = await Promise.all([fleet.finish(), (async () => read(after, batchAt(train, after)))()]);
      const [loss, aux_loss, mtp_loss, grad_norm] = await numbers();
      const overflowed = train.precision === "fp16" && !Number.isFinite(grad_norm);
      course.done(overflowed);
      return {
        step: course.milestone().steps,
        loss: loss! * upscale,
        ...(model.mtp && { mtp_loss: mtp_loss! * upscale }),
        aux_loss: aux_loss! * upscale * (given.aux_weight?.[0] ?? 1),
        grad_norm: grad_norm!,
        lr,
        tokens: leg.batch * model.seq,
        seconds: (performance.now() - begun) / 1000,
        ...(train.precision === "fp16" ? { loss_scale: lossScale, skipped: overflowed } : {}),
      };
    },
    async gradients() {
      const all = await collect(
        (q) => q.gradient,
        (q) => q.rule === train.optimizer.type,
      );
      for (const { data } of all.values()) for (let i = 0; i < data.length && scaled !== 1; i++) data[i]! /= scaled;
      return all;
    },
    parameters: () => collect((q) => q.master),
    watched: (id) =>
      Promise.all(
        (kept.get(id) ?? []).map((pieces) => {
          const stage = programs.findIndex((p) => pieces[rankAt(mesh, p.stage, 0)]);
          return assemble(stage, id, (r) => pieces[r]!);
        }),
      ),
    profile: async () => (await fleet.profile?.()) ?? [],
    close: (error) => fleet.close(error),
  };
}

/** What a block reads, found once: a block runs every microbatch. */
const known = new WeakMap<readonly Instruction[], ReadonlySet<string>>();
function inputsReadBy(block: readonly Instruction[]): ReadonlySet<string> {
  const found = known.get(block) ?? new Set(block.flatMap(readBy));
  known.set(block, found);
  return found;
}
const readBy = (i: Instruction): readonly string[] =>
  i.kind === "compute" ? Object.values(i.reads) : i.kind === "move" ? [i.from] : i.kind === "send" ? [i.buffer] : [];

/** Runs coroutines until all are done. Where none can go on, it is a deadlock: the plan is wrong, and everyone's place is told. */
function runTogether(ranks: readonly Generator<string>[]): void {
  const waits = new Map<number, string>();
  let left = ranks.map((_, r) => r);
  while (left.length) {
    let moved = false;
    for (const r of left) {
      const before = waits.get(r);
      const { done, value } = ranks[r]!.next();
      if (done) waits.set(r, "");
      else waits.set(r, value);
      if (done || before !== value) moved = true;
    }
    left = left.filter((r) => waits.get(r) !== "");
    if (!moved && left.length) throw new Error(`rankc: deadlock: ${left.map((r) => `rank ${r} waits at ${waits.get(r)}`).join("; ")}`);
  }
}
