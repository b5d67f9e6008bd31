/**
 * Ops that stand for several instructions of a program (src/passes/fuse.ts). A target whose kernels include them runs them in place of
 * those instructions; no graph has them, so they have no gradient.
 */
import { gemm as product, runs } from "./loops.ts";
import { op } from "./op.ts";

/** The sum of the input gradients of two products of one input: dx = Σ dyᵢ·wᵢᵀ, rounded once. Sharding one depth alone would count the other twice. */
export const gemmDgradPair = op({
  name: "gemm_dgrad_pair",
  sig: "dy1[B,S,N!] w1[K,N!] dy2[B,S,F!] w2[K,F!] -> dx[B,S,K]",
  suffix: "dgrad",
  flops: ({ B, S, K, N, F }) => 2 * B * S * K * (N + F),
  cpu({ dy1, w1, dy2, w2, dx }, { B, S, K, N, F }) {
    product(dx, dy1, w1, { m: B * S, n: K, k: N, tb: true });
    product(dx, dy2, w2, { m: B * S, n: K, k: F, tb: true });
  },
});
/** The same of three products, as those of queries, keys and values. */
export const gemmDgradTriple = op({
  name: "gemm_dgrad_triple",
  sig: "dy1[B,S,N!] w1[K,N!] dy2[B,S,F!] w2[K,F!] dy3[B,S,D!] w3[K,D!] -> dx[B,S,K]",
  suffix: "dgrad",
  flops: ({ B, S, K, N, F, D }) => 2 * B * S * K * (N + F + D),
  cpu({ dy1, w1, dy2, w2, dy3, w3, dx }, { B, S, K, N, F, D }) {
    product(dx, dy1, w1, { m: B * S, n: K, k: N, tb: true });
    product(dx, dy2, w2, { m: B * S, n: K, k: F, tb: true });
    product(dx, dy3, w3, { m: B * S, n: K, k: D, tb: true });
  },
});
/** The same of two products of the rows of experts. */
export const groupedDgradPair = op({
  name: "grouped_dgrad_pair",
  sig: "dy1[B~S~E,N!] w1[E,K,N!] dy2[B~S~E,F!] w2[E,K,F!] -> dx[B~S~E,K]",
  suffix: "dgrad",
  flops: ({ R, K, N, F }) => 2 * R * K * (N + F),
  cpu({ dy1, w1, dy2, w2, dx }, { K, N, F }, p) {
    runs(p.rows, p.start("E"), (e, r, m) => {
      product(dx, dy1, w1, { m, n: K, k: N, tb: true, a0: r * N, b0: e * K * N, c0: r * K });
      product(dx, dy2, w2, { m, n: K, k: F, tb: true, a0: r * F, b0: e * K * F, c0: r * K });
    });
  },
});
