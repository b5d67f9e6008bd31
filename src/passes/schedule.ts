/**
 * The order in which each stage runs its blocks. 1F1B: stage s starts with stages - s - 1 forwards, then alternates one forward and
 * one backward. Interleaved (Narayanan et al. 2021): 1F1B over chunks, with microbatches in groups of at least as many as there are
 * stages. Zero-bubble (Qi et al. 2023, ZB-H1): gradients of weights fill the bubbles; no stage holds more microbatches in flight than
 * the first stage does under 1F1B. With `expert_overlap: interleave` the alternating forwards and backwards run in pairs: a stage then starts
 * with one forward more, and twice as many for each later stage, because a pair ends as a whole: what it sends is used one pair later.
 */

import { phasesOf } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";
import type { BlockRun } from "../../schemas/plan.ts";
import { blockTag } from "../../schemas/program.ts";
import { largest } from "../units.ts";
import { pairs } from "./layout.ts";
import { runsInPairs } from "./pipelineStages.ts";

/** The block runs of one stage, and the capacities that they need. */
export interface Schedule {
  /** The block runs, in the order in which they run. */
  readonly order: readonly BlockRun[];
  /** The largest number of messages of one name that are sent to the next chunk and not yet received. */
  readonly inFlight: number;
  /** Per chunk, the largest number of microbatches in flight: the number of activation copies. */
  readonly copies: readonly number[];
}

type Scheduled = Pick<Job, "train" | "parallel">;

/** Returns the number of microbatches of a step with the full batch. */
export const microbatchesOf = ({ train, parallel }: Scheduled): number => train.global_batch / (train.micro_batch * parallel.data);
/** Returns the numbers of microbatches of the steps during batch ramp-up. */
export const smallerStepsOf = ({ train, parallel }: Scheduled): number[] =>
  phasesOf(train)
    .slice(0, -1)
    .map(({ batch }) => batch / (train.micro_batch * parallel.data));

/** Returns the schedule of each stage. `chunks` is the number of virtual stages per stage. */
export function schedule(job: Scheduled, chunks: number): Schedule[] {
  const m = microbatchesOf(job);
  const stages = job.parallel.pipeline;
  const inPairs = runsInPairs(job);
  const orders =
    job.parallel.schedule === "zero_bubble"
      ? zeroBubble(m, stages)
      : Array.from({ length: stages }, (_, stage) =>
          chunks > 1 ? interleaved(m, stages, chunks, stage, inPairs) : oneForwardOneBackward(m, stages, stage, inPairs),
        );
  // the last stage sends up to a whole group before the first stage starts the next chunk; stages - 1 microbatches are still on their way
  const inFlight = chunks > 1 ? Math.max(1, largest(groupsOf(m, stages), (n) => n) - stages + 1) : 1;
  return orders.map((order) => ({ order, inFlight, copies: copiesOf(order, chunks) }));
}

const forward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "forward", microbatch, chunk });
const backward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "backward", microbatch, chunk });
const weights = (microbatch: number): BlockRun => ({ kind: "weights", microbatch, chunk: 0 });

/** Returns `ahead` forwards, then one forward and one backward in turn, which may be a pair, then the remaining backwards. */
const alternate = (forwards: readonly BlockRun[], backwards: readonly BlockRun[], ahead: number, inPairs: boolean): BlockRun[] => [
  ...forwards.slice(0, ahead),
  ...pairs(
    forwards.slice(ahead).map((run): BlockRun => (inPairs ? { ...run, paired: true } : run)),
    backwards.slice(0, forwards.length - ahead),
  ).flat(),
  ...backwards.slice(forwards.length - ahead),
];

function oneForwardOneBackward(m: number, stages: number, stage: number, inPairs: boolean): BlockRun[] {
  const each = Array.from({ length: m }, (_, i) => i);
  const later = stages - stage - 1;
  return alternate(
    each.map((i) => forward(i)),
    each.map((i) => backward(i)),
    Math.min(m, inPairs ? 2 * later + 1 : later),
    inPairs,
  );
}

