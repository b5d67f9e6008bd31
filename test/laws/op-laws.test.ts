/** Laws that hold for the whole op table: an op that is added is tested by being there. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { ops } from "../../src/ops/index.ts";
import { gemm } from "../../src/ops/matrixProduct.ts";
import type { AnyOp, Node, OutputGrads, Value } from "../../src/ops/op.ts";
import { type Case, cutError, cuttable, distance, elements, execute, isList, makeCase, random } from "../support/opCases.ts";

const table = Object.values(ops);
const seed = fc.integer();
/** Tokens in plain order, and in zigzag order by blocks of one. */
const order = fc.constantFrom(0, 1);
/** Ids of a vocabulary of 9 rows: some rows belong to none, or all rows to ids. */
const ids = fc.constantFrom(7, 9);
const law = (p: Parameters<typeof fc.assert>[0], numRuns = 10) => fc.assert(p as fc.IProperty<unknown>, { numRuns, seed: 1 });

// Sums of up to some hundred f32 products, in two orders: 2^-24 each, at most 100 of them.
const ROUNDING = 1e-5;

describe("the shards of a sharded op, combined, equal the op", () => {
  test.each(table.map((o) => [o.name, o] as const))("%s", (_, o) => {
    law(
      fc.property(seed, fc.nat(), order, ids, (s, at, chunk, ids) => {
        const c = makeCase(o, s, { chunk, ids });
        for (const dim of cuttable(c)) {
          const error = cutError(c, dim, 1 + (at % (c.sizes[dim]! - 1)));
          if (!(error < ROUNDING)) throw new Error(`${o.name} sharded along ${dim}: ${error}`);
        }
      }),
    );
  });
});

describe("the gradient equals the measured slope", () => {
  test.each(table.filter((o) => o.grad).map((o) => [o.name, o] as const))("%s", (_, o) => {
    law(
      fc.property(seed, fc.constantFrom(0, 1), order, ids, (s, normalize, chunk, ids) =>
        slope(makeCase(o, s, { normalize, chunk, ids }), s),
      ),
    );
  });
});

test("a node of an op with a formula refers to the op of the table itself: passes compare ops by identity", () => {
  const derived = table.filter((o) => "formula" in o);
  expect(derived.length).toBeGreaterThan(40);
  for (const o of derived) {
    const c = makeCase(o, 1);
    const required = Object.fromEntries((o.attrs ?? []).map((name) => [name, 1]));
    expect(applied({ ...c, attrs: { ...required, ...c.attrs } }).arrived.y.node?.op === o, o.name).toBe(true);
  }
});

test("a gradient with a small error is detected", () => {
  const wrong: AnyOp = { ...ops.rmsnorm, grad: (t, g, a) => ops.rmsnorm.grad!(t, g, { ...a, eps: 1.1 * a.eps! }) };
  expect(() => slope(makeCase(wrong, 1), 1)).toThrow("rmsnorm: the slope is");
});

/** Central differences, extrapolated to a step of 0, along one random direction through all inputs that have a gradient. */
function slope(c: Case, s: number): void {
  const { values, arrived } = applied(c);
  const next = random(s + 1);
  const carried = carriedBy(c);
  // no gradient arrives for a row that does not exist
  const { B, S, E } = c.sizes as Readonly<Record<"B" | "S" | "E", number>>;
  const endOf = (o: Case["outputs"][number]): number =>
    o.ragged && !isList(o) && !c.op.rows ? (c.rows[0]! * elements(o, c.sizes)) / (B * S * E) : elements(o, c.sizes);
  const weights = carried.map((o) => Float32Array.from({ length: elements(o, c.sizes) }, (_, i) => (i < endOf(o) ? next() : 0)));
  const grads = c.op.grad!(values, arrived, c.attrs);
  const have = new Map<Value, Float32Array>([
    ...Object.entries(values).map(([n, v]) => [v, c.arrays[n]!] as const),
    ...arrived.dys.map((dy, i) => [dy, weights[i]!] as const),
  ]);
  // a probability of 0 stays 0: a small step off it would make a row
  const direction = Object.fromEntries(Object.keys(grads).map((n) => [n, c.arrays[n]!.map((x) => (x === 0 ? 0 : next()))]));

  let [stated, scale] = [0, 0];
  for (const [name, g] of Object.entries(grads)) {
    expect(g.sizes, `${c.op.name}: the gradient of ${name}`).toEqual(values[name]!.sizes);
    evaluate(g, have, c).forEach((x, i) => {
      stated += x * direction[name]![i]!;
      scale += Math.abs(x * direction[name]![i]!);
    });
  }
  const at = (h: number) => {
    const moved = Object.entries(direction).map(([n, u]) => [n, c.arrays[n]!.map((x, i) => x + h * u[i]!)]);
    const out = execute({ ...c, arrays: { ...c.arrays, ...Object.fromEntries(moved) } });
    return carried.reduce((sum, o, n) => weights[n]!.reduce((s, w, i) => s + w * out[o.name]![i]!, sum), 0);
  };
  const central = (h: number) => (at(h) - at(-h)) / (2 * h);
  // (4·D(h/2) − D(h))/3 leaves h⁴ ≈ 1e-6; the f32 of the outputs, divided by h, as much again
  const h = 1 / 32;
  const measured = (4 * central(h / 2) - central(h)) / 3;
  if (!(Math.abs(measured - stated) < 2e-4 * (scale + 0.1)))
    throw new Error(`${c.op.name}: the slope is ${measured}, its gradient says ${stated}`);
}

