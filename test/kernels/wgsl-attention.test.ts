/**
 * Attention in WGSL beyond the contract's small sizes: wide heads, blocks of 64 queries, a piece of the sequence in its midst, and
 * pieces of the keys, in plain and in zigzag order, of which queries see all, some or none.
 */
import { expect, test } from "vitest";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { KernelSpec } from "../../src/codegen/kernelSpec.ts";
import { wgslGenerator } from "../../src/codegen/wgsl/index.ts";
import { ops } from "../../src/ops/index.ts";
import type { ContractCase } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { documentsOf, elements, random } from "../support/opCases.ts";
import { noAdapter } from "../support/softwareAdapter.ts";
import { byTier, isFull } from "../support/tiers.ts";
import { openWgslDevices } from "../support/wgslDevices.ts";

const { executor, checked } = await openWgslDevices({ checked: { features: ["shader-f16"] } });

type Sizes = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C" | "W", number>>;
type Dims = Sizes & Readonly<Record<"scale" | "chunk" | "ranks", number>> & { readonly drop?: number };

type AttentionName = `attention${"" | "_dropout"}${"" | "_documents"}${"" | "_part"}`;

function specFor(op: OpName, d: Dims, half: Dtype = "f32"): KernelSpec {
  const operands = [...ops[op].inputs, ...ops[op].outputs];
  const size = Object.fromEntries(operands.map((o) => [o.name, elements(o, d)]));
  const dtype = Object.fromEntries(
    operands.map((o) => [o.name, o.name === "lse" ? "f32" : ["sample", "documents"].includes(o.name) ? "i32" : half]),
  );
  return { op, name: `${op}_0`, d, size, dtype, accumulates: new Set(), bound: 0, makesRows: false, mayOverflow: false };
}

/** Both kernels on the same data: the gradient's own inputs are what the forward left of all keys, but for a piece's, which are any. */
function casesOf(op: AttentionName, d: Dims, starts: Readonly<Record<string, number>>): ContractCase[] {
  const next = random(d.C);
  const data: Record<string, Float32Array> = {};
  return [op, `${op}_grad` as const].map((op) => {
    const use = specFor(op, d);
    data.documents ??= documentsOf(d, (dim) => starts[dim] ?? 0, 30);
    data.sample ??= Float32Array.from({ length: d.B }, (_, i) => 70_000 + i);
    const outputs = ops[op].outputs.map((o) => o.name);
    if (op.endsWith("_part_grad")) data.lse = data.lse!.map((x) => (x === -Infinity ? 1 + next() : Math.max(x, next())));
    for (const [name, size] of Object.entries(use.size))
      data[name] ??= outputs.includes(name) ? new Float32Array(size) : new Float32Array(size).map(() => 2 * next());
    ops[op].cpu(data, { ...d, ...attributes }, { start: (dim) => starts[dim] ?? 0, rows: new Int32Array(1) });
    const gather = (names: readonly string[]) => Object.fromEntries(names.map((n) => [n, data[n]!.slice()]));
    return {
      title: `${op} ${JSON.stringify(d)}`,
      use,
      data: {
        ...gather(Object.keys(use.size)),
        ...Object.fromEntries(["sample", "documents"].filter((n) => use.dtype[n]).map((n) => [n, Int32Array.from(data[n]!)])),
      },
      starts: { ...starts, ...attributes },
      want: gather(outputs),
    };
  });
}

