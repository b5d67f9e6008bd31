/** What the contract's sizes do not reach in the CUDA kernels: long lists of one id, far positions, rows in any order, garbage behind the rows. */
import { describe, expect, test } from "vitest";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import { type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { ops } from "../../src/ops/index.ts";
import { unscaled } from "../../src/ops/rope.ts";
import type { Buffers, ContractCase } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { random } from "../support/opCases.ts";
import { byTier } from "../support/tiers.ts";

const next = random(5);
const noise = (length: number) => new Float32Array(length).map(next);

interface CaseDraft {
  readonly op: OpName;
  readonly d: Readonly<Record<string, number>>;
  readonly data: Readonly<Buffers>;
  readonly accumulates?: readonly string[];
  readonly starts?: Readonly<Record<string, number>>;
  readonly bound?: number;
}
/** All in f32; what the reference makes of it is wanted, of ragged outputs the rows that exist. */
function caseOf({ op, d, data, accumulates = [], starts = {}, bound = 0 }: CaseDraft): ContractCase {
  const { outputs } = ops[op];
  const start = (dim: string) => starts[dim] ?? 0;
  const before = Object.fromEntries(
    Object.entries(data).map(([n, x]) => [
      n,
      outputs.some((o) => o.name === n) && !accumulates.includes(n) ? new Float32Array(x.length) : Float32Array.from(x),
    ]),
  );
  const rows = (data.rows ?? new Int32Array(1)) as Int32Array;
  ops[op].cpu(before, d, { start, rows });
  const operands = Object.entries(data).filter(([n]) => n !== "rows");
  const dtype = Object.fromEntries(operands.map(([n, x]): [string, Dtype] => [n, x instanceof Int32Array ? "i32" : "f32"]));
  const size = Object.fromEntries(operands.map(([n, x]) => [n, x.length]));
  const use: KernelSpec = {
    op,
    name: `${op}_own`,
    d,
    size,
    dtype,
    accumulates: new Set(accumulates),
    bound,
    makesRows: false,
    mayOverflow: false,
  };
  const exists = (o: (typeof outputs)[number]) => (o.ragged ? (size[o.name]! / bound) * rows[0]! : size[o.name]!);
  const want = Object.fromEntries(outputs.map((o) => [o.name, before[o.name]!.subarray(0, exists(o))]));
  return { title: op, use, data, starts: Object.fromEntries(["B", "S", "E", "V"].map((n) => [n, start(n)])), want };
}

/** Rows of 3 sequences of 7 tokens and 5 experts, each expert's in an order of its own; as many again hold garbage. */
function shuffledRows() {
  const [B, S, E] = [3, 7, 5];
  const p = new Float32Array(B * S * E).map(() => Math.max(0, next()));
  const list: number[][] = [];
  const offsets = [0];
  for (let e = 0; e < E; e++) {
    const own: { row: number[]; by: number }[] = [];
    for (let b = 0; b < B; b++) for (let s = 0; s < S; s++) if (p[(b * S + s) * E + e]! > 0) own.push({ row: [b, s, e], by: next() });
    list.push(...own.sort((x, y) => x.by - y.by).map((x) => x.row));
    offsets.push(list.length);
  }
  const bound = 2 * list.length;
  const rows = new Int32Array(offsetsAt(bound) + E + 1).fill(1 << 30);
  rows.set([list.length, ...list.flat()]);
  rows.set(offsets, offsetsAt(bound));
  const ragged = (width: number) => noise(bound * width).fill(Number.NaN, list.length * width);
  return { d: { B, S, E, D: 12, F: 40 }, p, rows, bound, ragged };
}

const missing = await emulatorMissing();
describe.skipIf(missing)(`CUDA kernels, emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  const holds = async (draft: CaseDraft) => {
    const c = caseOf(draft);
    const made = cudaKernels[draft.op](c.use, "sm_90a");
    await hold(cudaEmulator([{ use: c.use, made }]), made, c);
  };

  test("embed_grad sums lists that are longer than a block", async () => {
    const [B, S, V, D] = [1, 5000, 300, 8];
    // one id has nearly all tokens, and others come in between
    const ids = Int32Array.from({ length: S }, () => (next() < 0.9 ? 7 : Math.floor(150 * (next() + 1))));
    const data = { ids, table: noise(V * D), dy: noise(S * D), dtable: noise(V * D) };
    await holds({ op: "embed_grad", d: { B, S, V, D }, data, accumulates: ["dtable"] });
  });

  // ids of other shards, ids without tokens, with a few, and with more than a warp holds; columns of three warps
  test.each([{ accumulates: ["dtable"] }, { accumulates: [] }])("embed_grad visits the ids of its shard: $accumulates", async (of) => {
    const [B, S, V, D] = [2, 150, 77, 300];
    const ids = Int32Array.from({ length: B * S }, () => Math.floor(next() < 0.3 ? 14 + 2 * next() : 50 + 60 * next()));
    const data = { ids, table: noise(V * D), dy: noise(B * S * D), dtable: noise(V * D) };
    await holds({ op: "embed_grad", d: { B, S, V, D }, data, starts: { V: 5 }, ...of });
  });

  // scores in steps of an eighth, so that many are equal, both zeros, infinities, and a token with fewer numbers than it may choose
  const scores = (tokens: number, E: number) => {
    const x = noise(tokens * E).map((v) => Math.floor(8 * v) / 8);
    x.set([Number.POSITIVE_INFINITY, -0, 0, Number.NEGATIVE_INFINITY]);
    x.fill(Number.NaN, (tokens - 1) * E + 3);
    return x;
  };
  const routers = [
    { E: 128, k: 8 },
    { E: 32, k: 32 },
    { E: 48, k: 5 },
    { E: 512, k: 10 },
    { E: 256, k: 8, groups: 8, group_top_k: 4, group_scores: 2 },
    { E: 64, k: 6, groups: 2, group_top_k: 1, group_scores: 3 },
    { E: 64, k: 3, groups: 1 },
    { E: 100, k: 4 },
  ];
  for (const { options, rows } of byTier(routers, ({ E }) => E === 128 || E === 256))
    test.each(rows)("the router takes the best of $E experts, of equal ones the first: $k each", options, async (own) => {
      const [B, S] = [1, 19];
      const d = { B, S, groups: 1, group_top_k: 1, group_scores: 0, ...own };
      const data = { x: scores(S, own.E), c: new Float32Array(S * own.E) };
      await holds({ op: "top_k_mask", d, data });
      const finite = data.x.map((v) => (Number.isNaN(v) ? -3 : v));
      await holds({ op: "top_k_mask_biased", d: { ...d, sign: -1 }, data: { ...data, x: finite, bias: noise(own.E) } });
    });

  test("rope keeps its precision at a million positions", async () => {
    const [B, S, H, C] = [1, 6, 3, 64];
    const data = { x: noise(B * S * H * C), y: new Float32Array(B * S * H * C) };
    await holds({
      op: "rope",
      d: { B, S, H, C, ...unscaled, ...{ theta: 10_000, sign: 1, first: 0, width: C, interleaved: 0, chunk: 0, ranks: 1 } },
      data,
      starts: { S: 1_000_003 },
    });
  });

  const { d, p, rows, bound, ragged } = shuffledRows();
  const tokens = d.B * d.S;
  const mask = p.map((x) => Number(x > 0));
  const per = (op: OpName, data: Buffers) => ({ op, d, bound, data: { ...data, rows } });
  const readers = [
    per("permute", { x: noise(tokens * d.D), c: mask, r: ragged(d.D) }),
    per("unpermute", { r: ragged(d.D), c: mask, x: noise(tokens * d.D) }),
    per("pack", { p, c: mask, r: ragged(1) }),
    per("pack_grad", { dy: ragged(1), c: mask, dp: noise(p.length) }),
    ...(["swiglu", "geglu"] as const).flatMap((name) => [
      per(`${name}_rows`, { gate: ragged(d.F), up: ragged(d.F), p: ragged(1), y: ragged(d.F) }),
      per(`${name}_rows_grad`, {
        ...{ gate: ragged(d.F), up: ragged(d.F), p: ragged(1), dy: ragged(d.F) },
        ...{ dgate: ragged(d.F), dup: ragged(d.F), dp: ragged(1) },
      }),
    ]),
  ];
  for (const { options, rows } of byTier(readers, ({ op }) => /^(permute|pack_grad|swiglu_rows_grad)$/.test(op)))
    test.each(rows)("$op takes an expert's rows in any order, and none that does not exist", options, async (draft) => {
      await holds(draft);
      expect(draft.data.rows![0]).toBeGreaterThan(20);
    });
});