const carriedBy = ({ op, outputs }: Case) =>
  op.gradOutputs ? op.gradOutputs.map((name) => outputs.find((o) => o.name === name)!) : [outputs[0]!];

/** The op applied to leaves, and leaves for the gradients that arrive. */
function applied(c: Case, type: (name: string) => Value["dtype"] = () => "f32"): { values: Record<string, Value>; arrived: OutputGrads } {
  const leaf = (name: string, sizes: readonly number[], ragged: number, dtype = type(name)): Value => ({
    ...{ out: 0, sizes, ragged, fanout: ragged ? c.attrs.k! : 0, dtype, leaf: { kind: "input", name, position: 0 } },
  });
  const sizes = (o: Case["inputs"][number]) => o.dimSpecs.map((s) => elements({ ...o, dimSpecs: [s] }, c.sizes));
  const values = Object.fromEntries(c.inputs.map((o) => [o.name, leaf(o.name, sizes(o), o.ragged)]));
  const y = (c.op as AnyOp & { of(args: Record<string, Value>, attrs: object): Value }).of(values, c.attrs);
  const dys = carriedBy(c).map((o) => {
    const out = y.node!.outs[c.outputs.indexOf(o)]!;
    return leaf(`d${o.name}`, out.sizes, out.ragged, out.dtype);
  });
  return { values, arrived: { y, dy: dys[0]!, dys } };
}
/** A value's elements: its node run after those it needs. */
function evaluate(v: Value, have: Map<Value, Float32Array>, c: Case): Float32Array {
  const known = have.get(v);
  if (known) return known;
  const node: Node = v.node!;
  const inputs = node.op.inputs.map((o, i) => [o.name, evaluate(node.args[i]!, have, c)] as const);
  const outs = node.op.outputs.map((o, i) => [o.name, new Float32Array(node.outs[i]!.sizes.reduce((n, s) => n * s, 1))] as const);
  node.op.cpu(Object.fromEntries([...inputs, ...outs]), node.size, { start: () => 0, rows: c.rows });
  for (const [i, [, out]] of outs.entries()) have.set(node.outs[i]!, out);
  return have.get(v)!;
}

test("only these inputs have no gradient: numbers of tokens, inputs read for their shape, and maxima that cancel", () => {
  const without = table
    .filter((o) => o.grad)
    .map((o) => {
      const { values, arrived } = applied(makeCase(o, 1));
      const grads = o.grad!(values, arrived, makeCase(o, 1).attrs);
      return `${o.name}: ${Object.keys(values)
        .filter((n) => !grads[n])
        .join(" ")}`;
    })
    .filter((line) => !line.endsWith(": "));
  expect(without).toMatchInlineSnapshot(`
    [
      "rope_documents: documents",
      "attention_dropout: sample",
      "dropout: sample",
      "jitter: sample",
      "attention_documents: documents",
      "attention_dropout_documents: documents sample",
      "embed: ids",
      "softmax_terms: m target",
      "nll: m",
      "weighted_sum: weight",
      "combine_weights: c",
      "aux_loss: n",
      "global_aux_loss: n",
      "permute: c",
      "unpermute: c",
      "pack: c",
      "mark_weights: c",
      "pack_groups: c",
      "permute_rows: c",
      "unpermute_rows: c",
      "pack_rows: c",
      "pack_row_groups: c",
    ]
  `);
});

