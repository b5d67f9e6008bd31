/**
 * schedule: the order of work of each stage. 1F1B: stage s runs ahead by stages - s - 1 forwards, then alternates one
 * forward and one backward. Interleaved (Narayanan et al. 2021): the same over chunks, microbatches in groups of at least as
 * many as there are stages. Zero-bubble (Qi et al. 2023, ZB-H1): the gradients of weights wait for the gaps; no stage holds more
 * microbatches than the first one does under 1F1B.
 */

import { phasesOf } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";
import { type BlockRun, blockTag, parseTag } from "../../schemas/program.ts";
import { largest } from "../units.ts";

export interface Schedule {
  readonly order: readonly string[];
  /** Messages of one name that a chunk has sent to the next chunk before the first of them is received, at most. */
  readonly inFlight: number;
  /** Per chunk, microbatches in flight at most: copies of every activation that backward needs. */
  readonly copies: readonly number[];
}

type Scheduled = Pick<Job, "train" | "parallel">;

export const microbatchesOf = ({ train, parallel }: Scheduled): number => train.global_batch / (train.micro_batch * parallel.data);
/** … and of steps while the batch grows. */
export const smallerStepsOf = ({ train, parallel }: Scheduled): number[] =>
  phasesOf(train)
    .slice(0, -1)
    .map(({ batch }) => batch / (train.micro_batch * parallel.data));

/** `chunks`: virtual stages of each stage. */
export function schedule(job: Scheduled, chunks: number): Schedule[] {
  const m = microbatchesOf(job);
  const stages = job.parallel.pipeline;
  const orders =
    job.parallel.schedule === "zero_bubble"
      ? zeroBubble(m, stages)
      : Array.from({ length: stages }, (_, stage) =>
          chunks > 1 ? interleaved(m, stages, chunks, stage) : oneForwardOneBackward(m, stages, stage),
        );
  // a group leaves a chunk on the last stage before the first stage is free for the next chunk, but for the stages that it is spread over
  const inFlight = chunks > 1 ? Math.max(1, groupsOf(m, stages)[0]! - stages + 1) : 1;
  return orders.map((order) => ({ order: order.map((w) => blockTag(w, chunks)), inFlight, copies: slotsOf(order, chunks) }));
}

const forward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "forward", microbatch, chunk });
const backward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "backward", microbatch, chunk });
const weights = (microbatch: number): BlockRun => ({ kind: "weights", microbatch, chunk: 0 });

/** `ahead` forwards, then one backward for each forward, then the rest. */
const alternate = (forwards: readonly BlockRun[], backwards: readonly BlockRun[], ahead: number): BlockRun[] => [
  ...forwards.slice(0, ahead),
  ...forwards.slice(ahead).flatMap((f, i) => [f, backwards[i]!]),
  ...backwards.slice(forwards.length - ahead),
];

function oneForwardOneBackward(m: number, stages: number, stage: number): BlockRun[] {
  const each = Array.from({ length: m }, (_, i) => i);
  return alternate(
    each.map((i) => forward(i)),
    each.map((i) => backward(i)),
    Math.min(m, stages - stage - 1),
  );
}

/**
 * Sizes of the groups of interleaved microbatches. A group of fewer microbatches than stages would return to the first stage before
 * it is free, so a remainder is spread over the groups, the first of them first.
 */
function groupsOf(m: number, stages: number): number[] {
  const groups = Math.max(1, Math.floor(m / stages));
  return Array.from({ length: groups }, (_, group) => Math.floor((m + groups - 1 - group) / groups));
}

/**
 * Groups of microbatches go through chunk 0, then through chunk 1, and so on; backward the other way round. The warm-up is as long as
 * the largest group, the first, needs.
 */
function interleaved(m: number, stages: number, chunks: number, stage: number): BlockRun[] {
  const sizes = groupsOf(m, stages);
  let first = 0;
  const all = sizes.flatMap((size) => {
    const from = first;
    first += size;
    return Array.from({ length: size * chunks }, (_, k) => ({ microbatch: from + (k % size), chunk: Math.floor(k / size) }));
  });
  const ahead = Math.min(m * chunks, 2 * (stages - stage - 1) + (chunks - 1) * sizes[0]!);
  return alternate(
    all.map((w) => forward(w.microbatch, w.chunk)),
    all.map((w) => backward(w.microbatch, chunks - 1 - w.chunk)),
    ahead,
  );
}

/**
 * Found by playing it, every block one unit of time. Stage s runs ahead by stages - s forwards; then come, in turns, a backward, the
 * gradients of weights of the microbatch s before it, and a forward. Who has to wait for a backward makes gradients of weights.
 */
