/**
 * Laws of programs, checked on every compile before anything is written or run. Every buffer is written before it is read. Each
 * microbatch runs forward, then backward, in its own activation copy. No rank waits for ever. Ranks of a stage run one program, so
 * members of a group within a stage issue the same collectives in the same order. Transfers between stages and collectives of all
 * ranks are simulated: a receive waits for its send, a send waits while the permitted number of messages of its name is in flight, a
 * collective of all ranks waits for all stages. The smaller steps of a batch ramp-up are simulated as well.
 */

import { accumulatesInto, pairsOf, readsOf, writesOf } from "../../schemas/effects.ts";
import type { Buffer, Instruction, Program, Transfer } from "../../schemas/plan.ts";
import {
  type Block,
  blocksOf,
  blockTag,
  evaluationOrder,
  groupsOf,
  instructionsOf,
  microbatchBlocks,
  microbatchesIn,
  orderOf,
  type Turn,
  turnsOf,
} from "../../schemas/program.ts";
import { elementsOf, isDisjointSubAxes, rankAt } from "../../schemas/sharding.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { sizesAgree } from "../analysis/cost.ts";
import { BrokenInvariant } from "../ops/invariant.ts";
import { invariant } from "../ops/op.ts";
import type { Mesh } from "./mesh.ts";
import { verifyPairs } from "./verifyPairs.ts";
import { verifyLimits, verifyStreams } from "./verifyStreams.ts";

/** Throws an invariant if the programs break a law. `smaller` lists the numbers of microbatches of the steps during batch ramp-up. */
export function verifyPrograms(programs: readonly Program[], mesh: Mesh, smaller: readonly number[] = []): void {
  invariant(programs.length === mesh.world / mesh.per_stage, () => `${programs.length} programs for ${mesh.world / mesh.per_stage} stages`);
  for (const p of programs) {
    verifyDefinitions(p, mesh);
    verifyCollectives(p, mesh);
    verifyPairs(p, ranksOf(p.stage, mesh));
    verifyStreams(p, ranksOf(p.stage, mesh));
  }
  for (const steps of [programs, ...smaller.map((m) => programs.map((p) => ({ ...p, order: orderOf(p, m) })))]) {
    for (const p of steps) {
      verifyOrder(p, mesh);
      if (steps !== programs) verifyStreams(p, ranksOf(p.stage, mesh));
    }
    verifyWaits(steps.map(waitsOf), mesh);
  }
  verifyLimits(programs);
  const evaluated = programs.filter(({ evaluation }) => evaluation !== undefined).length;
  invariant(evaluated === 0 || evaluated === programs.length, () => `${evaluated} of ${programs.length} stages have an evaluation`);
  if (evaluated > 0) verifyWaits(programs.map(evaluationWaits), mesh);
}

/** Returns the name of a stage with its ranks: `stage 1 (ranks 4..7)`. */
function ranksOf(stage: number, mesh: Mesh): string {
  const [first, last] = [rankAt(mesh, stage, 0), rankAt(mesh, stage, mesh.per_stage - 1)];
  const by = mesh.stage_stride < mesh.per_stage && mesh.stage_stride > 1 ? ` in runs of ${mesh.stage_stride}` : "";
  return `stage ${stage} (${first === last ? `rank ${first}` : `ranks ${first}..${last}${by}`})`;
}

/** The kinds of blocks that no buffer of the block before passes to, unless it is lasting. */
const isApart: ReadonlySet<Block["kind"]> = new Set(["step", "evaluation", "evaluation_step"] as const);

