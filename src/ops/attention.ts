/** Causal grouped-query attention and rotary positions. A query's position is global, whatever piece of the sequence is here. */
import { type Grads, op } from "./op.ts";

/** Pairs (c, c + C/2) turn by sign · position · theta^(−2c/C), as in Hugging Face's models; the gradient turns back. */
export const rope = op({
  name: "rope",
  sig: "x[B,S,H*C] -> y[B,S,H*C]",
  suffix: "grad",
  cpu({ x, y }, { B, S, H, C, theta, sign }, p) {
    const half = C / 2;
    const { cos, sin } = turns(p.start("S"), S, C, theta!);
    for (let t = 0; t < B * S; t++) {
      const turn = (t % S) * half;
      for (let h = 0; h < H; h++) {
        const at = (t * H + h) * C;
        for (let c = 0; c < half; c++) {
          const u = x[at + c]!;
          const v = x[at + half + c]!;
          const si = sign! * sin[turn + c]!;
          y[at + c] = u * cos[turn + c]! - v * si;
          y[at + half + c] = v * cos[turn + c]! + u * si;
        }
      }
    }
  },
  grad: (_, { dy }, a): Grads => ({ x: rope.of({ x: dy }, { ...a, sign: -a.sign! }) }),
});
/** One table per piece of the sequence: a process runs few of them, all layers share them. */
const tables = new Map<string, { cos: Float64Array; sin: Float64Array }>();
function turns(start: number, count: number, C: number, theta: number) {
  const key = `${start} ${count} ${C} ${theta}`;
  const have = tables.get(key);
  if (have) return have;
  const half = C / 2;
  const table = { cos: new Float64Array(count * half), sin: new Float64Array(count * half) };
  for (let c = 0; c < half; c++) {
    const frequency = theta ** ((-2 * c) / C);
    for (let s = 0; s < count; s++) {
      table.cos[s * half + c] = Math.cos((start + s) * frequency);
      table.sin[s * half + c] = Math.sin((start + s) * frequency);
    }
  }
  tables.set(key, table);
  return table;
}

/** Query head g·M + m reads key head g; scores are q·k/√C. `lse` is the log-sum-exp of a query's scores, kept for the gradient. */
export const attention = op({
  name: "attention",
  sig: "q[B,S,G*M*C] k[B,U!,G*C] v[B,U!,G*C] -> o[B,S,G*M*C] lse[B,S,G*M]",
  types: { lse: "f32" },
  // two products of 2·S·U·C per head, of which causality leaves half
  flops: ({ B, S, U, G, M, C }) => (2 * 2 * B * S * U * G * M * C) / 2,
  cpu({ q, k, v, o, lse }, d, p) {
    const { G, C } = d;
    const sum = new Float64Array(C);
    attend(q, k, d, p.start("S"), (weight, visible, iq, ik, log) => {
      lse[iq / C] = log;
      sum.fill(0);
      for (let u = 0, at = ik; u < visible; u++, at += G * C) {
        const w = weight[u]!;
        for (let c = 0; c < C; c++) sum[c]! += w * v[at + c]!;
      }
      for (let c = 0; c < C; c++) o[iq + c] = sum[c]!;
    });
  },
  grad({ q, k, v }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionGrad.all({ q, k, v, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
/**
 * With weights w = exp(score − lse) of one query: dv = w·dy; dw = dy·v; the softmax takes ds = w·(dw − Σ w·dw), and Σ w·dw = o·dy;
 * dq = Σ ds·k/√C, dk = ds·q/√C.
 */
export const attentionGrad = op({
  name: "attention_grad",
  sig: "q[B,S,G*M*C] k[B,U!,G*C] v[B,U!,G*C] o[B,S,G*M*C] lse[B,S,G*M] dy[B,S,G*M*C] -> dq[B,S,G*M*C] dk[B,U!,G*C] dv[B,U!,G*C]",
  // five products: the scores once more, dw, dq, dk and dv
  flops: ({ B, S, U, G, M, C }) => (5 * 2 * B * S * U * G * M * C) / 2,
  cpu({ q, k, v, o, lse, dy, dq, dk, dv }, d, p) {
    const { B, S, U, G, M, C } = d;
    const start = p.start("S");
    const sum = new Float64Array(C);
    // many queries meet in one key: their sum is kept in double until the end
    const keys = new Float64Array(dk.length);
    const values = new Float64Array(dv.length);
    for (let h = 0; h < B * S * G * M; h++) {
      const iq = h * C;
      const token = Math.floor(h / (G * M));
      let dot = 0;
      for (let c = 0; c < C; c++) dot += dy[iq + c]! * o[iq + c]!;
      const visible = Math.min(U, start + (token % S) + 1);
      sum.fill(0);
      let at = (Math.floor(token / S) * U * G + Math.floor((h % (G * M)) / M)) * C;
      for (let u = 0; u < visible; u++, at += G * C) {
        let score = 0;
        let dw = 0;
        for (let c = 0; c < C; c++) {
          score += q[iq + c]! * k[at + c]!;
          dw += dy[iq + c]! * v[at + c]!;
        }
        const w = Math.exp(score / Math.sqrt(C) - lse[h]!);
        const ds = (w * (dw - dot)) / Math.sqrt(C);
        for (let c = 0; c < C; c++) {
          sum[c]! += ds * k[at + c]!;
          keys[at + c]! += ds * q[iq + c]!;
          values[at + c]! += w * dy[iq + c]!;
        }
      }
      for (let c = 0; c < C; c++) dq[iq + c] = sum[c]!;
    }
    dk.set(keys);
    dv.set(values);
  },
});

/** Visits each query head with the softmax weights of the keys it sees, where its own vector begins, where its first key's does, and its log-sum-exp. */
function attend(
  q: Float32Array,
  k: Float32Array,
  { B, S, U, G, M, C }: Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C", number>>,
  start: number,
  visit: (weight: Float64Array, visible: number, iq: number, ik: number, lse: number) => void,
): void {
  const weight = new Float64Array(U);
  for (let b = 0; b < B; b++)
    for (let s = 0; s < S; s++)
      for (let h = 0; h < G * M; h++) {
        const iq = ((b * S + s) * G * M + h) * C;
        const ik = (b * U * G + Math.floor(h / M)) * C;
        const visible = Math.min(U, start + s + 1);
        let max = -Infinity;
        for (let u = 0, at = ik; u < visible; u++, at += G * C) {
          let x = 0;
          for (let c = 0; c < C; c++) x += q[iq + c]! * k[at + c]!;
          weight[u] = x / Math.sqrt(C);
          max = Math.max(max, weight[u]!);
        }
        let sum = 0;
        for (let u = 0; u < visible; u++) sum += weight[u] = Math.exp(weight[u]! - max);
        for (let u = 0; u < visible; u++) weight[u]! /= sum;
        visit(weight, visible, iq, ik, max + Math.log(sum));
      }
}
