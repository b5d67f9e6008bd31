/**
 * The order in which each stage runs its blocks. 1F1B: stage s starts with stages - s - 1 forwards, then alternates one forward and
 * one backward. Interleaved (Narayanan et al. 2021): 1F1B over chunks, with microbatches in groups of at least as many as there are
 * stages. Zero-bubble (Qi et al. 2023, ZB-H1): gradients of weights fill the bubbles; no stage holds more microbatches in flight than
 * the first stage does under 1F1B; over chunks, forwards and backwards have the order of the interleaved schedule. With
 * `expert_overlap: interleave` the alternating forwards and backwards run in pairs: a stage then starts with one forward more, and twice as
 * many for each later stage, because a pair ends as a whole: what it sends is used one pair later.
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
      ? zeroBubble(m, stages, chunks)
      : Array.from({ length: stages }, (_, stage) =>
          chunks > 1 ? interleaved(m, stages, chunks, stage, inPairs) : oneForwardOneBackward(m, stages, stage, inPairs),
        );
  // the last stage sends up to a whole group before the first stage starts the next chunk; stages - 1 microbatches are still on their way
  const inFlight = chunks > 1 ? Math.max(1, largest(groupsOf(m, stages), (n) => n) - stages + 1) : 1;
  return orders.map((order) => ({ order, inFlight, copies: copiesOf(order, chunks) }));
}

const forward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "forward", microbatch, chunk });
const backward = (microbatch: number, chunk = 0): BlockRun => ({ kind: "backward", microbatch, chunk });
const weights = (microbatch: number, chunk = 0): BlockRun => ({ kind: "weights", microbatch, chunk });

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

/** A forward or backward of one microbatch through one chunk. */
interface Visit {
  readonly microbatch: number;
  readonly chunk: number;
}

/** Returns the forwards of a stage: each group of microbatches runs through chunk 0, chunk 1, and so on. */
function visitsOf(m: number, stages: number, chunks: number): Visit[] {
  let first = 0;
  return groupsOf(m, chunks > 1 ? stages : 1).flatMap((size) => {
    const from = first;
    first += size;
    return Array.from({ length: size * chunks }, (_, k) => ({ microbatch: from + (k % size), chunk: Math.floor(k / size) }));
  });
}

/** Returns how many forwards a stage runs before it alternates. Over chunks the number follows from the first group, the largest. */
const aheadOf = (m: number, stages: number, chunks: number, stage: number): number =>
  chunks > 1 ? 2 * (stages - stage - 1) + (chunks - 1) * largest(groupsOf(m, stages), (n) => n) : stages - stage - 1;

/** Returns the interleaved order of a stage. Backward passes the chunks in reverse. */
function interleaved(m: number, stages: number, chunks: number, stage: number, inPairs: boolean): BlockRun[] {
  const all = visitsOf(m, stages, chunks);
  return alternate(
    all.map((w) => forward(w.microbatch, w.chunk)),
    all.map((w) => backward(w.microbatch, chunks - 1 - w.chunk)),
    Math.min(m * chunks, aheadOf(m, stages, chunks, stage) + Number(inPairs)),
    inPairs,
  );
}

const kindNumbers: Readonly<Record<BlockRun["kind"], number>> = { forward: 0, backward: 1, weights: 2 };

/** Returns the virtual stage of a block that a stage runs. */
const virtualOf = ({ chunk }: BlockRun, stage: number, stages: number): number => chunk * stages + stage;

/** Returns the number of a block of a virtual stage among all blocks of a pipeline. */
const blockNumber = ({ kind, microbatch }: Pick<BlockRun, "kind" | "microbatch">, virtual: number, virtualStages: number): number =>
  (microbatch * virtualStages + virtual) * 3 + kindNumbers[kind];

/**
 * Returns the numbers of the blocks that a block waits for: a forward for the previous virtual stage, a backward for its forward and the next virtual
 * stage, weight gradients for their backward.
 */
function blocksBefore({ kind, microbatch }: BlockRun, virtual: number, virtualStages: number): number[] {
  const before = (kind: BlockRun["kind"], of: number): number => blockNumber({ kind, microbatch }, of, virtualStages);
  if (kind === "forward") return virtual > 0 ? [before("forward", virtual - 1)] : [];
  if (kind === "weights") return [before("backward", virtual)];
  return [before("forward", virtual), ...(virtual < virtualStages - 1 ? [before("backward", virtual + 1)] : [])];
}

/** A stage of a simulated zero-bubble schedule: its order so far, and how many blocks of each kind are in it. */
interface ZeroBubbleStage {
  readonly order: BlockRun[];
  forwards: number;
  backwards: number;
  weights: number;
}

