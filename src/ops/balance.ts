/** What keeps tokens spread over the experts: counts of the choices of each microbatch of P sequences, and losses on them. */
import { type Grads, op } from "./op.ts";

/** How many tokens of each microbatch chose each expert. */
export const tally = op({
  name: "tally",
  sig: "c[A*P,S,E] -> n[A,E]",
  types: { n: "f32" },
  cpu({ c, n }, { P, S, E }) {
    for (let i = 0; i < c.length; i++) n[Math.floor(i / (P * S * E)) * E + (i % E)]! += c[i]!;
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