test("in bf16 a gradient has the type of its value; gradients of parameters are f32", () => {
  // a router's probabilities and what the loss is made of are f32 in any job
  const always = ["p", "s", "m", "n", "l", "weight"];
  for (const o of table.filter((t) => t.grad)) {
    const c = makeCase(o, 1);
    const { values, arrived } = applied(c, (name) => (always.includes(name) ? "f32" : "bf16"));
    for (const [name, g] of Object.entries(o.grad!(values, arrived, c.attrs)))
      expect(g.dtype, `${o.name}: the gradient of ${name}`).toBe(/^(w|gain|table|bias)$/.test(name) ? "f32" : values[name]!.dtype);
  }
});

test("gradients of parameters accumulate: microbatches share one buffer", () => {
  const sums = table.filter((o) => o.outputs.some((out) => /^d(w|gain|table|bias)$/.test(out.name)));
  expect(sums.length).toBeGreaterThan(4);
  for (const o of sums) {
    const c = makeCase(o, 1);
    const once = execute(c);
    const twice = execute({ ...c, arrays: { ...c.arrays, ...once } });
    for (const { name } of o.outputs.filter((out) => /^d(w|gain|table|bias)$/.test(out.name)))
      expect(
        distance(
          twice[name]!,
          once[name]!.map((x) => 2 * x),
        ),
        o.name,
      ).toBeLessThan(ROUNDING);
  }
});

/** Holds an op to f(a + b) = f(a) + f(b), where `names` of its inputs are a and b and the others are the same. */
function expectLinear(o: AnyOp, names: readonly string[]): void {
  const without = (c: Case): Case => ({ ...c, arrays: Object.fromEntries(o.inputs.map((i) => [i.name, c.arrays[i.name]!])) });
  law(
    fc.property(seed, seed, (s, t) => {
      const [a, other] = [without(makeCase(o, s)), without(makeCase(o, t))];
      const inputs = (of: (name: string) => Float32Array): Case => ({
        ...a,
        arrays: { ...a.arrays, ...Object.fromEntries(names.map((name) => [name, of(name)])) },
      });
      const b = inputs((name) => other.arrays[name]!);
      const sum = inputs((name) => a.arrays[name]!.map((x, i) => x + other.arrays[name]![i]!));
      const [ya, yb, ysum] = [a, b, sum].map((c) => execute(c));
      for (const { name } of o.outputs) {
        const added = ya![name]!.map((x, i) => x + yb![name]![i]!);
        expect(distance(ysum![name]!, added), `${o.name}.${name}`).toBeLessThan(ROUNDING);
      }
    }),
  );
}

test("ops that are declared linear are linear", () => {
  const linear = table.filter((o) => o.linear);
  expect(linear.map((o) => o.name)).toEqual(["add", "accumulate", "cast", "arrange"]);
  for (const o of linear)
    expectLinear(
      o,
      o.inputs.map((i) => i.name),
    );
});

test("ops that are declared linear in one input are linear in it", () => {
  const linear = table.flatMap((o) => (o.linearIn === undefined ? [] : [[o, o.linearIn] as const]));
  expect(linear.map(([o, name]) => `${o.name} ${name}`).sort()).toEqual([
    "bias_grad dy",
    "gemm_dgrad dy",
    "gemm_wgrad dy",
    "head_layernorm_grad dy",
    "head_norm_grad dy",
    "pack_row_groups_grad dy",
    "pack_rows_grad dy",
    "rope x",
    "rope_documents x",
    "unpermute_rows r",
  ]);
  for (const [o, name] of linear) expectLinear(o, [name]);
});

test("rows are the (b,s,e) with a one in the map, by expert, sequence and token; the needed count is stored even above the bound", () => {
  for (const o of table.filter((t) => t.rows)) {
    const c = makeCase(o, 7);
    const rows = new Int32Array(c.rows.length);
    const needed = o.rows!(c.arrays, c.sizes, { start: () => 0, rows }, rows, c.rows[0]!);
    expect([needed, ...rows]).toEqual([c.rows[0], ...c.rows]);
    const short = new Int32Array(7);
    expect(o.rows!(c.arrays, c.sizes, { start: () => 0, rows }, short, 2)).toBe(c.rows[0]);
    expect([...short]).toEqual([2, ...c.rows.subarray(1, 7)]);
  }
});

