/**
 * Steps that change no weights because a metric is not finite: which metric, the error that ends the run, and the instruction that
 * produced the value. The device skips such a step (src/ops/optimizer.ts); the host detects it from the metrics.
 */

import { dtypes } from "../../schemas/dtypes.ts";
import { transportOps } from "../../schemas/effects.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { Buffer, Compute, Instruction } from "../../schemas/plan.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { BlockPosition, HostData, RankDevice } from "../backend.ts";

/** A non-finite metric of a step. */
export interface Nonfinite {
  readonly metric: keyof typeof names;
  readonly value: number;
  /** With `debugNonfinite`: the description of its origin. */
  readonly origin?: string;
}

/** Names of the metrics in messages. The first non-finite one in this order is reported. */
const names = { loss: "loss", aux_loss: "auxiliary loss", z_loss: "z loss", mtp_loss: "mtp loss", grad_norm: "gradient norm" };

/** Returns the first non-finite metric. Losses come first, because a non-finite loss makes the gradient norm non-finite. */
export function nonfiniteIn(numbers: { readonly [K in keyof typeof names]?: number | undefined }): Nonfinite | undefined {
  for (const metric of Object.keys(names) as (keyof typeof names)[]) {
    const value = numbers[metric];
    if (value !== undefined && !Number.isFinite(value)) return { metric, value };
  }
  return undefined;
}
/** Returns `loss NaN`, followed by the origin if there is one. */
export const nonfiniteText = ({ metric, value, origin }: Nonfinite): string =>
  `${names[metric]} ${value}${origin === undefined ? "" : `; ${origin}`}`;

/** Ends a run after a step that changed no weights. All processes throw it after the same step, with no work in flight. */
export class StepFault extends Trouble {
  constructor(
    message: string,
    fix: string,
    /** With `debugNonfinite`: the origin, if this process located it. */
    readonly origin?: string,
  ) {
    super(origin === undefined ? message : `${message}\n  ${origin}`, fix);
  }
}

/** Returns the error for train.on_nonfinite: stop. */
export function stopAt(step: number, found: Nonfinite): StepFault {
  const { metric, value, origin } = found;
  const debug = origin === undefined ? "; --debug-nonfinite names the instruction" : "";
  return new StepFault(
    `step ${step}: the ${names[metric]} is ${value}; the step changed no weights, and the run ends`,
    `lower train.optimizer.lr or train.init.std, or clip gradients; train.on_nonfinite: skip continues without such steps${debug}`,
    origin,
  );
}

/** In fp16: a run ends after this number of consecutive overflows at the smallest loss scale. Skipped steps keep the weights, so overflows repeat. */
export const MOST_OVERFLOWS = 4;
/** Returns the error for repeated overflows at the smallest loss scale. */
export const stopAtScale = (step: number, scale: number): StepFault =>
  new StepFault(
    `step ${step}: gradients overflowed in ${MOST_OVERFLOWS} steps in a row at the loss scale ${scale}, the smallest that train.loss_scale allows; no weights changed in them`,
    "lower train.loss_scale (or its min), train.init.std or train.optimizer.lr, or train in bf16",
  );

/** Inspects a repeated step, instruction by instruction. */
export interface Inspector {
  /** Starts to read the outputs of an instruction; the caller waits for `settled` before it issues another. */
  after(rank: number, i: Instruction, at: BlockPosition): void;
  settled(): Promise<void>;
  /** Returns the origin; undefined if no instruction of this process produced a non-finite value. */
  origin(): string | undefined;
}

/** Outputs that may be infinite: the log-sum-exp of a query without visible keys in a block. */
const mayBeInfinite = new Set(["lse", "la", "lb"]);
/** Ops around a collective only copy values, and their buffers may have unused rows. */
const copies: ReadonlySet<OpName> = new Set(transportOps);

/** Returns an inspector. `bufferOf` returns a buffer of a rank by id. */
export function inspector(bufferOf: (rank: number, id: string) => Buffer, backend: (rank: number) => RankDevice): Inspector {
  let pending = Promise.resolve();
  let made: string | undefined;
  let passed: string | undefined;
  /** Buffers that already had a non-finite value, by rank and id: an op that accumulates into one did not produce it. */
  const held = new Map<string, number>();

  /** Returns the first non-finite value of a buffer; of ragged buffers only existing rows are read. */
  async function badIn(rank: number, id: string, copy: number): Promise<number | undefined> {
    const b = bufferOf(rank, id);
    if (dtypes[b.dtype].kind === "integer") return undefined;
    const index = b.rows === undefined ? undefined : await backend(rank).read(bufferOf(rank, b.rows), copy);
    const data: HostData = await backend(rank).read(b, copy);
    const used = index ? (data.length / b.shape[0]!) * index[0]! : data.length;
    return data.subarray(0, used).find((x) => !Number.isFinite(x));
  }
  async function inspect(rank: number, i: Compute, at: BlockPosition): Promise<void> {
    for (const one of membersOf(i)) await inspectTensor(rank, one, at);
  }
  async function inspectTensor(rank: number, i: Compute, { tag, copy }: BlockPosition): Promise<void> {
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
