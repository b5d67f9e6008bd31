/**
 * Laws of asynchronous collectives. Between its begin and the instruction that waits for it, nothing writes what a collective reads and
 * nothing touches what it writes, so its duration changes no value. A stream has communicators of its own and runs its collectives in the
 * order of the plan. Ranks of a stage run one program, so all members of a group issue the collectives of a communicator in one order;
 * collectives of all ranks, whose stages run different programs, are never asynchronous. The streams that may run at the same time are
 * declared, because their communicators need room on the device together.
 */
import { readsOf, touchedBy, writesOf } from "../../schemas/effects.ts";
import type { BlockRun, Collective, Instruction, Program, StreamName, StreamUse } from "../../schemas/plan.ts";
import { blockTag, evaluationOrder, groupsOf, instructionsOf, runsIn, type Turn, turnsOf } from "../../schemas/program.ts";
import { endedBy } from "../analysis/asyncTouches.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { invariant } from "../ops/op.ts";

type Beside = StreamUse["beside"][number];

/** Throws an invariant if a program breaks a law of asynchronous collectives. `who` names its ranks in messages. */
export function verifyStreams(p: Program, who: string): void {
  const found = concurrencyOf(p, who);
  const declared = new Map((p.streams ?? []).map(({ name, beside }) => [name, beside]));
  invariant(declared.size === (p.streams ?? []).length, () => `${who}: a stream is declared twice`);
  for (const [name, beside] of found) {
    const listed = declared.get(name);
    invariant(listed !== undefined, () => `${who}: the stream ${name} is not declared`);
    for (const other of beside)
      invariant(
        listed.includes(other),
        () => `${who}: collectives of ${name} and ${other} may run at once, and the plan does not declare it`,
      );
  }
}

/** Throws an invariant if stages give a stream different limits: its communicators have one on all their ranks. */
export function verifyLimits(programs: readonly Program[]): void {
  const limits = new Map<StreamName, number | undefined>();
  for (const { stage, streams = [] } of programs)
    for (const { name, multiprocessors } of streams) {
      const limit = limits.has(name) ? limits.get(name) : multiprocessors;
      limits.set(name, limit);
      invariant(
        limit === multiprocessors,
        () =>
          `stage ${stage}: ${name} occupies ${multiprocessors ?? "any number of"} multiprocessors, and ${limit ?? "any number"} on another stage`,
      );
    }
}