test("of equal scores the lower expert is chosen; one whose weight underflowed to 0 has a row all the same", () => {
  const run = (scores: number[]) => {
    const d = { B: 1, S: 1, E: 4, k: 2, normalize: 1, scale: 1 };
    const rows = new Int32Array(13);
    const place = { start: () => 0, rows };
    const p = Float32Array.from(scores);
    const [c, y, dp] = [new Float32Array(4), new Float32Array(4), new Float32Array(4)];
    ops.top_k_mask.cpu({ x: p, c }, d, place);
    ops.combine_weights.cpu({ p, c, y }, d, place);
    ops.combine_weights_grad.cpu({ p, c, dy: Float32Array.of(1, 0, 0, 0), dp }, d, place);
    // 0 times a negative number is −0
    return { y: [...y], dp: Array.from(dp, (x) => x + 0), rows: ops.permute.rows!({ c }, d, place, rows, 4) };
  };
  expect(run([0.25, 0.25, 0.25, 0.25])).toEqual({ y: [0.5, 0.5, 0, 0], dp: [1, -1, 0, 0], rows: 2 });
  expect(run([1, 0, 0, 0])).toEqual({ y: [1, 0, 0, 0], dp: [0, -1, 0, 0], rows: 2 });
});

test("forced loads are balanced, and continue from one shard of the tokens to the next", () => {
  const of = (B: number, S: number, b0: number, s0: number, order = { chunk: 0, ranks: 1 }) => {
    const c = new Float32Array(B * S * 6);
    const starts: Readonly<Record<string, number>> = { B: b0, S: s0 };
    const d = { B, S, E: 6, k: 2, S0: order.chunk ? 8 : 9, E0: 6, ...order };
    ops.uniform_mask.cpu({ x: c, c }, d, { start: (dim) => starts[dim] ?? 0, rows: new Int32Array(1) });
    return [...c];
  };
  const all = of(2, 9, 0, 0);
  expect(Array.from({ length: 6 }, (_, e) => all.filter((x, i) => i % 6 === e && x).length)).toEqual([6, 6, 6, 6, 6, 6]);
  expect(of(1, 4, 1, 5)).toEqual(all.slice((9 + 5) * 6));
  // the second of two ranks has positions 2 to 5, as they lie 2, 3, 4, 5 and the first 0, 1, 6, 7
  const zigzag = { chunk: 2, ranks: 2 };
  const lying = [0, 1, 6, 7, 2, 3, 4, 5].flatMap((t) => of(1, 1, 0, t, { chunk: 0, ranks: 1 }));
  expect(lying.slice(0, 24)).toEqual(of(1, 4, 0, 0, zigzag));
  expect(lying.slice(24)).toEqual(of(1, 4, 0, 4, zigzag));
});

test("the blocked product is the plain one, at sizes that fill no tile or block", () => {
  const size = fc.integer({ min: 1, max: 11 });
  law(
    fc.property(
      size,
      size,
      fc.oneof(size, fc.integer({ min: 250, max: 520 })),
      fc.boolean(),
      fc.boolean(),
      fc.nat({ max: 5 }),
      seed,
      (m, n, k, ta, tb, skip, s) => {
        const next = random(s);
        const [a, b, c] = [m * k, k * n, m * n].map((length) => Float32Array.from({ length: length + skip }, next)) as [
          Float32Array,
          Float32Array,
          Float32Array,
        ];
        const want = Float32Array.from(c, (x, i) => {
          if (i < skip) return x;
          const [row, col] = [Math.floor((i - skip) / n), (i - skip) % n];
          let sum = x;
          for (let p = 0; p < k; p++) sum += a[skip + (ta ? p * m + row : row * k + p)]! * b[skip + (tb ? col * k + p : p * n + col)]!;
          return sum;
        });
        gemm(c, a, b, { m, n, k, ta, tb, a0: skip, b0: skip, c0: skip });
        expect(distance(c, want)).toBeLessThan(1e-6);
      },
    ),
    200,
  );
});