/** Throws an invariant if an instruction reads a buffer before it is written, names an unknown buffer, or repeats an id. */
function verifyDefinitions(p: Program, mesh: Mesh): void {
  const who = ranksOf(p.stage, mesh);
  const lasting = new Set<string>(["parameter", "optimizer", "gradient"]);
  const known = new Map(p.buffers.map((b) => [b.id, b]));
  const made = new Set<string>([...p.buffers.filter((b) => b.kind === "parameter" || b.kind === "optimizer").map((b) => b.id)]);
  // what a step and an evaluation gather before they use it is not there when they begin
  const gathered = instructionsOf(p).flatMap((i) => (i.kind === "collective" && i.only === "first" ? writesOf(i, known) : []));
  for (const id of gathered) made.delete(id);
  const filled = new Set(p.inputs.map(({ buffer }) => buffer));
  for (const id of filled) {
    invariant(known.has(id), () => `${who}: the input ${id} is not a buffer`);
    made.add(id);
  }
  const ids = new Set<string>();
  // a stage without an addend contributes its zeroed accumulator to a sum over all ranks
  const all = instructionsOf(p);
  const addends = new Set(
    all.flatMap((i) => (i.kind === "collective" && i.world && known.get(i.from)?.kind === "gradient" ? [i.from] : [])),
  );
  if (addends.size > 0) for (const i of all) for (const id of writesOf(i, known)) addends.delete(id);
  let written: ReadonlySet<string> | undefined;
  const everWritten = (): ReadonlySet<string> => (written ??= new Set(all.flatMap((i) => writesOf(i, known))));
  for (const id of addends) made.add(id);
  const isMade = (id: string): boolean => made.has(id) || made.has(known.get(id)?.part?.of ?? id);
  const parts = partsOf(p);
  let own: Block | undefined;
  for (const block of blocksOf(p)) {
    // buffers do not pass from one chunk to the next, nor to the step block, unless they are lasting
    if (own && (own.chunk !== block.chunk || isApart.has(block.kind)))
      for (const id of made) if (!lasting.has(known.get(id)?.kind ?? "") && !filled.has(id)) made.delete(id);
    if (block.kind === "evaluation" && own?.kind !== "evaluation") for (const id of gathered) made.delete(id);
    own = block;
    for (const i of block.instructions) {
      invariant(!ids.has(i.id), () => `${who}: two instructions have the id ${i.id}`);
      ids.add(i.id);
      // messages are built for faults only: closures for each operand take longer than the checks
      const unknown = (id: string): void => invariant(false, `${who}: ${i.id} names ${id}, which is not a buffer`);
      const outs = writesOf(i, known);
      for (const id of outs) if (!known.has(id)) unknown(id);
      for (const id of readsOf(i)) {
        const b = known.get(id);
        if (!b) unknown(id);
        // a bucket has gradients of chunks whose backward ran before; verifyStreams proves that nothing writes them afterwards
        const isComplete = i.only === "last" && b?.kind === "gradient" && everWritten().has(id);
        if (!isMade(id) && !isComplete) invariant(false, `${who}: ${i.id} reads ${id} before it is written`);
        if (b?.rows && !made.has(b.rows)) invariant(false, `${who}: ${i.id} reads rows ${b.rows} before they are written`);
      }
      for (const id of accumulatesInto(i))
        if (!lasting.has(known.get(id)?.kind ?? ""))
          invariant(false, `${who}: ${i.id} accumulates into ${id}, which is not a lasting buffer`);
      // gradients are zeroed at the start of a step, so accumulation defines them
      for (const id of outs) {
        made.add(id);
        const of = known.get(id)?.part?.of;
        if (
          of !== undefined &&
          isCovered(
            known.get(of),
            (parts.get(of) ?? []).filter((part) => made.has(part.id)),
          )
        )
          made.add(of);
      }
    }
  }
}

/** Returns the parts of each buffer that has some, in their order. */
function partsOf({ buffers }: Program): Map<string, Buffer[]> {
  const parts = new Map<string, Buffer[]>();
  for (const b of buffers) if (b.part) parts.set(b.part.of, [...(parts.get(b.part.of) ?? []), b]);
  for (const list of parts.values()) list.sort((a, b) => (a.part?.at ?? 0) - (b.part?.at ?? 0));
  return parts;
}

/** Returns whether parts in their order leave no element of a buffer out. */
function isCovered(of: Buffer | undefined, parts: readonly Buffer[]): boolean {
  let end = 0;
  for (const { part, shape } of parts) if (part && part.at <= end) end = Math.max(end, part.at + elementsOf(shape));
  return of !== undefined && end >= elementsOf(of.shape);
}