/**
 * Returns the sizes of the groups of interleaved microbatches. A group with fewer microbatches than stages would leave bubbles, so a
 * remainder is spread over the groups, starting with the first.
 */
function groupsOf(m: number, stages: number): number[] {
  const groups = Math.max(1, Math.floor(m / stages));
  return Array.from({ length: groups }, (_, group) => Math.floor((m + groups - 1 - group) / groups));
}

/**
 * Returns the interleaved order of a stage. Each group of microbatches runs through chunk 0, chunk 1, and so on; backward in reverse.
 * The length of the warm-up follows from the first group, the largest.
 */
function interleaved(m: number, stages: number, chunks: number, stage: number, inPairs: boolean): BlockRun[] {
  const sizes = groupsOf(m, stages);
  let first = 0;
  const all = sizes.flatMap((size) => {
    const from = first;
    first += size;
    return Array.from({ length: size * chunks }, (_, k) => ({ microbatch: from + (k % size), chunk: Math.floor(k / size) }));
  });
  const ahead = Math.min(m * chunks, 2 * (stages - stage - 1) + (chunks - 1) * largest(sizes, (n) => n) + Number(inPairs));
  return alternate(
    all.map((w) => forward(w.microbatch, w.chunk)),
    all.map((w) => backward(w.microbatch, chunks - 1 - w.chunk)),
    ahead,
    inPairs,
  );
}

/**
 * Returns the ZB-H1 order of every stage, by simulation with one unit of time per block. Stage s starts with stages - s forwards. Then
 * it repeats a backward, the weight gradients of the microbatch s before, and a forward. A stage without a ready backward computes
 * weight gradients.
 */
function zeroBubble(m: number, stages: number): BlockRun[][] {
  const simulated = Array.from({ length: stages }, () => ({
    order: [] as BlockRun[],
    forwards: [] as number[],
    backwards: [] as number[],
    weights: 0,
  }));
  /** Returns whether block `i` has ended by time `now`. */
  const hasEnded = (ends: readonly number[] | undefined, i: number, now: number): boolean => (ends?.[i] ?? Infinity) <= now;
  for (let now = 0; simulated.some((p) => p.weights < m); now++)
    for (const [s, own] of simulated.entries()) {
      const [f, b, w] = [own.forwards.length, own.backwards.length, own.weights];
      const last = own.order.at(-1)?.kind;
      const canForward = f < m && f - b < stages - s && (s === 0 || hasEnded(simulated[s - 1]?.forwards, f, now));
      const canBackward = b < m && hasEnded(own.forwards, b, now) && (s === stages - 1 || hasEnded(simulated[s + 1]?.backwards, b, now));
      const due = b - w > s;
      const next =
        due && last === "backward" && f < m
          ? "weights"
          : canForward && last !== "forward"
            ? "forward"
            : canBackward
              ? "backward"
              : canForward
                ? "forward"
                : w < b
                  ? "weights"
                  : undefined;
      if (next === "forward") own.order.push(forward(own.forwards.push(now + 1) - 1));
      else if (next === "backward") own.order.push(backward(own.backwards.push(now + 1) - 1));
      else if (next === "weights") own.order.push(weights(own.weights++));
    }
  return simulated.map((p) => p.order);
}

/** Returns per chunk the largest number of microbatches in flight: from the forward of a microbatch to its last block. */
function copiesOf(order: readonly BlockRun[], chunks: number): number[] {
  const last: BlockRun["kind"] = order.some((w) => w.kind === "weights") ? "weights" : "backward";
  const counts = Array.from({ length: chunks }, () => ({ now: 0, most: 0 }));
  for (const { chunk, kind } of order) {
    const own = counts[chunk];
    if (!own) continue;
    if (kind === "forward") own.most = Math.max(own.most, ++own.now);
    else if (kind === last) own.now--;
  }
  return counts.map(({ most }) => most);
}

