/**
 * The memory of a rank over a step: what is alive at each moment. Parameters, gradients and optimizer state are alive all the time;
 * activations of a microbatch from its forward block to its last block, and within a block as the instructions need them; workspace within a block.
 */
import type { BlockView } from "../report/view/planView.ts";
import { inAnyLayer, type PlanModel } from "./planModel.ts";
import type { StageRuns } from "./stageRuns.ts";

/** Bytes that are alive, beside those that are alive for the whole run. */
export interface AliveBytes {
  readonly activation: number;
  readonly workspace: number;
}

/** Buffers of one form that are alive together. */
export interface AliveGroup {
  readonly kind: string;
  readonly id: string;
  readonly count: number;
  readonly bytes: number;
}

/** The live bytes of a block by instruction. */
interface BlockCurve {
  readonly activation: Float64Array;
  readonly workspace: Float64Array;
  /** The instruction with the most of both. */
  readonly peak: number;
  /** When each instruction has begun, or one before it, as shares of the block. */
  readonly begin: Float64Array;
  /** Activations of the microbatch that stay alive after the block. */
  readonly after: number;
}

const NOTHING: AliveBytes = { activation: 0, workspace: 0 };

/** The memory of one stage over a step. */
export class MemoryCurve {
  readonly model: PlanModel;
  readonly stage: number;
  readonly runs: StageRuns;
  readonly #curves = new Map<number, BlockCurve>();
  /** Per run, the activations of other microbatches. */
  readonly #others: Float64Array;
  /** Per run, the activations of all microbatches after it. */
  readonly #held: Float64Array;

  /** Throws if the plan has no such stage. */
  constructor(model: PlanModel, stage: number) {
    const runs = model.runs[stage];
    if (!runs) throw new Error(`rankc: the plan has no stage ${stage}`);
    this.model = model;
    this.stage = stage;
    this.runs = runs;
    this.#others = new Float64Array(runs.length);
    this.#held = new Float64Array(runs.length);
    const own = new Map<string, number>();
    let held = 0;
    for (let i = 0; i < runs.length; i++) {
      const key = `${runs.microbatch[i]} ${runs.chunk[i]}`;
      const others = held - (own.get(key) ?? 0);
      const after = this.#curveOf(i)?.after ?? 0;
      own.set(key, after);
      held = others + after;
      this.#others[i] = others;
      this.#held[i] = held;
    }
  }

