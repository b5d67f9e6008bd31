/**
 * Attention does not depend on how a sequence lies over ranks: on tokens in zigzag order it is that of the plain order, and made of
 * pieces of the keys it is that of the whole.
 */
import fc from "fast-check";
import { expect, test } from "vitest";
import { attention, attentionGrad, attentionMerge, attentionPart, attentionPartGrad } from "../../src/ops/attention.ts";
import type { AnyOp, ShardContext } from "../../src/ops/op.ts";
import { positionOf } from "../../src/ops/positions.ts";
import { distance, elements, random } from "../support/opCases.ts";

type Arrays = Readonly<Record<string, Float32Array>>;
/** From a token to the one before which it ends. */
type Span = readonly [from: number, to: number];
/** Sizes of attention to `tokens` of a sequence, of which blocks of `block` lie in zigzag order over `ranks` ranks. */
interface Layout extends Readonly<Record<"B" | "G" | "M" | "C" | "W", number>> {
  readonly tokens: number;
  readonly block: number;
  readonly ranks: number;
}
const size = fc.integer({ min: 1, max: 3 });
const layouts = fc
  .record({ B: size, G: size, M: size, C: size, W: size, block: size, ranks: size })
  .map((l): Layout => ({ ...l, tokens: 2 * l.block * l.ranks }));
const law = <T>(p: fc.IProperty<T>) => fc.assert(p, { numRuns: 60, seed: 1 });

const place = (starts: Readonly<Record<string, number>>): ShardContext => ({ start: (dim) => starts[dim] ?? 0, rows: new Int32Array(1) });
const widthOf = (x: Float32Array, l: Layout): number => x.length / l.B / l.tokens;

/** What an op makes of a piece of the queries and one of the keys. What it leaves alone is NaN. */
function ran(op: AnyOp, l: Layout, chunk: number, all: Arrays, queries: Span, keys: Span): Arrays {
  const d = { ...l, scale: 0.8, chunk, S: queries[1] - queries[0], U: keys[1] - keys[0] };
  const taken = op.inputs.map((o) => [o.name, piece(all[o.name]!, l, o.dimSpecs[1]!.dim === "S" ? queries : keys)]);
  const made = Object.fromEntries(op.outputs.map((o) => [o.name, new Float32Array(elements(o, d)).fill(NaN)]));
  op.cpu({ ...Object.fromEntries(taken), ...made }, d, place({ S: queries[0], U: keys[0] }));
  return made;
}
function piece(x: Float32Array, l: Layout, [from, to]: Span): Float32Array {
  const width = widthOf(x, l);
  const sequences = Array.from({ length: l.B }, (_, b) => x.subarray((b * l.tokens + from) * width, (b * l.tokens + to) * width));
  return Float32Array.from(sequences.flatMap((s) => [...s]));
}
const both = (l: Layout, chunk: number, given: Arrays): Arrays => {
  const all: Span = [0, l.tokens];
  const forward = ran(attention, l, chunk, given, all, all);
  return { ...forward, ...ran(attentionGrad, l, chunk, { ...given, ...forward }, all, all) };
};
function given(l: Layout, seed: number): Arrays {
  const next = random(seed);
  const heads = { q: l.G * l.M * l.C, k: l.G * l.C, v: l.G * l.W, dy: l.G * l.M * l.W };
  return Object.fromEntries(Object.entries(heads).map(([name, n]) => [name, new Float32Array(l.B * l.tokens * n).map(next)]));
}
/** Returns the tokens reordered: the token at place i comes from place `from[i]`. */
const moved = (all: Arrays, l: Layout, from: (i: number) => number): Arrays =>
  Object.fromEntries(
    Object.entries(all).map(([name, x]) => {
      const width = widthOf(x, l);
      const token = (i: number) => Math.floor(i / l.tokens) * l.tokens + from(i % l.tokens);
      return [name, x.map((_, i) => x[token(Math.floor(i / width)) * width + (i % width)]!)];
    }),
  );
/** f32 outputs of a few products and their sums in two orders. */
function close(have: Arrays, want: Arrays): void {
  for (const [name, x] of Object.entries(want)) expect(distance(have[name]!, x), name).toBeLessThan(1e-5);
}

