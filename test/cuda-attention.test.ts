/**
 * CUDA's attention and its gradient equal their reference: in bf16 on the tensor cores and in f32, whatever the head's size, the
 * number of query heads that share keys, and the piece of the sequence that is here. The sources run as C++ on the CPU.
 */
import { describe, expect, test } from "vitest";
import type { Dtype, Launch } from "../schemas/plan.ts";
import { attention as makers } from "../src/kernels/cuda/attention.ts";
import type { Use } from "../src/kernels/kernel.ts";
import { attention, attentionGrad } from "../src/ops/attention.ts";
import { type AnyOp, slotSize } from "../src/ops/op.ts";
import type { Arch } from "../src/target.ts";
import { type Buffers, type ContractCase, hold, rounded } from "./contract.ts";
import { cudaEmulator, emulatorMissing } from "./cudaEmulator.ts";
import { random } from "./opCases.ts";

type Sizes = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C", number>>;
interface Shape extends Sizes {
  readonly start: number;
  readonly arch: Arch;
  readonly type: "bf16" | "f32";
}
const shapes: readonly Shape[] = [
  // one block, blocks cut short on both sides, and a head of each kind
  { B: 1, S: 5, U: 5, G: 1, M: 1, C: 16, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 130, U: 260, G: 1, M: 2, C: 128, start: 129, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 130, U: 130, G: 1, M: 1, C: 128, start: 0, arch: "sm_80", type: "bf16" },
  { B: 2, S: 131, U: 131, G: 2, M: 2, C: 64, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 70, U: 290, G: 1, M: 8, C: 32, start: 191, arch: "sm_90a", type: "bf16" },
  // pieces that see few of the keys, and keys that nobody sees
  { B: 1, S: 33, U: 300, G: 2, M: 4, C: 48, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 65, U: 513, G: 1, M: 1, C: 80, start: 129, arch: "sm_80", type: "bf16" },
  { B: 1, S: 129, U: 129, G: 3, M: 1, C: 96, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 2, C: 112, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 193, U: 193, G: 2, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16" },
  // so many heads that a head's keys are taken in two waves
  { B: 15, S: 2, U: 300, G: 4, M: 1, C: 16, start: 298, arch: "sm_80", type: "bf16" },
  // f32 arithmetic: f32, and heads that the tensor cores do not take
  { B: 2, S: 67, U: 140, G: 2, M: 2, C: 24, start: 70, arch: "sm_90a", type: "f32" },
  { B: 1, S: 129, U: 129, G: 1, M: 4, C: 128, start: 0, arch: "sm_80", type: "f32" },
  { B: 1, S: 30, U: 150, G: 1, M: 2, C: 7, start: 3, arch: "sm_90a", type: "f32" },
  { B: 1, S: 66, U: 66, G: 2, M: 1, C: 160, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 2, C: 20, start: 0, arch: "sm_90a", type: "bf16" },
];

const titleOf = ({ arch, type, B, S, U, G, M, C, start }: Shape): string =>
  `${type} for ${arch}, ${B} sequences, ${S} queries from ${start}, ${U} keys, ${G}·${M} heads of ${C}`;

/** A case per op: the gradient's inputs are what the forward op makes. Scores are of the size that normalised layers leave. */
function casesOf(shape: Shape, seed: number): ContractCase[] {
  const next = random(seed);
  const { type, start, B, S, U, G, M, C } = shape;
  const d = { B, S, U, G, M, C };
  const place = { start: (dim: string) => (dim === "S" ? start : 0), rows: new Int32Array(1) };
  const known: Record<string, Float32Array> = {};
  return [attention, attentionGrad].map((op: AnyOp) => {
    const operands = [...op.inputs, ...op.outputs];
    const size = Object.fromEntries(operands.map((o) => [o.name, o.slots.reduce((n, s) => n * slotSize(s, d), 1)]));
    const dtype: Record<string, Dtype> = Object.fromEntries(operands.map((o) => [o.name, o.name === "lse" ? "f32" : type]));
    for (const { name } of op.inputs)
      known[name] ??= rounded(
        new Float32Array(size[name]!).map(() => 2 * next()),
        type,
      );
    const made: Record<string, Float32Array> = Object.fromEntries(op.outputs.map((o) => [o.name, new Float32Array(size[o.name]!)]));
    op.cpu({ ...known, ...made }, d, place);
    const data: Buffers = { ...Object.fromEntries(op.inputs.map((o) => [o.name, known[o.name]!])), ...made };
    const want = Object.fromEntries(Object.entries(made).map(([n, x]) => [n, x.slice()]));
    for (const o of op.outputs) known[o.name] = rounded(made[o.name]!, dtype[o.name]!);
    const use: Use = {
      ...{ op: op.name, name: `${op.name}_${seed}`, d, size, dtype },
      ...{ keeps: new Set<string>(), bound: 0, makesRows: false, mayOverflow: false },
    };
    return { title: titleOf(shape), use, data, starts: { S: start }, want };
  });
}

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  const kernels = shapes.map((shape, i) =>
    casesOf(shape, i + 1).map((c) => ({ ...c, made: makers[c.use.op as keyof typeof makers](c.use, shape.arch) })),
  );
  const executor = cudaEmulator(kernels.flat());
  for (const [i, [forward, backward]] of kernels.entries())
    test(titleOf(shapes[i]!), { timeout: 240_000 }, async () => {
      await hold(executor, forward!.made, forward!);
      await hold(executor, backward!.made, backward!);
    });
  const byChance = cudaEmulator(kernels.flat(), [2, 3, 4, 5]);
  for (const i of [1, 9])
    test(`in any order; one thread block that does all tiles after each other: ${titleOf(shapes[i]!)}`, { timeout: 240_000 }, async () => {
      const [forward, backward] = kernels[i]!;
      await hold(byChance, backward!.made, backward!);
      const launches = forward!.made.launches.map((l): Launch => ({ ...l, grid: [1, 1, 1] }));
      for (const e of [executor, byChance]) await hold(e, { ...forward!.made, launches }, forward!);
    });
});

test("one attention's gradient needs f32 sums of the queries' gradients, and a few numbers for each row", () => {
  const [, c] = casesOf({ ...shapes[3]!, type: "bf16" }, 1);
  const made = makers.attention_grad(c!.use, "sm_90a");
  const { B, S, G, M, C } = shapes[3]!;
  const rows = B * G * M * Math.ceil(S / 64) * 64;
  expect(made.scratch! - rows * (4 * C + 8)).toBeLessThan(4 * rows);
});