/** Throws an invariant unless every microbatch runs every block of every chunk once, in order, and activation copies suffice. */
function verifyOrder({ stage, chunks, order }: Program, mesh: Mesh): void {
  const who = ranksOf(stage, mesh);
  const split = chunks.some((c) => c.weights.length > 0) || order.some(({ kind }) => kind === "weights");
  const kinds = microbatchBlocks.filter((kind) => kind !== "weights" || split);
  /** Per chunk, the microbatches that have run each kind of block. */
  const progress = chunks.map(({ copies }) => ({ copies, done: { forward: 0, backward: 0, weights: 0 } }));
  const before = { forward: undefined, backward: "forward", weights: "backward" } as const;
  const last = split ? "weights" : "backward";
  const broken = (what: string) => new BrokenInvariant(`${who}: ${what}`);
  for (const run of order) {
    const { kind, microbatch, chunk } = run;
    const own = progress[chunk];
    if (!own) throw broken(`${blockTag(run, 2)} names chunk ${chunk} of ${chunks.length} chunks`);
    const { done, copies } = own;
    const tag = (): string => blockTag(run, chunks.length);
    if (microbatch !== done[kind]) throw broken(`${tag()} is out of order: microbatch ${done[kind]} is next`);
    const earlier = before[kind];
    if (earlier && microbatch >= done[earlier]) throw broken(`${tag()} comes before the ${earlier} of its microbatch`);
    done[kind]++;
    const inFlight = done.forward - done[last];
    if (inFlight > copies) throw broken(`at ${tag()} ${inFlight} microbatches are in flight in ${copies} copies`);
  }
  const all = progress[0]?.done.forward ?? 0;
  for (const kind of kinds)
    for (const [chunk, { done }] of progress.entries())
      if (done[kind] !== all) throw broken(`${done[kind]} of ${all} microbatches are done ${kind} in chunk ${chunk}`);
}

/** Throws an invariant if a collective does not fit its buffers. Sizes are known at compile time, so no rank waits for its host. */
function verifyCollectives(p: Program, mesh: Mesh): void {
  const who = ranksOf(p.stage, mesh);
  const buffers = new BufferTable(p.buffers);
  const buffer = (id: string) => buffers.get(id);
  const microbatches = microbatchesIn(p);
  for (const i of instructionsOf(p)) {
    if (i.kind === "send")
      invariant(
        (i.in_flight ?? 1) <= microbatches,
        () => `${who}: ${i.id} has ${i.in_flight} messages in flight of ${microbatches} microbatches`,
      );
    if (i.kind !== "collective") continue;
    invariant(
      new Set(i.subAxes).size === i.subAxes.length && i.subAxes.every((f) => f < mesh.subAxes.length),
      () => `${who}: ${i.id} runs over unknown or repeated sub-axes ${i.subAxes}`,
    );
    invariant(
      i.world || isDisjointSubAxes(mesh, i.subAxes),
      () => `${who}: ${i.id} runs over sub-axes ${i.subAxes} of grids that do not nest`,
    );
    invariant(
      sizesAgree(i, mesh, buffer),
      () => `${who}: ${i.id}: ${i.how} of [${buffer(i.from).shape}] cannot give [${buffer(i.to).shape}]`,
    );
    for (const { from, to } of pairsOf(i))
      invariant(
        buffer(from).dtype === buffer(to).dtype && buffer(from).dtype === buffer(i.from).dtype,
        () => `${who}: ${i.id}: source is ${buffer(from).dtype}, destination is ${buffer(to).dtype}`,
      );
  }
}

/** A send or a receive of a stage. */
interface WaitingTransfer extends Pick<Transfer, "kind" | "id" | "peer" | "tag" | "bytes"> {
  /** The queue of messages from the sender to the receiver through the channel. */
  readonly queue: string;
  /** Of a send: the name that counts messages in flight, and their largest number. */
  readonly name: string;
  readonly most: number;
}
/** A collective of all ranks. */
interface WaitingCollective {
  readonly kind: "world";
  readonly id: string;
  readonly what: string;
}
/** An instruction at which a stage may wait for another, in a block run. */
interface Wait<I = WaitingTransfer | WaitingCollective> {
  readonly of: I;
  /** The block run, and the part of the step that messages belong to. */
  readonly at: string;
  readonly part: string;
}
const isTransfer = (w: Wait): w is Wait<WaitingTransfer> => w.of.kind !== "world";
const messageText = ({ of, part }: Wait<WaitingTransfer>): string => `${of.tag} of ${part}`;

