/** A dense model with multi-token prediction in plain loops, token by token, by the formulas of the papers: no op of the table, no pass. */
import type { Job } from "../../schemas/job.ts";
import type { Weights } from "./slopes.ts";

type Vector = readonly number[];
const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number => Array.from(a).reduce((sum, x, i) => sum + x * b[i]!, 0);
const plus = (a: Vector, b: Vector): Vector => a.map((x, i) => x + b[i]!);

/** Φ(x) by Simpson's rule on the density of the normal distribution: another method than that of the ops. */
function normal(x: number): number {
  const n = 400;
  const density = (t: number): number => Math.exp((-t * t) / 2) / Math.sqrt(2 * Math.PI);
  const weights = (i: number): number => (i === 0 || i === n ? 1 : i % 2 === 1 ? 4 : 2);
  return 0.5 + (x / n / 3) * Array.from({ length: n + 1 }, (_, i) => weights(i) * density((x * i) / n)).reduce((a, b) => a + b);
}
const geluTanh = (x: number): number => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

/** The activation function of the gate, or of the only product: silu, gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2), … */
export const activations: Readonly<Record<Job["model"]["activation"], (x: number) => number>> = {
  swiglu: (x) => x / (1 + Math.exp(-x)),
  geglu: geluTanh,
  quick_geglu: (x) => x / (1 + Math.exp(-1.702 * x)),
  gelu: (x) => x * normal(x),
  gelu_tanh: geluTanh,
  squared_relu: (x) => Math.max(0, x) ** 2,
};

/** The mean cross-entropy of the next token, and of the k-th after it for each depth; rows of ids of seq + 1 tokens. */
export function plainLosses({ model: m }: Job, weights: Weights, rows: readonly (readonly number[])[]): { loss: number; depths: number[] } {
  const D = m.hidden;
  const w = (name: string) => weights.get(name)!.data;
  const norm = (name: string, x: Vector): Vector => {
    const root = Math.sqrt(dot(x, x) / x.length + m.norm.eps);
    return x.map((v, i) => (v / root) * w(name)[i]!);
  };
  /** Weights are [in, out]. */
  const times = (name: string, x: Vector): Vector => {
    const out = w(name).length / x.length;
    return Array.from({ length: out }, (_, o) => x.reduce((sum, v, i) => sum + v * w(name)[i * out + o]!, 0));
  };
  const embedding = (id: number): Vector => Array.from(w("embed").subarray(id * D, (id + 1) * D));
  /** Channel c turns with channel c + half. */
  const turned = (x: Vector, position: number): Vector => {
    const half = x.length / 2;
    const angle = (c: number) => position * m.rope.theta ** (-(c % half) / half);
    return x.map((v, c) => v * Math.cos(angle(c)) + (c < half ? -x[c + half]! : x[c - half]!) * Math.sin(angle(c)));
  };
  const heads = (x: Vector): Vector[] =>
    Array.from({ length: x.length / m.head_dim }, (_, h) => x.slice(h * m.head_dim, (h + 1) * m.head_dim));
  const attention = (at: string, xs: readonly Vector[]): Vector[] => {
    const q = xs.map((x, t) => heads(times(`${at}.wq`, x)).map((h) => turned(h, t)));
    const k = xs.map((x, t) => heads(times(`${at}.wk`, x)).map((h) => turned(h, t)));
    const v = xs.map((x) => heads(times(`${at}.wv`, x)));
    return xs.map((_, t) =>
      times(
        `${at}.wo`,
        q[t]!.flatMap((own, h) => {
          const kv = Math.floor((h * m.kv_heads) / m.heads);
          const scores = k.slice(0, t + 1).map((key) => Math.exp(dot(own, key[kv]!) / Math.sqrt(m.head_dim)));
          const all = scores.reduce((a, b) => a + b, 0);
          return own.map((_, c) => scores.reduce((sum, s, u) => sum + (s / all) * v[u]![kv]![c]!, 0));
        }),
      ),
    );
  };
  const layer = (at: string, xs: readonly Vector[]): Vector[] => {
    const mixed = attention(
      at,
      xs.map((x) => norm(`${at}.norm1`, x)),
    );
    return xs.map((x, t) => {
      const y = plus(x, mixed[t]!);
      const h = norm(`${at}.norm2`, y);
      const active = times(`${at}.w1`, h).map(activations[m.activation]);
      const up = weights.has(`${at}.w3`) ? times(`${at}.w3`, h) : active.map(() => 1);
      const inner = active.map((g, i) => g * up[i]!);
      return plus(y, times(`${at}.w2`, inner));
    });
  };
  const crossEntropy = (y: Vector, label: number): number => {
    const logits = m.tie_embeddings ? Array.from({ length: m.vocab }, (_, v) => dot(y, embedding(v))) : times("head", y);
    return Math.log(logits.reduce((sum, x) => sum + Math.exp(x), 0)) - logits[label]!;
  };
  const n = m.mtp!.layers;
  const sums = Array.from({ length: 1 + n }, () => ({ sum: 0, count: 0 }));
  const learn = (k: number, y: Vector, label: number): void => {
    sums[k]!.sum += crossEntropy(y, label);
    sums[k]!.count++;
  };
  for (const row of rows) {
    const S = row.length - 1;
    let xs = row.slice(0, S).map(embedding);
    for (let i = 0; i < m.layers; i++) xs = layer(`layers.${i}`, xs) as Vector[];
    let ys = xs.map((x) => norm("norm", x));
    for (const [t, y] of ys.entries()) learn(0, y, row[t + 1]!);
    for (let k = 1; k <= n; k++) {
      const at = `mtp.${k - 1}`;
      // no token that has k more after it sees one that has not
      const some = ys.slice(0, S - k);
      const both = some.map((y, t) => times(`${at}.proj`, [...norm(`${at}.enorm`, embedding(row[t + k]!)), ...norm(`${at}.hnorm`, y)]));
      ys = layer(at, both).map((x) => norm(`${at}.norm`, x));
      for (const [t, y] of ys.entries()) learn(k, y, row[t + k + 1]!);
    }
  }
  const [loss, ...depths] = sums.map(({ sum, count }) => sum / count);
  return { loss: loss!, depths };
}