/** Returns the streams of a program with what may run beside them, as a plan declares it; undefined if nothing is asynchronous. */
export function streamsOf(p: Program): StreamUse[] | undefined {
  const found = concurrencyOf(p, `stage ${p.stage}`);
  if (found.size === 0) return undefined;
  return [...found].map(([name, beside]) => ({ name, beside: [...beside].sort() })).sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** Runs the blocks of a step and of an evaluation. Returns per stream the streams beside it. */
function concurrencyOf(p: Program, who: string): Map<StreamName, Set<Beside>> {
  const found = new Map<StreamName, Set<Beside>>();
  if (!instructionsOf(p).some((i) => i.waits || (i.kind === "collective" && i.stream))) return found;
  const last = p.order.filter(({ kind }) => kind === "forward").length / p.chunks.length - 1;
  const step = new Walk(p, who, found);
  const placed = ({ run, instructions }: Turn): PlacedTurn => ({
    ...{ instructions, at: nameOf(run, p), copy: run.microbatch % (p.chunks[run.chunk]?.copies ?? 1) },
    ...{ first: run.microbatch === 0, last: run.microbatch === last },
  });
  for (const group of groupsOf(p.order)) step.run(turnsOf(p, group).map(placed));
  step.end(p.step, "the step block");
  const { evaluation } = p;
  if (!evaluation) return found;
  const evaluated = new Walk(p, who, found);
  for (const run of evaluationOrder(p))
    evaluated.run([
      {
        ...{ instructions: evaluation.chunks[run.chunk] ?? [], at: `evaluation ${run.microbatch}`, copy: 0 },
        ...{ first: run.microbatch === 0, last: false },
      },
    ]);
  evaluated.end(evaluation.step, "the end of an evaluation");
  return found;
}
const nameOf = (run: BlockRun, { chunks }: Program): string => blockTag(run, chunks.length);

/** Instructions of a block run: its name, its activation copy, and whether it is of the first or the last microbatch. */
interface PlacedTurn extends Pick<Turn, "instructions"> {
  readonly at: string;
  readonly copy: number;
  readonly first: boolean;
  readonly last: boolean;
}
/** The asynchronous collectives that are open while the blocks of a program run. */
class Walk {
  readonly #buffers: BufferTable;
  readonly #who: string;
  readonly #beside: Map<StreamName, Set<Beside>>;
  /** In the order of their begin. */
  readonly #open = new Map<string, Collective>();
  /** The activation copies that those in `open` work on. */
  readonly #copies = new Map<string, number>();
  /** The ids of all that have begun. */
  readonly #begun = new Set<string>();
  /** Blocks, and pairs by their first instructions, that begin and end without an open collective: they run for every microbatch. */
  readonly #known = new Set<readonly Instruction[]>();

  constructor(p: Program, who: string, beside: Map<StreamName, Set<Beside>>) {
    this.#buffers = new BufferTable(p.buffers);
    this.#who = who;
    this.#beside = beside;
  }

  /** Runs the last block, with which all collectives end. */
  end(instructions: readonly Instruction[], at: string): void {
    for (const i of instructions) this.#run(i, at, 0);
  }

  /** Runs a block, or the turns of a pair. */
  run(turns: readonly PlacedTurn[]): void {
    const [key] = turns.map(({ instructions }) => instructions);
    const isClosed = this.#open.size === 0 && !turns.some(({ first, last }) => first || last);
    if (!key || (isClosed && this.#known.has(key))) return;
    for (const { instructions, at, copy, first, last } of turns)
      for (const i of instructions) if (runsIn(i, { first, last, logged: true })) this.#run(i, at, copy);
    if (isClosed && this.#open.size === 0) this.#known.add(key);
    const names = [...new Set(turns.map(({ at }) => at))].join(" with ");
    for (const i of this.#open.values())
      for (const id of touchedBy(i, this.#buffers))
        invariant(
          isLasting.has(this.#buffers.get(id).kind),
          () => `${this.#who}: ${i.id} may run after ${names}, and ${id} is gone then: nothing waits for it`,
        );
  }

  #run(i: Instruction, at: string, copy: number): void {
    const who = (): string => `${this.#who} at ${i.id}, ${at}`;
    for (const id of i.waits ?? []) {
      const open = this.#open.get(id);
      // a collective that a later one of its stream was waited for has ended
      if (open) endedBy(this.#open, id);
      else invariant(this.#begun.has(id), () => `${who()} waits for ${id}, which has not begun`);
    }
    const stream = i.kind === "collective" ? i.stream : undefined;
    for (const other of this.#open.values()) if (other.stream !== stream) this.#expectApart(i, copy, other, who);
    if (i.kind === "compute") return;
    const beside = new Set([...this.#open.values()].flatMap((o) => (o.stream && o.stream !== stream ? [o.stream] : [])));
    for (const other of beside) {
      this.#note(other, stream ?? "in_order");
      if (stream) this.#note(stream, other);
    }
    if (i.kind !== "collective" || stream === undefined) return;
    invariant(!i.world, () => `${who()}: a collective of all ranks runs on the stream ${stream}; its stages run different programs`);
    invariant(!this.#open.has(i.id), () => `${who()} begins again before anything has waited for it`);
    if (!this.#beside.has(stream)) this.#beside.set(stream, new Set());
    this.#open.set(i.id, i);
    this.#copies.set(i.id, copy);
    this.#begun.add(i.id);
  }

  #note(stream: StreamName, beside: Beside): void {
    this.#beside.set(stream, (this.#beside.get(stream) ?? new Set()).add(beside));
  }

  /**
   * Throws an invariant if an instruction and an open collective of another stream touch a buffer that one of them writes. Activations of
   * different copies are different memory.
   */
  #expectApart(i: Instruction, copy: number, open: Collective, who: () => string): void {
    const isOtherCopy = copy !== this.#copies.get(open.id);
    const isApart = (id: string): boolean => isOtherCopy && this.#buffers.get(id).kind === "activation";
    const written = writesOf(open, this.#buffers);
    const touched = [...touchedBy(open, this.#buffers)];
    const isIn = (ids: readonly string[], id: string): boolean => !isApart(id) && ids.some((other) => this.#buffers.overlap(id, other));
    const clash = [
      ...[...touchedBy(i, this.#buffers), ...readsOf(i)].filter((id) => isIn(written, id)),
      ...writesOf(i, this.#buffers).filter((id) => isIn(touched, id)),
    ][0];
    invariant(
      clash === undefined,
      () => `${who()} touches ${clash} while ${open.id} on the stream ${open.stream} may run: it must wait for it`,
    );
  }
}
const isLasting: ReadonlySet<string> = new Set(["parameter", "gradient", "optimizer"]);