/** Simulates transfers and collectives of all ranks. Throws an invariant on a deadlock, a mismatch or an unreceived message. */
function verifyWaits(all: readonly (readonly Wait[])[], mesh: Mesh): void {
  const stages = all.map((waits, stage) => ({ stage, waits, at: 0 }));
  const queues = new Map<string, Wait<WaitingTransfer>[]>();
  /** Messages in flight, by sender and name. */
  const inFlight = new Map<string, number>();
  const name = (s: number, w: Wait): string => `${ranksOf(s, mesh)} at ${w.of.id}, ${w.at}`;
  const head = ({ waits, at }: (typeof stages)[number]): Wait | undefined => waits[at];

  for (let progress = true; progress; ) {
    progress = false;
    for (const own of stages) {
      const s = own.stage;
      for (let w = head(own); w && isTransfer(w); w = head(own)) {
        const { of } = w;
        if (of.peer === s || of.peer >= all.length) invariant(false, `${name(s, w)} names stage ${of.peer} as its peer`);
        const queue = queues.get(of.queue) ?? [];
        if (of.kind === "send") {
          const sent = inFlight.get(of.name) ?? 0;
          if (sent >= of.most) break;
          inFlight.set(of.name, sent + 1);
          queue.push(w);
          queues.set(of.queue, queue);
        } else {
          const sent = queue.shift();
          if (!sent) break;
          if (sent.of.tag !== of.tag || sent.part !== w.part)
            invariant(false, `${name(s, w)} waits for ${messageText(w)}, and ${name(of.peer, sent)} sends ${messageText(sent)}`);
          if (sent.of.bytes !== of.bytes)
            invariant(false, `${name(s, w)} takes ${of.bytes} bytes, and ${name(of.peer, sent)} sends ${sent.of.bytes}`);
          inFlight.set(sent.of.name, (inFlight.get(sent.of.name) ?? 0) - 1);
        }
        own.at++;
        progress = true;
      }
    }
    const heads = stages.flatMap((own) => {
      const wait = head(own);
      return wait?.of.kind === "world" ? [{ stage: own.stage, wait, what: wait.of.what }] : [];
    });
    const [first] = heads;
    if (first && heads.length === stages.length) {
      for (const { stage, wait, what } of heads)
        invariant(
          what === first.what,
          () => `${name(stage, wait)} and ${name(first.stage, first.wait)} run different collectives of all ranks`,
        );
      for (const own of stages) own.at++;
      progress = true;
    }
  }
  const stuck = stages.flatMap((own) => {
    const wait = head(own);
    return wait ? [`${name(own.stage, wait)}${peerText(wait)}`] : [];
  });
  invariant(stuck.length === 0, () => `these would wait for ever: ${stuck.join("; ")}`);
  const [left] = [...queues.values()].flat();
  invariant(!left, () => `sent and never received: ${left?.of.id}, ${left?.at}`);
}
const peerText = ({ of }: Wait): string =>
  of.kind === "world" ? ", for all other stages" : of.kind === "send" ? `, for room at stage ${of.peer}` : `, for stage ${of.peer}`;

/** Returns the instructions of a step at which a stage may wait, in order. */
const waitsOf = (p: Program, stage: number): Wait[] =>
  waitsIn(
    p,
    stage,
    groupsOf(p.order).flatMap((group) => turnsOf(p, group)),
    p.step,
  );

/** The same of an evaluation. */
function evaluationWaits(p: Program, stage: number): Wait[] {
  const { evaluation } = p;
  invariant(evaluation?.chunks.length === p.chunks.length, () => `stage ${p.stage} has ${evaluation?.chunks.length} evaluation blocks`);
  const turns = evaluationOrder(p).map((run) => ({ run, instructions: evaluation.chunks[run.chunk] ?? [] }));
  return waitsIn(p, stage, turns, evaluation.step);
}

function waitsIn({ chunks }: Program, stage: number, turns: readonly Turn[], last: readonly Instruction[]): Wait[] {
  // cached per list: it runs for every microbatch, and few of its instructions wait
  const known = new Map<readonly Instruction[], readonly Wait["of"][]>();
  const waiting = (block: readonly Instruction[]): readonly Wait["of"][] => {
    const found = known.get(block) ?? block.flatMap((i) => waitingAt(i, stage) ?? []);
    known.set(block, found);
    return found;
  };
  const waits: Wait[] = [];
  for (const { run, instructions } of turns) {
    const block = waiting(instructions);
    if (block.length === 0) continue;
    const [at, part] = [blockTag(run, chunks.length), `microbatch ${run.microbatch}`];
    for (const of of block) waits.push({ of, at, part });
  }
  for (const of of waiting(last)) waits.push({ of, at: "the step block", part: "the step" });
  return waits;
}

/** Returns what a stage waits for at an instruction; undefined if it does not wait. */
function waitingAt(i: Instruction, stage: number): Wait["of"] | undefined {
  if (i.kind === "collective") return i.world ? { kind: "world", id: i.id, what: `${i.how} ${i.id}` } : undefined;
  if (i.kind === "compute") return undefined;
  const { kind, id, peer, channel, tag, bytes, in_flight: most = 1 } = i;
  const [from, to] = kind === "send" ? [stage, peer] : [peer, stage];
  return { kind, id, peer, tag, bytes, most, queue: `${from}>${to} ${channel}`, name: `${from} ${to} ${id}` };
}