test("in zigzag order every position occurs once, and all ranks attend to equally many keys", () => {
  law(
    fc.property(size, size, (block, ranks) => {
      const all = Array.from({ length: 2 * block * ranks }, (_, i) => positionOf(i, block, ranks));
      expect(all.toSorted((a, b) => a - b)).toEqual([...all.keys()]);
      const seen = Array.from({ length: ranks }, (_, r) =>
        all.slice(2 * block * r, 2 * block * (r + 1)).reduce((sum, at) => sum + at + 1, 0),
      );
      expect(new Set(seen).size).toBe(1);
    }),
  );
  expect(Array.from({ length: 8 }, (_, i) => positionOf(i, 1, 4))).toEqual([0, 7, 1, 6, 2, 5, 3, 4]);
  expect(Array.from({ length: 4 }, (_, i) => positionOf(i + 6, 0, 4))).toEqual([6, 7, 8, 9]);
});

test("attention and its gradient in zigzag order equal those in plain order", () => {
  law(
    fc.property(layouts, fc.integer(), (l, seed) => {
      const plain = given(l, seed);
      const position = (i: number) => positionOf(i, l.block, l.ranks);
      close(both(l, l.block, moved(plain, l, position)), moved(both(l, 0, plain), l, position));
    }),
  );
});

test("attention to shards of the keys, merged in sequence, equals attention to all keys; the gradients' sums are the gradients", () => {
  law(
    fc.property(layouts, fc.constantFrom(0, 1), fc.integer(), fc.nat(), fc.nat(), fc.nat(), (l, zigzag, seed, a, b, s) => {
      const chunk = zigzag * l.block;
      const all = given(l, seed);
      const want = both(l, chunk, all);
      const [first, second] = [a % (l.tokens + 1), b % (l.tokens + 1)].toSorted((x, y) => x - y) as [number, number];
      const from = s % l.tokens;
      const queries: Span = [from, Math.min(l.tokens, from + 1 + (seed & 3))];
      const keys: Span[] = [
        [first, second],
        [0, first],
        [second, l.tokens],
      ];
      const parts = keys.map((k) => ran(attentionPart, l, chunk, all, queries, k));
      const d = { B: l.B, S: queries[1] - queries[0], H: l.G * l.M, W: l.W };
      const sum = parts.reduce((have, part) => {
        const made = { o: new Float32Array(have.o!.length).fill(NaN), lse: new Float32Array(have.lse!.length).fill(NaN) };
        attentionMerge.cpu({ a: have.o!, la: have.lse!, b: part.o!, lb: part.lse!, ...made }, d, place({}));
        return made;
      });
      close(sum, { o: piece(want.o!, l, queries), lse: piece(want.lse!, l, queries) });

      const grads = keys.map((k) => ran(attentionPartGrad, l, chunk, { ...all, ...want }, queries, k));
      const dq = grads.map((g) => g.dq!).reduce((x, y) => x.map((n, i) => n + y[i]!));
      close({ dq }, { dq: piece(want.dq!, l, queries) });
      const every: Span = [0, l.tokens];
      for (const k of keys) {
        const { dk, dv } = ran(attentionPartGrad, l, chunk, { ...all, ...want }, every, k);
        close({ dk: dk!, dv: dv! }, { dk: piece(want.dk!, l, k), dv: piece(want.dv!, l, k) });
      }
    }),
  );
});

test("a query without keys in a shard has o = 0 and lse = −∞, which a merge ignores", () => {
  const l: Layout = { B: 1, G: 1, M: 1, C: 2, W: 3, tokens: 4, block: 1, ranks: 2 };
  const all = given(l, 1);
  const blind = ran(attentionPart, l, 0, all, [0, 2], [2, 4]);
  expect(blind).toEqual({ o: new Float32Array(6), lse: new Float32Array(2).fill(-Infinity) });
  const seeing = ran(attentionPart, l, 0, all, [0, 2], [0, 2]);
  const merged = (a: Arrays, b: Arrays): Arrays => {
    const made = { o: new Float32Array(6).fill(NaN), lse: new Float32Array(2).fill(NaN) };
    attentionMerge.cpu({ a: a.o!, la: a.lse!, b: b.o!, lb: b.lse!, ...made }, { B: 1, S: 2, H: 1, W: 3 }, place({}));
    return made;
  };
  expect(merged(blind, seeing)).toEqual(seeing);
  expect(merged(seeing, blind)).toEqual(seeing);
  expect(merged(blind, blind)).toEqual(blind);
});