const attributes = { key0: 0x9abcdef0, key1: 0x12345678 };
const plain = { chunk: 0, ranks: 1 };
const small = { B: 2, G: 2, M: 2, C: 8, W: 6 };
const shapes: readonly (readonly [
  string,
  AttentionName,
  Sizes & { chunk: number; ranks: number; drop?: number },
  Record<string, number>,
])[] = [
  ["heads of 132, values of 70, queries 4 to 22 of 30", "attention", { B: 1, S: 19, U: 30, G: 1, M: 2, C: 132, W: 70, ...plain }, { S: 4 }],
  ["blocks of 64 queries, the last with 2", "attention", { B: 16, S: 66, U: 66, G: 4, M: 1, C: 4, W: 4, ...plain }, {}],
  ["one query, one key, one channel", "attention", { B: 1, S: 1, U: 1, G: 1, M: 1, C: 1, W: 1, ...plain }, {}],
  ["keys before all queries", "attention_part", { ...small, S: 19, U: 40, ...plain }, { S: 80, U: 40 }],
  ["keys across the diagonal", "attention_part", { ...small, S: 50, U: 40, ...plain }, { S: 20, U: 30 }],
  ["keys after all queries", "attention_part", { ...small, S: 50, U: 40, ...plain }, { S: 0, U: 50 }],
  ["zigzag, blocks of 6 of which a tile has many", "attention", { ...small, S: 12, U: 48, chunk: 6, ranks: 4 }, { S: 24 }],
  ["zigzag, queries and keys of several ranks", "attention", { ...small, S: 48, U: 96, chunk: 12, ranks: 4 }, { S: 48 }],
  ["zigzag, half a block of queries", "attention", { ...small, S: 32, U: 256, chunk: 64, ranks: 2 }, { S: 96 }],
  ["zigzag, a rank's own keys", "attention_part", { ...small, S: 64, U: 64, chunk: 32, ranks: 3 }, { S: 64, U: 64 }],
  ["zigzag, keys of a rank before", "attention_part", { ...small, S: 64, U: 64, chunk: 32, ranks: 3 }, { S: 128, U: 64 }],
  ["zigzag, keys of a rank after", "attention_part", { ...small, S: 64, U: 64, chunk: 32, ranks: 3 }, { S: 0, U: 128 }],
  [
    "zigzag, the first block of queries and the last of keys",
    "attention_part",
    { ...small, S: 24, U: 24, chunk: 24, ranks: 2 },
    { S: 0, U: 24 },
  ],
  ["zigzag, queries and keys of two ranks each", "attention_part", { ...small, S: 40, U: 40, chunk: 10, ranks: 4 }, { S: 40, U: 0 }],
  ["weights dropped", "attention_dropout", { ...small, S: 50, U: 90, ...plain, drop: 0.3 }, { S: 40, G: 4 }],
  [
    "weights dropped, keys across the diagonal",
    "attention_dropout_part",
    { ...small, S: 50, U: 40, ...plain, drop: 0.3 },
    { S: 20, U: 30 },
  ],
  ["weights dropped, zigzag", "attention_dropout", { ...small, S: 48, U: 96, chunk: 12, ranks: 4, drop: 0.2 }, { S: 48, G: 2 }],
  ["weights dropped, zigzag by 10", "attention_dropout_part", { ...small, S: 40, U: 40, chunk: 10, ranks: 4, drop: 0.2 }, { S: 40, U: 0 }],
  // queries and keys that begin at multiples of 16: a call for eight weights
  ["weights dropped, aligned", "attention_dropout", { ...small, S: 50, U: 90, ...plain, drop: 0.3 }, { S: 32, G: 4 }],
  [
    "weights dropped, aligned, keys across the diagonal",
    "attention_dropout_part",
    { ...small, S: 50, U: 40, ...plain, drop: 0.3 },
    { S: 16, U: 32 },
  ],
  [
    "weights dropped, aligned, zigzag",
    "attention_dropout_part",
    { ...small, S: 64, U: 96, chunk: 16, ranks: 4, drop: 0.2 },
    { S: 64, U: 0 },
  ],
  [
    "weights dropped, aligned, blocks of 64 queries",
    "attention_dropout",
    { B: 16, S: 66, U: 66, G: 4, M: 1, C: 4, W: 4, ...plain, drop: 0.2 },
    {},
  ],
  [
    "weights dropped, aligned, heads of 132",
    "attention_dropout",
    { B: 1, S: 35, U: 35, G: 1, M: 2, C: 132, W: 70, ...plain, drop: 0.2 },
    {},
  ],
  ["documents", "attention_documents", { ...small, S: 150, U: 150, ...plain }, {}],
  ["documents, blocks of 64 queries", "attention_documents", { B: 16, S: 66, U: 86, G: 4, M: 1, C: 4, W: 4, ...plain }, { S: 20 }],
  ["documents, keys across the diagonal", "attention_documents_part", { ...small, S: 50, U: 40, ...plain }, { S: 20, U: 30 }],
  [
    "documents, zigzag, queries and keys of several ranks",
    "attention_documents",
    { ...small, S: 48, U: 96, chunk: 12, ranks: 4 },
    { S: 48 },
  ],
  [
    "documents, zigzag, keys of a rank before",
    "attention_documents_part",
    { ...small, S: 64, U: 64, chunk: 32, ranks: 3 },
    { S: 128, U: 64 },
  ],
  ["documents, weights dropped", "attention_dropout_documents", { ...small, S: 90, U: 90, ...plain, drop: 0.3 }, { G: 4 }],
  [
    "documents, weights dropped, zigzag",
    "attention_dropout_documents_part",
    { ...small, S: 40, U: 40, chunk: 10, ranks: 4, drop: 0.2 },
    { S: 40, U: 0 },
  ],
];
// webgpu-run has plain attention
const inFast = ["documents, weights dropped, zigzag"];
for (const { options, rows } of byTier(shapes, ([name]) => inFast.includes(name)))
  test.skipIf(noAdapter).each(rows)(`%s${noAdapter ? ` (skipped: ${noAdapter})` : ""}`, options, async (_, op, d, starts) => {
    for (const c of casesOf(op, { scale: 0.3, ...d }, starts)) await hold(executor!, wgslGenerator(c.use.op)(c.use, "f16"), c);
  });

/** Channels of keys and of values; in the fast tier the largest and the unequal ones. */
const heads = (
  [
    [64, 64],
    [80, 80],
    [128, 128],
    [256, 256],
    [192, 128],
    [24, 16],
  ] as const
).filter(([C]) => isFull || C === 256 || C === 192);
test.each(["f32", "f16"] as const)("kernels of real sizes compile within default limits: %s", async (half) => {
  const orders = [plain, { chunk: 256, ranks: 8 }];
  const names = (["attention", "attention_dropout", "attention_documents", "attention_dropout_documents"] as const).flatMap(
    (name) => [name, `${name}_part`] as const,
  );
  for (const op of names.flatMap((name) => [name, `${name}_grad`] as const))
    for (const [i, [C, W]] of heads.entries()) {
      const sizes = { B: 2, S: 2048, U: 4096, G: 4, M: 8, C, W, scale: 0.1, drop: 0.1, ...orders[i % 2]! };
      const made = wgslGenerator(op)(specFor(op, sizes, half), "f16");
      checked.pushErrorScope("validation");
      const module = checked.createShaderModule({ code: made.source });
      for (const { entry } of made.launches) checked.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
      expect((await checked.popErrorScope())?.message, `${op} ${C}`).toBeUndefined();
    }
});
