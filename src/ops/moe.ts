/** The rows that experts work on, their activation, and a gate. A row is a (b,s,e) that the map c of the router holds a 1 for, whatever its weight. */

import { type Grads, op, type ShardContext } from "./op.ts";
import { markExperts } from "./transport.ts";

// -- rows

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

/** A copy of a token's vector for each of its experts. */
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
/** The sum of a token's rows; of `c` only the shape is read. */
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
/** The weight of each row. */
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
/** Of `c` only the shape is read. */
export const packGrad = op({
  name: "pack_grad",
  sig: "dy[B~S~E] c[B,S,E] -> dp[B,S,E]",
  cpu({ dy, dp }, d, place) {
    eachRow(d, place, (row, _, choice) => {
      dp[choice] = dy[row]!;
    });
  },
});

// -- the activation: silu(gate)·up, silu(x) = x·σ(x), silu′ = σ·(1 + x·(1 − σ))

const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));

export const swiglu = op({
  name: "swiglu",
  sig: "gate[B,S,F] up[B,S,F] -> y[B,S,F]",
  cpu({ gate, up, y }) {
    for (let i = 0; i < y.length; i++) y[i] = gate[i]! * sigmoid(gate[i]!) * up[i]!;
  },
  grad({ gate, up }, { dy }): Grads {
    const { dgate, dup } = swigluGrad.all({ gate, up, dy });
    return { gate: dgate, up: dup };
  },
});
export const swigluGrad = op({
  name: "swiglu_grad",
  sig: "gate[B,S,F] up[B,S,F] dy[B,S,F] -> dgate[B,S,F] dup[B,S,F]",
  cpu({ gate, up, dy, dgate, dup }) {
    for (let i = 0; i < dy.length; i++) {
      const g = gate[i]!;
      const s = sigmoid(g);
      dgate[i] = dy[i]! * up[i]! * s * (1 + g * (1 - s));
      dup[i] = dy[i]! * g * s;
    }
  },
});
/** The router's weight is applied inside the activation, as Megatron does: what comes after is linear, and rows need no weighting later. */
export const swigluRows = op({
  name: "swiglu_rows",
  sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
  cpu({ gate, up, p, y }, { F }, { rows }) {
    for (let i = 0; i < rows[0]! * F; i++) y[i] = gate[i]! * sigmoid(gate[i]!) * up[i]! * p[Math.floor(i / F)]!;
  },
  grad({ gate, up, p }, { dy }): Grads {
    const { dgate, dup, dp } = swigluRowsGrad.all({ gate, up, p, dy });
    return { gate: dgate, up: dup, p: dp };
  },
});
export const swigluRowsGrad = op({
  name: "swiglu_rows_grad",
  sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] dy[B~S~E,F] -> dgate[B~S~E,F] dup[B~S~E,F] dp[B~S~E]",
  types: { dp: "f32" },
  cpu({ gate, up, p, dy, dgate, dup, dp }, { F }, { rows }) {
    for (let r = 0; r < rows[0]!; r++) {
      let sum = 0;
      for (let i = r * F; i < r * F + F; i++) {
        const g = gate[i]!;
        const s = sigmoid(g);
        dgate[i] = dy[i]! * p[r]! * up[i]! * s * (1 + g * (1 - s));
        dup[i] = dy[i]! * p[r]! * g * s;
        sum += dy[i]! * g * s * up[i]!;
      }
      dp[r] = sum;
    }
  },
});

// -- a gate

/** Blocks of C channels, each times the sigmoid of its gate. */
export const sigmoidGate = op({
  name: "sigmoid_gate",
  sig: "x[B,S,N*C] gate[B,S,N] -> y[B,S,N*C]",
  cpu({ x, gate, y }, { C }) {
    for (let i = 0; i < y.length; i++) y[i] = x[i]! * sigmoid(gate[Math.floor(i / C)]!);
  },
  grad({ x, gate }, { dy }, a): Grads {
    const { dx, dgate } = sigmoidGateGrad.all({ x, gate, dy }, a);
    return { x: dx, gate: dgate };
  },
});
/** dgate = σ·(1 − σ) · Σ x·dy */
export const sigmoidGateGrad = op({
  name: "sigmoid_gate_grad",
  sig: "x[B,S,N*C] gate[B,S,N] dy[B,S,N*C] -> dx[B,S,N*C] dgate[B,S,N]",
  cpu({ x, gate, dy, dx, dgate }, { C }) {
    for (let block = 0; block < gate.length; block++) {
      const s = sigmoid(gate[block]!);
      let sum = 0;
      for (let i = block * C; i < block * C + C; i++) {
        dx[i] = dy[i]! * s;
        sum += x[i]! * dy[i]!;
      }
      dgate[block] = sum * s * (1 - s);
    }
  },
});
