/** Routing, its balancing losses, the rows that experts work on, and their activation. A row is a (b,s,e) whose probability is above zero. */
import { markExperts } from "./messages.ts";
import { type Grads, op, type Place } from "./op.ts";

// -- the router

export const softmax = op({
  name: "softmax",
  sig: "x[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  cpu({ x, y }, { E }) {
    for (let o = 0; o < x.length; o += E) {
      const log = logSumExp(x, o, E);
      for (let e = 0; e < E; e++) y[o + e] = Math.exp(x[o + e]! - log);
    }
  },
  grad({ x }, { y, dy }): Grads {
    const dx = softmaxGrad.of({ y, dy });
    dx.dtype = x.dtype;
    return { x: dx };
  },
});
/** dx = y·(dy − Σ y·dy) */
export const softmaxGrad = op({
  name: "softmax_grad",
  sig: "y[B,S,E!] dy[B,S,E!] -> dx[B,S,E!]",
  cpu({ y, dy, dx }, { E }) {
    for (let o = 0; o < y.length; o += E) {
      let dot = 0;
      for (let e = 0; e < E; e++) dot += y[o + e]! * dy[o + e]!;
      for (let e = 0; e < E; e++) dx[o + e] = y[o + e]! * (dy[o + e]! - dot);
    }
  },
});
function logSumExp(x: Float32Array, at: number, count: number): number {
  let max = -Infinity;
  for (let e = 0; e < count; e++) max = Math.max(max, x[at + e]!);
  let sum = 0;
  for (let e = 0; e < count; e++) sum += Math.exp(x[at + e]! - max);
  return max + Math.log(sum);
}

/** The k largest probabilities, of equal ones the lower index, others exactly 0; with `normalize` divided by their sum. */
export const topK = op({
  name: "top_k",
  sig: "p[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  cpu({ p, y }, { E, k, normalize }) {
    largest(p, E, k!, (o, kept, sum) => {
      for (const e of kept) y[o + e] = normalize ? p[o + e]! / sum : p[o + e]!;
    });
  },
  grad: ({ p }, { y, dy }, a): Grads => ({ p: topKGrad.of({ p, y, dy }, a) }),
});
/**
 * dp = dy for those kept; normalised, y = p/Σp gives dp = (dy − Σ y·dy)/Σp. What is kept is found again from p, not read off
 * y > 0: a kept probability may have underflowed to 0, and then has a slope although it has no row.
 */
export const topKGrad = op({
  name: "top_k_grad",
  sig: "p[B,S,E!] y[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  cpu({ p, y, dy, dp }, { E, k, normalize }) {
    largest(p, E, k!, (o, kept, sum) => {
      let dot = 0;
      for (const e of kept) dot += y[o + e]! * dy[o + e]!;
      for (const e of kept) dp[o + e] = normalize ? (dy[o + e]! - dot) / sum : dy[o + e]!;
    });
  },
});
/** Visits each token with the experts of its k largest probabilities and their sum; the list is used again for the next token. */
function largest(p: Float32Array, E: number, k: number, visit: (o: number, kept: Int32Array, sum: number) => void): void {
  const kept = new Int32Array(k);
  const taken = new Uint8Array(E);
  for (let o = 0; o < p.length; o += E) {
    taken.fill(0);
    let sum = 0;
    for (let i = 0; i < k; i++) {
      let best = -1;
      for (let e = 0; e < E; e++) if (!taken[e] && (best < 0 || p[o + e]! > p[o + best]!)) best = e;
      taken[best] = 1;
      kept[i] = best;
      sum += p[o + best]!;
    }
    visit(o, kept, sum);
  }
}

// -- balancing losses, one per microbatch of P sequences