function zeroBubble(m: number, stages: number): BlockRun[][] {
  const played = Array.from({ length: stages }, () => ({
    order: [] as BlockRun[],
    forwards: [] as number[],
    backwards: [] as number[],
    weights: 0,
  }));
  /** When a block was over, and whether it is by now. */
  const over = (ends: readonly number[] | undefined, i: number, now: number): boolean => (ends?.[i] ?? Infinity) <= now;
  for (let now = 0; played.some((p) => p.weights < m); now++)
    for (const [s, own] of played.entries()) {
      const [f, b, w] = [own.forwards.length, own.backwards.length, own.weights];
      const last = own.order.at(-1)?.kind;
      const forwardMay = f < m && f - b < stages - s && (s === 0 || over(played[s - 1]!.forwards, f, now));
      const backwardMay = b < m && over(own.forwards, b, now) && (s === stages - 1 || over(played[s + 1]!.backwards, b, now));
      const due = b - w > s;
      const next =
        due && last === "backward" && f < m
          ? "weights"
          : forwardMay && last !== "forward"
            ? "forward"
            : backwardMay
              ? "backward"
              : forwardMay
                ? "forward"
                : w < b
                  ? "weights"
                  : undefined;
      if (next === "forward") own.order.push(forward(own.forwards.push(now + 1) - 1));
      else if (next === "backward") own.order.push(backward(own.backwards.push(now + 1) - 1));
      else if (next === "weights") own.order.push(weights(own.weights++));
    }
  return played.map((p) => p.order);
}

/** A microbatch is in flight from its forward to the last block that is made of it. */
function slotsOf(order: readonly BlockRun[], chunks: number): number[] {
  const last: BlockRun["kind"] = order.some((w) => w.kind === "weights") ? "weights" : "backward";
  return Array.from({ length: chunks }, (_, chunk) => {
    let [now, most] = [0, 0];
    for (const w of order) {
      if (w.chunk !== chunk) continue;
      if (w.kind === "forward") most = Math.max(most, ++now);
      else if (w.kind === last) now--;
    }
    return most;
  });
}

/** A block of a stage in time; a unit is a forward. */
export interface Piece {
  readonly tag: string;
  readonly start: number;
  readonly end: number;
}

/** Units of time. A backward that leaves the gradients of weights to later takes half of a whole one. */
const unitsOf = ({ kind }: BlockRun, split: boolean): number => (kind === "backward" && !split ? 2 : 1);

/**
 * Each stage executes its own list in order, at the speed of `unitsOf`; transfers are free. A forward waits for the virtual stage
 * before, a backward for its own forward and for the virtual stage after, the gradients of weights for their backward. A stage that
 * would wait for ever stops where it stands: its list of pieces is then shorter than its order.
 */
export function timesOf(orders: readonly (readonly string[])[], chunks: number): Piece[][] {
  const stages = orders.length;
  const split = orders.some((order) => order.some((tag) => tag.startsWith("W")));
  const ends = new Map<string, number>();
  const pieces: Piece[][] = orders.map(() => []);
  const clock = orders.map(() => 0);
  const key = (kind: BlockRun["kind"], microbatch: number, v: number): string => `${kind} ${microbatch} ${v}`;
  const needs = ({ kind, microbatch }: BlockRun, v: number): string[] => {
    if (kind === "forward") return v > 0 ? [key("forward", microbatch, v - 1)] : [];
    if (kind === "weights") return [key("backward", microbatch, v)];
    return [key("forward", microbatch, v), ...(v < stages * chunks - 1 ? [key("backward", microbatch, v + 1)] : [])];
  };
  for (let moved = true; moved; ) {
    moved = false;
    for (const [stage, order] of orders.entries())
      for (let tag = order[pieces[stage]!.length]; tag !== undefined; tag = order[pieces[stage]!.length]) {
        const work = parseTag(tag);
        const v = work.chunk * stages + stage;
        const ready = needs(work, v).map((need) => ends.get(need));
        if (ready.includes(undefined)) break;
        const start = Math.max(clock[stage]!, ...ready.map((end) => end ?? 0));
        const end = start + unitsOf(work, split);
        pieces[stage]!.push({ tag, start, end });
        ends.set(key(work.kind, work.microbatch, v), end);
        clock[stage] = end;
        moved = true;
      }
  }
  return pieces;
}

/** Units of time until every stage is done. */
export const durationOf = (pieces: readonly (readonly Piece[])[]): number => largest(pieces, (stage) => stage.at(-1)?.end ?? 0);

/** The share of the time, from the first block to the last, in which a stage waits; over all stages. */
export function bubbleOf(pieces: readonly (readonly Piece[])[]): number {
  const units = durationOf(pieces);
  const busy = pieces.flat().reduce((sum, { start, end }) => sum + end - start, 0);
  return units === 0 ? 0 : 1 - busy / (units * pieces.length);
}

export function printSchedule(roles: readonly Schedule[]): string {
  return roles.map((r, s) => `stage ${s}  ${r.copies.join(" + ")} in flight  ${r.order.join(" ")}\n`).join("");
}