/** A block run of a simulated stage, in units of the duration of a forward. */
export interface Piece {
  readonly run: BlockRun;
  readonly start: number;
  readonly end: number;
}

/** Returns the duration of a block run. A backward without weight gradients takes half as long as a whole one. */
const unitsOf = ({ kind }: BlockRun, split: boolean): number => (kind === "backward" && !split ? 2 : 1);

const kindNumbers: Readonly<Record<BlockRun["kind"], number>> = { forward: 0, backward: 1, weights: 2 };

/**
 * Simulates a pipeline and returns the block runs of each stage with their times. Each stage runs its order; transfers take no time. A
 * forward waits for the previous virtual stage, a backward for its forward and the next virtual stage, weight gradients for their
 * backward. The block runs of a pair begin when both may, and others wait for the end of both. A stage that would wait for ever stops: its result is then shorter than its order. `lengthOf` returns the duration of a block run.
 */
export function timesOf(orders: readonly (readonly BlockRun[])[], chunks: number, lengthOf = unitsOf): Piece[][] {
  const stages = orders.length;
  const split = orders.some((order) => order.some(({ kind }) => kind === "weights"));
  const ends = new Map<number, number>();
  const simulated = orders.map((order) => ({ order, pieces: [] as Piece[], clock: 0 }));
  const key = (kind: BlockRun["kind"], microbatch: number, v: number): number => (microbatch * stages * chunks + v) * 3 + kindNumbers[kind];
  const needs = ({ kind, microbatch }: BlockRun, v: number): number[] => {
    if (kind === "forward") return v > 0 ? [key("forward", microbatch, v - 1)] : [];
    if (kind === "weights") return [key("backward", microbatch, v)];
    return [key("forward", microbatch, v), ...(v < stages * chunks - 1 ? [key("backward", microbatch, v + 1)] : [])];
  };
  for (let moved = true; moved; ) {
    moved = false;
    for (const [stage, own] of simulated.entries())
      for (let run = own.order[own.pieces.length]; run; run = own.order[own.pieces.length]) {
        const next = run.paired ? own.order[own.pieces.length + 1] : undefined;
        const group = next ? [run, next] : [run];
        let start: number | undefined = own.clock;
        for (const r of group)
          for (const need of needs(r, r.chunk * stages + stage)) {
            const end = ends.get(need);
            start = end === undefined || start === undefined ? undefined : Math.max(start, end);
          }
        if (start === undefined) break;
        for (const r of group) {
          const end: number = start + lengthOf(r, split);
          own.pieces.push({ run: r, start, end });
          start = end;
        }
        for (const { kind, microbatch, chunk } of group) ends.set(key(kind, microbatch, chunk * stages + stage), start);
        own.clock = start;
        moved = true;
      }
  }
  return simulated.map(({ pieces }) => pieces);
}

/** Returns the units of time until every stage has ended. */
export const durationOf = (pieces: readonly (readonly Piece[])[]): number => largest(pieces, (stage) => stage.at(-1)?.end ?? 0);

/** Returns the bubble of a simulated pipeline: the share of time in which stages wait, from 0 to 1. */
export function bubbleOf(pieces: readonly (readonly Piece[])[]): number {
  const units = durationOf(pieces);
  const busy = pieces.flat().reduce((sum, { start, end }) => sum + end - start, 0);
  return units === 0 ? 0 : 1 - busy / (units * pieces.length);
}

/** Prints the schedule of each stage on one line. */
export function printSchedule(schedules: readonly Schedule[]): string {
  return schedules
    .map(({ order, copies }, s) => {
      const tags = order.map((run) => blockTag(run, copies.length));
      return `stage ${s}  ${copies.join(" + ")} in flight  ${tags.join(" ")}\n`;
    })
    .join("");
}