/** How many tokens of each microbatch chose each expert. */
export const tally = op({
  name: "tally",
  sig: "p[A*P,S,E] -> n[A,E]",
  types: { n: "f32" },
  cpu({ p, n }, { P, S, E }) {
    for (let i = 0; i < p.length; i++) if (p[i]! > 0) n[Math.floor(i / (P * S * E)) * E + (i % E)]! += 1;
  },
});
/** c · Σ p·n: its sum over tokens is owed, while the counts are needed whole. The counts take no gradient. */
export const auxLoss = op({
  name: "aux_loss",
  sig: "p[A*P,S,E] n[A,E] -> y[]",
  types: { y: "f32" },
  cpu({ p, n, y }, { P, S, E, c }) {
    let sum = 0;
    for (let i = 0; i < p.length; i++) sum += p[i]! * n[Math.floor(i / (P * S * E)) * E + (i % E)]!;
    y[0]! += c! * sum;
  },
  grad: ({ p, n }, { dy }, a): Grads => ({ p: auxLossGrad.of({ p, n, dy }, a) }),
});
/** Of `p` only the shape is read. */
export const auxLossGrad = op({
  name: "aux_loss_grad",
  sig: "p[A*P,S,E] n[A,E] dy[] -> dp[A*P,S,E]",
  cpu({ n, dy, dp }, { P, S, E, c }) {
    for (let i = 0; i < dp.length; i++) dp[i] = c! * dy[0]! * n[Math.floor(i / (P * S * E)) * E + (i % E)]!;
  },
});
/** c · Σ logsumexp(x)² */
export const zLoss = op({
  name: "z_loss",
  sig: "x[B,S,E!] -> y[]",
  types: { y: "f32" },
  cpu({ x, y }, { E, c }) {
    let sum = 0;
    for (let o = 0; o < x.length; o += E) sum += logSumExp(x, o, E) ** 2;
    y[0]! += c! * sum;
  },
  grad: ({ x }, { dy }, a): Grads => ({ x: zLossGrad.of({ x, dy }, a) }),
});
/** dx = 2c · logsumexp(x) · softmax(x) */
export const zLossGrad = op({
  name: "z_loss_grad",
  sig: "x[B,S,E!] dy[] -> dx[B,S,E!]",
  cpu({ x, dy, dx }, { E, c }) {
    for (let o = 0; o < x.length; o += E) {
      const log = logSumExp(x, o, E);
      for (let e = 0; e < E; e++) dx[o + e] = 2 * c! * dy[0]! * log * Math.exp(x[o + e]! - log);
    }
  },
});

// -- rows

type Sizes = Readonly<Record<"B" | "S" | "E", number>>;

function chosen({ p }: { p: Float32Array }, { B, S, E }: Sizes, place: Place, rows: Int32Array, bound: number): number {
  const [b0, s0, e0] = [place.start("B"), place.start("S"), place.start("E")];
  let count = 0;
  for (let e = 0; e < E; e++)
    for (let b = 0; b < B; b++)
      for (let s = 0; s < S; s++) {
        if (!(p[(b * S + s) * E + e]! > 0)) continue;
        if (count < bound) rows.set([b0 + b, s0 + s, e0 + e], 1 + 3 * count);
        count++;
      }
  rows[0] = Math.min(count, bound);
  markExperts(rows, bound, e0, E);
  return count;
}
/** Visits each row with its local token and the local index of its (b,s,e). */
function eachRow({ S, E }: Omit<Sizes, "B">, place: Place, visit: (r: number, token: number, choice: number) => void): void {
  const { rows } = place;
  const [b0, s0, e0] = [place.start("B"), place.start("S"), place.start("E")];
  for (let r = 0; r < rows[0]!; r++) {
    const token = (rows[1 + 3 * r]! - b0) * S + rows[2 + 3 * r]! - s0;
    visit(r, token, token * E + rows[3 + 3 * r]! - e0);
  }
}

/** A copy of a token's vector for each expert that it chose. */
export const permute = op({
  name: "permute",
  sig: "x[B,S,D] p[B,S,E] -> r[B~S~E,D]",
  rows: chosen,
  cpu({ x, r }, d, place) {
    const { D } = d;
    eachRow(d, place, (row, t) => r.set(x.subarray(t * D, t * D + D), row * D));
  },
  grad: ({ p }, { dy }, a): Grads => ({ x: unpermute.of({ r: dy, p }, a) }),
});
/** The sum of a token's rows; of `p` only the shape is read. */
export const unpermute = op({
  name: "unpermute",
  sig: "r[B~S~E,D] p[B,S,E] -> x[B,S,D]",
  cpu({ x, r }, d, place) {
    const { D } = d;
    eachRow(d, place, (row, t) => {
      for (let c = 0; c < D; c++) x[t * D + c]! += r[row * D + c]!;
    });
  },
  grad: ({ p }, { dy }, a): Grads => ({ r: permute.of({ x: dy, p }, a) }),
});
/** The probability of each row. */
export const pack = op({
  name: "pack",
  sig: "p[B,S,E] -> r[B~S~E]",
  rows: chosen,
  cpu({ p, r }, d, place) {
    eachRow(d, place, (row, _, choice) => {
      r[row] = p[choice]!;
    });
  },
  grad: ({ p }, { dy }, a): Grads => ({ p: packGrad.of({ dy, p }, a) }),
});
/** Of `p` only the shape is read. */
export const packGrad = op({
  name: "pack_grad",
  sig: "dy[B~S~E] p[B,S,E] -> dp[B,S,E]",
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
