/** The rows that experts process, and the sigmoid gate. A row is a (b,s,e) where the top-k mask c of the router is 1, whatever its weight. */

import { mul, rowSum, sigmoid, sub, variable } from "./formula.ts";
import { formulaOp, type Grads, op, type ShardContext } from "./op.ts";
import { markExperts } from "./rearrange.ts";

// -- rows of experts

type Sizes = Readonly<Record<"B" | "S" | "E", number>>;

function chosen({ c }: { c: Float32Array }, { B, S, E }: Sizes, place: ShardContext, rows: Int32Array, bound: number): number {
  const [b0, s0, e0] = [place.start("B"), place.start("S"), place.start("E")];
  let count = 0;
  for (let e = 0; e < E; e++)
    for (let b = 0; b < B; b++)
      for (let s = 0; s < S; s++) {
        if (!(c[(b * S + s) * E + e]! > 0)) continue;
        if (count < bound) rows.set([b0 + b, s0 + s, e0 + e], 1 + 3 * count);
        count++;
      }
  rows[0] = Math.min(count, bound);
  markExperts(rows, bound, e0, E);
  return count;
}
/** Visits each row with its local token and the local index of its (b,s,e). */
function eachRow({ S, E }: Omit<Sizes, "B">, place: ShardContext, visit: (r: number, token: number, choice: number) => void): void {
  const { rows } = place;
  const [b0, s0, e0] = [place.start("B"), place.start("S"), place.start("E")];
  for (let r = 0; r < rows[0]!; r++) {
    const token = (rows[1 + 3 * r]! - b0) * S + rows[2 + 3 * r]! - s0;
    visit(r, token, token * E + rows[3 + 3 * r]! - e0);
  }
}

/** Copies the vector of each token once per expert of the token. */
export const permute = op({
  name: "permute",
  sig: "x[B,S,D] c[B,S,E] -> r[B~S~E,D]",
  rows: chosen,
  cpu({ x, r }, d, place) {
    const { D } = d;
    eachRow(d, place, (row, t) => r.set(x.subarray(t * D, t * D + D), row * D));
  },
  grad: ({ c }, { dy }, a): Grads => ({ x: unpermute.of({ r: dy, c }, a) }),
});
/** Sums the rows of each token; only the shape of `c` is read. */
export const unpermute = op({
  name: "unpermute",
  sig: "r[B~S~E,D] c[B,S,E] -> x[B,S,D]",
  cpu({ x, r }, d, place) {
    const { D } = d;
    eachRow(d, place, (row, t) => {
      for (let i = 0; i < D; i++) x[t * D + i]! += r[row * D + i]!;
    });
  },
  grad: ({ c }, { dy }, a): Grads => ({ r: permute.of({ x: dy, c }, a) }),
});
/** Gathers the combine weight of each row. */
export const pack = op({
  name: "pack",
  sig: "p[B,S,E] c[B,S,E] -> r[B~S~E]",
  rows: chosen,
  cpu({ p, r }, d, place) {
    eachRow(d, place, (row, _, choice) => {
      r[row] = p[choice]!;
    });
  },
  grad: ({ c }, { dy }, a): Grads => ({ p: packGrad.of({ dy, c }, a) }),
});
/** Gradient of pack with respect to p; only the shape of `c` is read. */
export const packGrad = op({
  name: "pack_grad",
  sig: "dy[B~S~E] c[B,S,E] -> dp[B,S,E]",
  cpu({ dy, dp }, d, place) {
    eachRow(d, place, (row, _, choice) => {
      dp[choice] = dy[row]!;
    });
  },
});

// -- sigmoid gate

/** Multiplies each block of C channels by the sigmoid of its gate. */
export const sigmoidGate = formulaOp({
  name: "sigmoid_gate",
  sig: "x[B,S,N*C] gate[B,S,N] -> y[B,S,N*C]",
  formula: ({ x, gate }) => ({ y: mul(x, variable("share", sigmoid(gate))) }),
  grad({ x, gate }, { dy }, a): Grads {
    const { dx, dgate } = sigmoidGateGrad.all({ x, gate, dy }, a);
    return { x: dx, gate: dgate };
  },
});
/** dx = σ·dy; dgate = σ·(1 − σ) · Σ x·dy. */
export const sigmoidGateGrad = formulaOp({
  name: "sigmoid_gate_grad",
  sig: "x[B,S,N*C] gate[B,S,N] dy[B,S,N*C] -> dx[B,S,N*C] dgate[B,S,N]",
  formula({ x, gate, dy }) {
    const s = variable("s", sigmoid(gate));
    return { dx: mul(dy, s), dgate: mul(rowSum("sum", mul(x, dy)), s, sub(1, s)) };
  },
});