  /** Returns the most bytes that are alive at one moment between two times. */
  most(from: number, to: number): AliveBytes {
    const { runs } = this;
    const first = Math.max(0, runs.begunAt(from) - 1);
    let best = NOTHING;
    const take = (activation: number, workspace: number): void => {
      if (activation + workspace > best.activation + best.workspace) best = { activation, workspace };
    };
    for (let i = first; i < runs.length && (runs.start[i] ?? 0) < to; i++) {
      const [start, end] = [runs.start[i] ?? 0, runs.end[i] ?? 0];
      take(end <= from || to > end ? (this.#held[i] ?? 0) : 0, 0);
      const curve = this.#curveOf(i);
      if (end <= from || !curve) continue;
      const place = (time: number): number => placeIn(curve.begin, (time - start) / (end - start));
      const [low, high] = [place(from), place(to)];
      const others = this.#others[i] ?? 0;
      if (low <= curve.peak && curve.peak <= high) take(others + (curve.activation[curve.peak] ?? 0), curve.workspace[curve.peak] ?? 0);
      else for (let n = low; n <= high; n++) take(others + (curve.activation[n] ?? 0), curve.workspace[n] ?? 0);
    }
    return best;
  }

  /** Returns the instruction that runs at a time; undefined while the stage waits. */
  instructionAt(time: number) {
    const run = this.runs.at(time);
    const block = run === undefined ? undefined : this.#block(run);
    if (run === undefined || !block) return undefined;
    const all = this.model.instructions(this.stage, block);
    const n = placeIn(this.#curveOf(run)?.begin ?? new Float64Array(1), (time - (this.runs.start[run] ?? 0)) / this.runs.duration(run));
    return { run, block, instruction: all[n], n };
  }

  /** Returns what is alive at a time, by falling bytes: tensors of the whole run, activations in flight, and the buffers of the block that runs. */
  aliveAt(time: number): AliveGroup[] {
    const groups = new Map<string, AliveGroup & { count: number; bytes: number }>();
    const add = (kind: string, id: string, count: number, bytes: number): void => {
      const key = `${kind} ${id}`;
      const known = groups.get(key) ?? { kind, id, count: 0, bytes: 0 };
      known.count += count;
      known.bytes += bytes;
      groups.set(key, known);
    };
    for (const { kind, id, count, bytes } of this.model.view.stages[this.stage]?.state ?? []) add(kind, id, count, bytes);
    const now = this.instructionAt(time);
    for (const { chunk, bytes } of this.#inFlight(time, now?.run))
      add("activation", `other microbatches in flight${this.model.chunks > 1 ? `, chunk ${chunk}` : ""}`, 1, bytes);
    if (now)
      for (const { id, kind, bytes, from, to } of this.model.lives(now.block))
        if (from <= now.n && now.n <= to) add(kind, inAnyLayer(id), 1, bytes);
    return [...groups.values()].sort((a, b) => b.bytes - a.bytes);
  }

  /** Returns the activations that microbatches keep at a time, without those of one run. */
  #inFlight(time: number, without: number | undefined) {
    const kept = new Map<string, { readonly chunk: number; readonly bytes: number }>();
    const last = this.runs.begunAt(time);
    for (let i = 0; i < last; i++) {
      const chunk = this.runs.chunk[i] ?? 0;
      kept.set(`${this.runs.microbatch[i]} ${chunk}`, { chunk, bytes: this.#curveOf(i)?.after ?? 0 });
    }
    if (without !== undefined) kept.delete(`${this.runs.microbatch[without]} ${this.runs.chunk[without]}`);
    return [...kept.values()].filter(({ bytes }) => bytes > 0);
  }

  #block(run: number): BlockView | undefined {
    return this.model.block(this.stage, this.runs.kindOf(run), this.runs.chunk[run] ?? 0);
  }

  #curveOf(run: number): BlockCurve | undefined {
    const key = 4 * (this.runs.chunk[run] ?? 0) + (this.runs.kind[run] ?? 0);
    const known = this.#curves.get(key);
    if (known) return known;
    const block = this.#block(run);
    if (!block) return undefined;
    const curve = this.#read(block);
    this.#curves.set(key, curve);
    return curve;
  }

  #read(block: BlockView): BlockCurve {
    const count = this.model.instructions(this.stage, block).length;
    const curve = { activation: new Float64Array(count), workspace: new Float64Array(count) };
    let after = 0;
    for (const { kind, bytes, from, to } of this.model.lives(block)) {
      const line = kind === "activation" ? curve.activation : curve.workspace;
      if (kind === "activation" && to >= count) after += bytes;
      for (let n = Math.max(0, from); n <= Math.min(count - 1, to); n++) line[n] = (line[n] ?? 0) + bytes;
    }
    let peak = 0;
    const sum = (n: number): number => (curve.activation[n] ?? 0) + (curve.workspace[n] ?? 0);
    for (let n = 1; n < count; n++) if (sum(n) > sum(peak)) peak = n;
    const slots = this.model.slots(this.stage, block);
    const begin = new Float64Array(count);
    for (let n = 0; n < count; n++) begin[n] = Math.max(begin[n - 1] ?? 0, slots[2 * n] ?? 0);
    return { ...curve, peak, begin, after };
  }
}

/** Returns the last instruction that has begun at a share of a block. */
function placeIn(begin: Float64Array, share: number): number {
  let [low, high] = [0, begin.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((begin[middle] ?? 0) <= share) low = middle + 1;
    else high = middle;
  }
  return Math.max(0, low - 1);
}