/**
 * Returns the zero-bubble order of every stage, by simulation with one unit of time per block. A stage starts with one forward more than the
 * schedule without separate weight gradients. Then it repeats a backward, the weight gradients of an earlier one, and a forward. A stage
 * without a ready backward computes weight gradients. With one chunk a stage this is ZB-H1.
 */
function zeroBubble(m: number, stages: number, chunks: number): BlockRun[][] {
  const visits = visitsOf(m, stages, chunks);
  const simulated = Array.from({ length: stages }, (): ZeroBubbleStage => ({ order: [], forwards: 0, backwards: 0, weights: 0 }));
  const virtualStages = stages * chunks;
  const ends = new Map<number, number>();
  for (let now = 0; simulated.some((p) => p.weights < visits.length); now++)
    for (const [s, own] of simulated.entries()) {
      const virtual = (run: BlockRun): number => virtualOf(run, s, stages);
      const next = nextBlock(own, visits, chunks, {
        inFlight: aheadOf(m, stages, chunks, s) + 1,
        later: chunks > 1 ? 2 * s : s,
        isReady: (run) => blocksBefore(run, virtual(run), virtualStages).every((block) => (ends.get(block) ?? Infinity) <= now),
      });
      if (!next) continue;
      own.order.push(next);
      ends.set(blockNumber(next, virtual(next), virtualStages), now + 1);
      own[counters[next.kind]]++;
    }
  return simulated.map((p) => p.order);
}
const counters = { forward: "forwards", backward: "backwards", weights: "weights" } as const;

/** Limits of a stage, and whether all that a block waits for has ended. */
interface Readiness {
  /** The most forwards without their backward. */
  readonly inFlight: number;
  /** The most backwards without their weight gradients while forwards remain. */
  readonly later: number;
  readonly isReady: (run: BlockRun) => boolean;
}

/** Returns the block that a stage runs next; undefined if it waits. */
function nextBlock(own: ZeroBubbleStage, visits: readonly Visit[], chunks: number, ready: Readiness): BlockRun | undefined {
  const { forwards: f, backwards: b, weights: w } = own;
  const last = own.order.at(-1)?.kind;
  const at = (i: number, run: typeof forward, isReverse: boolean): BlockRun | undefined => {
    const visit = visits[i];
    return visit && run(visit.microbatch, isReverse ? chunks - 1 - visit.chunk : visit.chunk);
  };
  const [toForward, toBackward] = [at(f, forward, false), at(b, backward, true)];
  const canForward = toForward && f - b < ready.inFlight && ready.isReady(toForward);
  const canBackward = toBackward && ready.isReady(toBackward);
  const toWeights = w < b ? at(w, weights, true) : undefined;
  if (b - w > ready.later && last === "backward" && toForward) return toWeights;
  if (canForward && last !== "forward") return toForward;
  if (canBackward) return toBackward;
  return canForward ? toForward : toWeights;
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

/**
 * Simulates a pipeline and returns the block runs of each stage with their times. Each stage runs its order; transfers take no time, and
 * blocks wait for those of `blocksBefore`. The block runs of a pair begin when both may, and others wait for the end of both. A stage that would wait
 * for ever stops: its result is then shorter than its order. `lengthOf` returns the duration of a block run.
 */
export function timesOf(orders: readonly (readonly BlockRun[])[], chunks: number, lengthOf = unitsOf): Piece[][] {
  const stages = orders.length;
  const split = orders.some((order) => order.some(({ kind }) => kind === "weights"));
  const virtualStages = stages * chunks;
  const ends = new Map<number, number>();
  const simulated = orders.map((order) => ({ order, pieces: [] as Piece[], clock: 0 }));
  for (let moved = true; moved; ) {
    moved = false;
    for (const [stage, own] of simulated.entries())
      for (let run = own.order[own.pieces.length]; run; run = own.order[own.pieces.length]) {
        const next = run.paired ? own.order[own.pieces.length + 1] : undefined;
        const group = next ? [run, next] : [run];
        let start: number | undefined = own.clock;
        for (const r of group)
          for (const need of blocksBefore(r, virtualOf(r, stage, stages), virtualStages)) {
            const end = ends.get(need);
            start = end === undefined || start === undefined ? undefined : Math.max(start, end);
          }
        if (start === undefined) break;
        for (const r of group) {
          const end: number = start + lengthOf(r, split);
          own.pieces.push({ run: r, start, end });
          start = end;
        }
        for (const r of group) ends.set(blockNumber(r, virtualOf(r, stage, stages), virtualStages), start);
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
