/**
 * Random ops of a step: dropout, and jitter of the router's input. The bits come from Philox. The key is made of the job's seed and the site;
 * the counter identifies the element globally: sequence since the start of the run, position, and channel (or head and key). The bits thus
 * do not depend on the mesh, on microbatches or on the time of execution: backward and recomputed forward ops reproduce them. These ops have no
 * formula (formula.ts): a word depends on coordinates, and four channels share one call of Philox, which each language writes in its own way.
 */
import { type Grads, op, type ShardContext } from "./op.ts";
import { keyOf, philox } from "./philox.ts";
import { positionOf } from "./positions.ts";

/** Returns the Philox key of a site as attributes. Kernels receive it at launch, so one kernel serves all sites. */
export function siteOf(seed: number, name: string): { readonly key0: number; readonly key1: number } {
  const [key0, key1] = keyOf(seed, name);
  return { key0, key1 };
}
/** Names of the attributes of `siteOf`. */
export const runtimeAttrs = ["key0", "key1"] as const;

/** Returns `threshold` and `factor` for a drop probability: an element with a 32-bit word below `threshold` is dropped; kept elements are multiplied by `factor`, which preserves the mean. */
export const dropsOf = (drop: number): { readonly threshold: number; readonly factor: number } => ({
  threshold: Math.min(2 ** 32 - 1, Math.round(drop * 2 ** 32)),
  factor: 1 / (1 - drop),
});

/** Visits each element with its word: channel c of a token uses word c % 4 at counter (sequence, position, c / 4, 0). */
function eachWord(
  sample: Float32Array,
  { B, S, D, ...d }: Readonly<Record<"B" | "S" | "D" | "chunk" | "ranks" | "key0" | "key1", number>>,
  p: ShardContext,
  visit: (i: number, word: number) => void,
): void {
  const words = new Uint32Array(4);
  for (let t = 0; t < B * S; t++) {
    const position = positionOf(p.start("S") + (t % S), d.chunk, d.ranks);
    for (let c = 0; c < D; c++) {
      if (c % 4 === 0) philox(words, sample[Math.floor(t / S)]!, position, c / 4, 0, d.key0, d.key1);
      visit(t * D + c, words[c % 4]!);
    }
  }
}

/** `drop` is the probability; `chunk` and `ranks` give the order of tokens (positions.ts). The op is linear in x: its gradient is the same op with the same bits. */
export const dropout = op({
  name: "dropout",
  sig: "x[B,S,D!] sample[B] -> y[B,S,D!]",
  attrs: ["drop", "chunk", "ranks"],
  runtimeAttrs,
  suffix: "grad",
  cpu({ x, sample, y }, d, p) {
    const { threshold, factor } = dropsOf(d.drop);
    eachWord(sample, d, p, (i, word) => {
      y[i] = word < threshold ? 0 : x[i]! * factor;
    });
  },
  grad: ({ sample }, { dy }, a): Grads => ({ x: dropout.of({ x: dy, sample }, a) }),
});

/** y = x·u with u uniform in [1 − eps, 1 + eps), made from the upper 24 bits of a word, which f32 represents exactly. */
export const jitter = op({
  name: "jitter",
  sig: "x[B,S,D!] sample[B] -> y[B,S,D!]",
  attrs: ["eps", "chunk", "ranks"],
  runtimeAttrs,
  suffix: "grad",
  cpu({ x, sample, y }, d, p) {
    eachWord(sample, d, p, (i, word) => {
      y[i] = x[i]! * (1 + d.eps * ((word >>> 8) * 2 ** -23 - 1));
    });
  },
  grad: ({ sample }, { dy }, a): Grads => ({ x: jitter.of({ x: dy, sample }, a) }),
});
