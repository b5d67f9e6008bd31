/** The block runs of a stage over time, for drawing: the run at a time, and how busy the stage is between two times. */
import { type RunTimes, runKinds } from "../report/view/planView.ts";

const letters = ["F", "B", "W", "step"];

/** The block runs of one stage by time. */
export class StageRuns {
  readonly kind: Uint8Array;
  readonly microbatch: Int32Array;
  readonly chunk: Uint16Array;
  readonly start: Float64Array;
  readonly end: Float64Array;
  readonly #chunks: number;
  /** Per kind, the time that all runs before one take. */
  readonly #busy: readonly Float64Array[];
  readonly #places: ReadonlyMap<number, number>;

  /** Per run of a pair the other one. */
  readonly #partners = new Map<number, number>();

  constructor({ kind, microbatch, chunk, start, end, paired = [] }: RunTimes) {
    this.kind = Uint8Array.from(kind);
    this.microbatch = Int32Array.from(microbatch);
    this.chunk = Uint16Array.from(chunk);
    this.start = Float64Array.from(start);
    this.end = Float64Array.from(end);
    this.#chunks = chunk.reduce((most, c) => Math.max(most, c + 1), 1);
    this.#busy = runKinds.map((_, k) => {
      const sums = new Float64Array(this.length + 1);
      for (let i = 0; i < this.length; i++) sums[i + 1] = (sums[i] ?? 0) + (this.kind[i] === k ? this.duration(i) : 0);
      return sums;
    });
    const places = new Map<number, number>();
    for (let i = 0; i < this.length; i++) places.set(this.#key(this.kind[i] ?? 0, this.microbatch[i] ?? 0, this.chunk[i] ?? 0), i);
    this.#places = places;
    for (const i of paired) this.#partners.set(i, i + 1).set(i + 1, i);
  }

  get length(): number {
    return this.start.length;
  }
  duration(i: number): number {
    return (this.end[i] ?? 0) - (this.start[i] ?? 0);
  }
  kindOf(i: number): (typeof runKinds)[number] {
    return runKinds[this.kind[i] ?? 0] ?? "forward";
  }

  #key(kind: number, microbatch: number, chunk: number): number {
    return (microbatch * this.#chunks + chunk) * runKinds.length + kind;
  }

  /** Returns the number of a run; undefined if the stage has none. */
  place(kind: number, microbatch: number, chunk: number): number | undefined {
    return chunk >= this.#chunks || chunk < 0 ? undefined : this.#places.get(this.#key(kind, microbatch, chunk));
  }

  /** Returns the run whose instructions alternate with those of a run; undefined if it runs alone. */
  partnerOf(i: number): number | undefined {
    return this.#partners.get(i);
  }
  get hasPairs(): boolean {
    return this.#partners.size > 0;
  }

  /** Returns the number of runs that begin at or before a time. */
  begunAt(time: number): number {
    let [low, high] = [0, this.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((this.start[middle] ?? 0) <= time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Returns the run at a time; undefined while the stage waits. */
  at(time: number): number | undefined {
    const i = this.begunAt(time) - 1;
    return i >= 0 && time < (this.end[i] ?? 0) ? i : undefined;
  }

  /** Returns the time that runs of a kind take before a time. `begun`: the result of `begunAt`. */
  busyUntil(kind: number, time: number, begun: number): number {
    const i = begun - 1;
    if (i < 0) return 0;
    const before = this.#busy[kind]?.[i] ?? 0;
    return this.kind[i] === kind ? before + Math.min(time - (this.start[i] ?? 0), this.duration(i)) : before;
  }

  /** Returns the name of a run: `F3`, with several chunks `F3.1`. */
  tag(i: number): string {
    if (this.kindOf(i) === "step") return "step";
    const name = `${letters[this.kind[i] ?? 0]}${this.microbatch[i]}`;
    return this.#chunks > 1 ? `${name}.${this.chunk[i]}` : name;
  }
}
