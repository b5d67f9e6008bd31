/**
 * The walk of one rank through a step: forward and backward of every microbatch in the plan's order, then the step block. Walks are
 * coroutines that synchronize at collectives and transfers.
 */
import { readsOf } from "../../schemas/effects.ts";
import type { BlockRun, Buffer, BufferKind, Compute, HostInput, Instruction } from "../../schemas/plan.ts";
import { blockOf, blockTag, evaluationOrder, runsIn, turnsOf } from "../../schemas/program.ts";
import type { BlockPosition, Comm, HostData, RankDevice } from "../backend.ts";
import type { StageProgram } from "../rankPrograms.ts";
import type { Inspector } from "./nonfinite.ts";

/** One step of one rank. */
export interface StepWalk {
  readonly rank: number;
  readonly stage: StageProgram;
  readonly device: RankDevice;
  readonly comm: Comm;
  readonly microbatches: number;
  /** Returns the rank's shard of an input in a microbatch. */
  readonly feed: (b: Buffer, input: HostInput, microbatch: number) => HostData;
  /** Whether instructions of logged steps run. */
  readonly logged?: boolean;
  /** The device replays the step as a graph: only inputs are written. */
  readonly replayed: boolean;
  /** Called after each op is issued. */
  readonly onCompute: (i: Compute, at: BlockPosition) => void;
  readonly inspector?: Inspector | undefined;
}

/** Executes one step of a rank. Yields a description of the operation that it waits for. */
export function* walkStep(walk: StepWalk): Generator<string> {
  const { stage, device } = walk;
  device.zeroGradients();
  fill(walk, stage.program.step, ["optimizer"], 0, 0);
  for (const runs of stage.order(walk.microbatches)) {
    for (const run of runs) {
      const { kind, microbatch } = run;
      // fill workspace inputs for each block; activation inputs persist from the forward block
      const kinds = kind === "forward" ? (["workspace", "activation"] as const) : (["workspace"] as const);
      fill(walk, blockOf(stage.program, run), kinds, positionOf(stage, run).copy, microbatch);
    }
    if (walk.replayed) continue;
    for (const { run, instructions } of turnsOf(stage.program, runs)) yield* block(walk, instructions, positionOf(stage, run));
  }
  yield* block(walk, stage.program.step, { tag: "step", microbatch: -1, copy: 0 });
  yield* end(walk);
}

/** Returns the position of a rank in a block run. */
function positionOf({ program }: StageProgram, run: BlockRun): BlockPosition {
  const copies = program.chunks[run.chunk]?.copies ?? 1;
  return { tag: blockTag(run, program.chunks.length), microbatch: run.microbatch, copy: run.microbatch % copies };
}

/** Waits for all asynchronous collectives: the state between two steps is complete. */
function* end({ comm, rank, replayed }: StepWalk): Generator<string> {
  while (!replayed && !comm.wait(rank)) yield "asynchronous collectives, the end of the step";
}

/** Executes one batch of an evaluation of a rank. Throws if the plan has no evaluation. */
export function* walkEvaluation(walk: StepWalk): Generator<string> {
  const { stage, device } = walk;
  const { evaluation } = stage.program;
  if (!evaluation) throw new Error("rankc: the plan has no evaluation");
  device.zeroGradients();
  for (const { microbatch, chunk } of evaluationOrder(stage.program)) {
    const instructions = evaluation.chunks[chunk] ?? [];
    fill(walk, instructions, ["workspace", "activation"], 0, microbatch);
    yield* block(walk, instructions, { tag: `evaluation ${microbatch}`, microbatch, copy: 0 });
  }
  yield* block(walk, evaluation.step, { tag: "the end of an evaluation", microbatch: -1, copy: 0 });
  yield* end(walk);
}

function* block(walk: StepWalk, instructions: readonly Instruction[], at: BlockPosition): Generator<string> {
  const { rank, device, comm, inspector } = walk;
  if (walk.replayed) return;
  for (const i of instructions) {
    if (!runsIn(i, { first: at.microbatch === 0, last: at.microbatch === walk.microbatches - 1, logged: walk.logged })) continue;
    for (const id of i.waits ?? []) while (!comm.wait(rank, id)) yield `${i.id}, for ${id}, ${at.tag}`;
    if (i.kind === "compute") {
      device.compute(i, at.copy, at.microbatch === 0);
      walk.onCompute(i, at);
    } else if (i.kind === "collective") while (!comm.collective(rank, i, at)) yield `${i.id} (${i.name} over ${i.axes}), ${at.tag}`;
    else if (i.kind === "send") comm.send(rank, i, at);
    else while (!comm.recv(rank, i, at)) yield `${i.id} from stage ${i.peer}, ${at.tag}`;
    if (!inspector) continue;
    inspector.after(rank, i, at);
    yield `${i.id} is inspected, ${at.tag}`;
  }
}

/** Writes the inputs that a block reads. Other inputs are skipped, because their memory may be in use by another buffer. */
function fill(
  { stage, device, feed }: StepWalk,
  block: readonly Instruction[],
  kinds: readonly BufferKind[],
  copy: number,
  microbatch: number,
): void {
  const read = inputsReadBy(block);
  for (const input of stage.program.inputs) {
    const b = stage.buffer(input.buffer);
    if (read.has(b.id) && kinds.includes(b.kind)) device.write(b, copy, feed(b, input, microbatch));
  }
}

/** Cache of the buffers that a block reads; a block runs for every microbatch. */
const known = new WeakMap<readonly Instruction[], ReadonlySet<string>>();
function inputsReadBy(block: readonly Instruction[]): ReadonlySet<string> {
  const found = known.get(block) ?? new Set(block.flatMap(readsOf));
  known.set(block, found);
  return found;
}

/**
 * Runs the walks round-robin until all are done, and awaits `settled` after each resumption. Throws if no walk can proceed: the plan has a
 * deadlock; the message lists the operation that each rank waits for.
 */
export async function runTogether(walks: ReadonlyMap<number, Generator<string>>, settled?: () => Promise<void>): Promise<void> {
  const left = new Map(walks);
  const waits = new Map<number, string>();
  while (left.size > 0) {
    let moved = false;
    for (const [rank, walk] of left) {
      const next = walk.next();
      if (settled) await settled();
      if (next.done || next.value !== waits.get(rank)) moved = true;
      if (next.done) left.delete(rank);
      else waits.set(rank, next.value);
    }
    if (!moved) throw new Error(`rankc: deadlock: ${[...left.keys()].map((r) => `rank ${r} waits at ${waits.get(r)}`).join("; ")}`);
  }
}
