/**
 * Selection of tokens by experts of limited capacity: the highest weights within a group of tokens whose size the job fixes. Ties go to the
 * earlier position, then to the lower sequence.
 */
import { mul, sub, total } from "./formula.ts";
import { formulaOp, op } from "./op.ts";
import { positionOf } from "./positions.ts";

/** Returns the `count` indices below n with the largest keys, in descending order of keys. */
const best = (n: number, count: number, key: (i: number) => number): number[] =>
  Array.from({ length: n }, (_, i) => ({ i, key: key(i) }))
    .sort((a, b) => b.key - a.key || a.i - b.i)
    .slice(0, count)
    .map(({ i }) => i);

/**
 * Keeps at most `capacity` tokens per expert among P sequences × L positions, the tokens that a rank routes at once. It keeps the largest
 * weights, or with `position` the first tokens. With `pad`, free capacity is filled with the first tokens that did not choose the expert, so
 * that every expert has exactly `capacity` rows. Weights are 0 or more.
 */
export const drop = op({
  name: "apply_capacity",
  sig: "p[A*P,J*L,E] c[A*P,J*L,E] -> d[A*P,J*L,E]",
  attrs: ["capacity"],
  cpu({ p, c, d }, { A, P, J, L, E, capacity, position, pad }) {
    for (let group = 0; group < A * J; group++) {
      const [a, z] = [Math.floor(group / J), group % J];
      for (let e = 0; e < E; e++) {
        const at = (i: number) => ((a * P + (i % P)) * J * L + z * L + Math.floor(i / P)) * E + e;
        const key = (i: number) => (c[at(i)]! > 0 ? (position ? 0 : p[at(i)]!) : -1);
        for (const i of best(P * L, capacity, key)) if (pad || c[at(i)]! > 0) d[at(i)] = 1;
      }
    }
  },
});

/** Counts the rows of the mask c that the mask d does not keep. */
export const droppedRows = formulaOp({
  name: "dropped_rows",
  sig: "c[B,S,E] d[B,S,E] -> y[]",
  types: { y: "f32" },
  formula: ({ c, d }) => ({ y: total(mul(c, sub(1, d))) }),
});

/** Expert choice: each expert takes the `capacity` tokens of a microbatch (P sequences) with its highest scores. Scores are 0 or more. */
export const expertChoiceMask = op({
  name: "expert_choice_mask",
  sig: "p[A*P,S!,E] -> c[A*P,S!,E]",
  attrs: ["capacity"],
  cpu({ p, c }, { A, P, S, E, capacity }) {
    for (let a = 0; a < A; a++)
      for (let e = 0; e < E; e++) {
        const at = (i: number) => ((a * P + (i % P)) * S + Math.floor(i / P)) * E + e;
        for (const i of best(P * S, capacity, (i) => p[at(i)]!)) c[at(i)] = 1;
      }
  },
});

/**
 * Uniform loads for benchmarks, independent of the scores: token t, numbered by position, takes the k experts from t·k on, modulo E0. `S0` and
 * `E0` are the global sizes, `chunk` and `ranks` give the order of tokens (positions.ts); only the shape of `x` is read.
 */
export const uniformMask = op({
  name: "uniform_mask",
  sig: "x[B,S,E] -> c[B,S,E]",
  attrs: ["k", "S0", "E0", "chunk", "ranks"],
  types: { c: "f32" },
  cpu({ c }, { B, S, E, k, S0, E0, chunk, ranks }, place) {
    const [b0, s0, e0] = [place.start("B"), place.start("S"), place.start("E")];
    for (let t = 0; t < B * S; t++) {
      const first = ((b0 + Math.floor(t / S)) * S0 + positionOf(s0 + (t % S), chunk, ranks)) * k;
      for (let e = 0; e < E; e++) c[t * E + e] = Number((((e0 + e - first) % E0) + E0) % E0 < k);
    }
  },
});
