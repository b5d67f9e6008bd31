/**
 * Steps that change no weights since a number in them is not finite: which number it is, how a run ends by it, and which instruction
 * made it. The device skips such a step by itself (src/ops/optimizer.ts); here the host learns of it, with the step's metrics.
 */
import type { Buffer, Compute, Instruction } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import * as messages from "../../src/ops/transport.ts";
import type { BlockPosition, HostData, RankDevice } from "../backend.ts";

/** A number of a step that is not finite. */
export interface Nonfinite {
  readonly metric: keyof typeof names;
  readonly value: number;
  /** With `debugNonfinite`, what is known of its origin. */
  readonly origin?: string;
}

/** How the metrics of a step are called in messages, in the order in which the first that is not finite is named. */
const names = { loss: "loss", aux_loss: "auxiliary loss", z_loss: "z loss", mtp_loss: "mtp loss", grad_norm: "gradient norm" };

/** The first of a step's numbers that is not finite: a loss before the gradient norm, which a loss makes so too. */
export function nonfiniteIn(numbers: { readonly [K in keyof typeof names]?: number | undefined }): Nonfinite | undefined {
  for (const metric of Object.keys(names) as (keyof typeof names)[]) {
    const value = numbers[metric];
    if (value !== undefined && !Number.isFinite(value)) return { metric, value };
  }
  return undefined;
}
/** `loss NaN`, and its origin where that is known. */
export const nonfiniteText = ({ metric, value, origin }: Nonfinite): string =>
  `${names[metric]} ${value}${origin === undefined ? "" : `; ${origin}`}`;

/** What ends a run after a step that changed nothing. All processes of the run throw it after the same step, with nothing under way. */
export class StepFault extends Trouble {
  constructor(
    message: string,
    fix: string,
    /** With `debugNonfinite`: this process has found the origin. */
    readonly origin?: string,
  ) {
    super(origin === undefined ? message : `${message}\n  ${origin}`, fix);
  }
}

/** train.on_nonfinite is `stop`. */
export function stopAt(step: number, found: Nonfinite): StepFault {
  const { metric, value, origin } = found;
  const debug = origin === undefined ? "; --debug-nonfinite names the instruction" : "";
  return new StepFault(
    `step ${step}: the ${names[metric]} is ${value}; the step changed no weights, and the run ends`,
    `lower train.optimizer.lr or train.init_std, or clip gradients; train.on_nonfinite: skip trains on without such steps${debug}`,
    origin,
  );
}

/**
 * In fp16: overflows in a row, at a loss scale that cannot shrink, after which a run ends. A skipped step leaves the weights as they
 * are, so that the next one overflows for the same reason.
 */
export const MOST_OVERFLOWS = 4;
export const stopAtScale = (step: number, scale: number): StepFault =>
  new StepFault(
    `step ${step}: gradients overflowed in ${MOST_OVERFLOWS} steps in a row at the loss scale ${scale}, which is the least that train.loss_scale allows; no weights changed in them`,
    "lower train.loss_scale (or its min), train.init_std or train.optimizer.lr, or train in bf16",
  );

/** Observes a step that is run again, instruction by instruction. */
export interface Inspector {
  /** Begins to read what an instruction has written; nothing else may be issued before `settled`. */
  after(rank: number, i: Instruction, at: BlockPosition): void;
  settled(): Promise<void>;
  /** Undefined where no instruction of this process made a value that is not finite. */
  origin(): string | undefined;
}

/** Outputs that may be infinite: the log-sum-exp of a query that sees no key of a piece. */
const mayBeInfinite = new Set(["lse", "la", "lb"]);
/** Ops around a collective copy values, and their buffers have room that is not used. */
const copies = new Set(Object.values(messages).flatMap((o) => (typeof o === "object" ? o.name : [])));

/** `bufferOf`: of a rank, by id. */
export function inspector(bufferOf: (rank: number, id: string) => Buffer, backend: (rank: number) => RankDevice): Inspector {
  let pending = Promise.resolve();
  let made: string | undefined;
  let passed: string | undefined;
  /** Buffers that held such a value before, by rank: an op that adds to one did not make it. */
  const held = new Map<string, number>();

  /** The first value of a buffer that is not finite; of rows, of those that exist. */
  async function badIn(rank: number, id: string, copy: number): Promise<number | undefined> {
    const b = bufferOf(rank, id);
    if (b.dtype === "i32") return undefined;
    const index = b.rows === undefined ? undefined : await backend(rank).read(bufferOf(rank, b.rows), copy);
    const data: HostData = await backend(rank).read(b, copy);
    const used = index ? (data.length / b.shape[0]!) * index[0]! : data.length;
    return data.subarray(0, used).find((x) => !Number.isFinite(x));
  }
  async function inspect(rank: number, i: Compute, { tag, copy }: BlockPosition): Promise<void> {
    for (const [name, id] of Object.entries(i.writes)) {
      if (mayBeInfinite.has(name)) continue;
      const key = `${rank} ${id}`;
      const before = i.accumulates?.includes(name) ? held.get(key) : undefined;
      const value = await badIn(rank, id, copy);
      if (value === undefined) held.delete(key);
      else held.set(key, value);
      if (value === undefined || before !== undefined || made !== undefined) continue;
      const where = `${value} in ${id}, by ${i.id} (${i.op}) of rank ${rank}, ${tag}`;
      let source: string | undefined;
      for (const [operand, from] of Object.entries(i.reads))
        if (!mayBeInfinite.has(operand) && (await badIn(rank, from, copy)) !== undefined) source ??= from;
      if (source === undefined) made = `the first value that is not finite is ${where}, from operands that are`;
      else
        passed ??= `the first value that is not finite is ${where}, which read ${source}: that was not finite when the step began, or came from another rank`;
    }
  }
  return {
    after(rank, i, at) {
      if (made === undefined && i.kind === "compute" && !copies.has(i.op)) pending = inspect(rank, i, at);
    },
    settled: () => pending,
    origin: () => made ?? passed,
  };
}
