/**
 * What is random in a step: dropout, and jitter of a router's input. The bits are Philox's under a key of the job's seed and the site,
 * at a counter that says which element of all it is: its sequence since the run began, its position there, and its channel, or head and
 * key. So they do not depend on the mesh, on microbatches or on when an op runs: backward, and a forward that is repeated, make them again.
 */
import { type Attrs, type Grads, op, type ShardContext } from "./op.ts";
import { keyOf, philox } from "./philox.ts";
import { positionOf } from "./positions.ts";

/** The key of a site, as attributes; one kernel serves all sites, and is told it at launch. */
export function siteOf(seed: number, name: string): { readonly key0: number; readonly key1: number } {
  const [key0, key1] = keyOf(seed, name);
  return { key0, key1 };
}
export const runtimeAttrs = ["key0", "key1"] as const;

/** A word below `threshold`, of 2^32, drops its element; what is kept grows by `factor`, so that the mean stays. */
export const dropsOf = (drop: number): { readonly threshold: number; readonly factor: number } => ({
  threshold: Math.min(2 ** 32 - 1, Math.round(drop * 2 ** 32)),
  factor: 1 / (1 - drop),
});

/** Channel c of a token is word c % 4 at counter (sequence, position, c / 4, 0). */
function eachWord(
  sample: Float32Array,
  { B, S, D, ...d }: Readonly<Record<"B" | "S" | "D", number>> & Attrs,
  p: ShardContext,
  visit: (i: number, word: number) => void,
): void {
  const words = new Uint32Array(4);
  for (let t = 0; t < B * S; t++) {
    const position = positionOf(p.start("S") + (t % S), d.chunk!, d.ranks!);
    for (let c = 0; c < D; c++) {
      if (c % 4 === 0) philox(words, sample[Math.floor(t / S)]!, position, c / 4, 0, d.key0!, d.key1!);
      visit(t * D + c, words[c % 4]!);
    }
  }
}

/** `drop`: the probability. `chunk` and `ranks` say how tokens lie (positions.ts). Linear in x: its gradient is itself, with the same bits. */
export const dropout = op({
  name: "dropout",
  sig: "x[B,S,D!] sample[B] -> y[B,S,D!]",
  runtimeAttrs,
  suffix: "grad",
  cpu({ x, sample, y }, d, p) {
    const { threshold, factor } = dropsOf(d.drop!);
    eachWord(sample, d, p, (i, word) => {
      y[i] = word < threshold ? 0 : x[i]! * factor;
    });
  },
  grad: ({ sample }, { dy }, a): Grads => ({ x: dropout.of({ x: dy, sample }, a) }),
});

/** y = x·u with u uniform from 1 − eps to 1 + eps, of the upper 24 bits of a word: exact in f32. */
export const jitter = op({
  name: "jitter",
  sig: "x[B,S,D!] sample[B] -> y[B,S,D!]",
  runtimeAttrs,
  suffix: "grad",
  cpu({ x, sample, y }, d, p) {
    eachWord(sample, d, p, (i, word) => {
      y[i] = x[i]! * (1 + d.eps! * ((word >>> 8) * 2 ** -23 - 1));
    });
  },
  grad: ({ sample }, { dy }, a): Grads => ({ x: jitter.of({ x: dy, sample }, a) }),
});
