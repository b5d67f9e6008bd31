/** Rotary position embedding (arXiv:2104.09864): rotates pairs of channels by an angle proportional to the position of the token. */
import { BrokenInvariant } from "./invariant.ts";
import { type Grads, op } from "./op.ts";
import { positionOf } from "./positions.ts";

/** Frequency scalings for sequences longer than those of pretraining; the attribute `scaling` is an index into this list. */
export const scalings = ["none", "linear", "llama3", "yarn"] as const;

/** The attributes of an embedding without scaling. */
export const unscaled = { scaling: 0, factor: 1, original: 0, low: 0, high: 0, gain: 1 };

/**
 * Rotates `width` of the C channels of each head, beginning at channel `first`; the other channels are copied. Pair c is rotated by
 * sign · position · frequency[c] and multiplied by `gain`. A pair is (c, c + width/2), as in most models of Hugging Face, or with
 * `interleaved` (2c, 2c + 1), as in DeepSeek's models. The gradient is the rotation with the opposite sign.
 */
export const rope = op({
  name: "rope",
  sig: "x[B,S,H*C] -> y[B,S,H*C]",
  attrs: ["first", "width", "interleaved", "sign", "theta", "scaling", "factor", "original", "low", "high", "gain", "chunk", "ranks"],
  linearIn: "x",
  suffix: "grad",
  cpu({ x, y }, d, p) {
    const { cos, sin } = turns(d, p.start("S"), d.S);
    rotate(x, y, d, (t) => ({ cos, sin, at: (t % d.S) * (d.width / 2) }));
  },
  grad: (_, { dy }, a): Grads => ({ x: rope.of({ x: dy }, { ...a, sign: -a.sign! }) }),
});

/** Rotates by positions counted from the first token of a document: `documents` holds the position in the sequence of that token. */
export const ropeDocuments = op({
  name: "rope_documents",
  sig: "x[B,S,H*C] documents[B,S] -> y[B,S,H*C]",
  attrs: ["first", "width", "interleaved", "sign", "theta", "scaling", "factor", "original", "low", "high", "gain", "chunk", "ranks"],
  linearIn: "x",
  suffix: "grad",
  cpu({ x, documents, y }, d, p) {
    const positions = Float32Array.from(documents, (first, t) => positionOf(p.start("S") + (t % d.S), d.chunk, d.ranks) - first);
    const table = turns({ ...d, chunk: 0, ranks: 1 }, 0, Math.max(...positions) + 1);
    rotate(x, y, d, (t) => ({ ...table, at: positions[t]! * (d.width / 2) }));
  },
  grad: ({ documents }, { dy }, a): Grads => ({ x: ropeDocuments.of({ x: dy, documents }, { ...a, sign: -a.sign! }) }),
});

type Turns = { readonly cos: Float64Array; readonly sin: Float64Array };
type RotatedSizes = Readonly<Record<"B" | "S" | "H" | "C" | "first" | "width" | "sign" | "interleaved", number>>;

/** Rotates the heads of each token by cosines and sines from index `at` of their tables. */
function rotate(
  x: Float32Array,
  y: Float32Array,
  { B, S, H, C, first, width, sign, interleaved }: RotatedSizes,
  turnOf: (token: number) => Turns & { readonly at: number },
): void {
  const half = width / 2;
  const [step, apart] = interleaved ? [2, 1] : [1, half];
  for (let t = 0; t < B * S; t++) {
    const { cos, sin, at: turn } = turnOf(t);
    for (let h = 0; h < H; h++) {
      const head = (t * H + h) * C;
      y.set(x.subarray(head, head + first), head);
      y.set(x.subarray(head + first + width, head + C), head + first + width);
      for (let c = 0, at = head + first; c < half; c++, at += step) {
        const u = x[at]!;
        const v = x[at + apart]!;
        const si = sign * sin[turn + c]!;
        y[at] = u * cos[turn + c]! - v * si;
        y[at + apart] = v * cos[turn + c]! + u * si;
      }
    }
  }
}

/** The attributes that determine the frequencies, and those that determine the table of a shard. */
type Embedding = Readonly<Record<"width" | "theta" | "scaling" | "factor" | "original" | "low" | "high", number>>;
type Table = Embedding & Readonly<Record<"gain" | "chunk" | "ranks", number>>;

/**
 * Returns the frequency of each pair in radians per position: theta^(−2c/width), of which a share s is divided by `factor`.
 *   linear   s = 1
 *   llama3   s falls with the number of rotations of the pair within `original` tokens: 1 up to `low` rotations, 0 from `high` on
 *   yarn     s rises linearly with c, from 0 at the pair with `high` rotations to 1 at the pair with `low` rotations
 */
export function frequenciesOf({ width, theta, scaling, factor, original, low, high }: Embedding): number[] {
  const plain = Array.from({ length: width / 2 }, (_, c) => theta ** ((-2 * c) / width));
  const stretched = (part: (frequency: number, c: number) => number) =>
    plain.map((f, c) => {
      const p = Math.min(1, Math.max(0, part(f, c)));
      return f * (1 - p) + (f / factor) * p;
    });
  const kind = scalings[scaling];
  switch (kind) {
    case "none":
      return plain;
    case "linear":
      return stretched(() => 1);
    case "llama3":
      return stretched((f) => (high - (original * f) / (2 * Math.PI)) / (high - low));
    case "yarn": {
      const pairThatTurns = (times: number) => (width * Math.log(original / (times * 2 * Math.PI))) / (2 * Math.log(theta));
      const from = Math.max(Math.floor(pairThatTurns(high)), 0);
      const to = Math.min(Math.ceil(pairThatTurns(low)), width - 1);
      // if both bounds are one pair, the ramp is a step, as in Hugging Face transformers
      return stretched((_, c) => (c - from) / (from === to ? 0.001 : to - from));
    }
    case undefined:
      throw new BrokenInvariant(`rope has no scaling ${scaling}`);
    default:
      return kind satisfies never;
  }
}

/** Cache of tables, one per embedding and shard of the sequence: all layers share a table, and a process uses few. */
const tables = new Map<string, Turns>();
function turns(d: Table, start: number, count: number): Turns {
  const { width, theta, scaling, factor, original, low, high, gain, chunk, ranks } = d;
  const key = [start, count, width, theta, scaling, factor, original, low, high, gain, chunk, ranks].join(" ");
  const have = tables.get(key);
  if (have) return have;
  const frequencies = frequenciesOf(d);
  const half = frequencies.length;
  const table = { cos: new Float64Array(count * half), sin: new Float64Array(count * half) };
  for (let s = 0; s < count; s++) {
    const position = positionOf(start + s, chunk, ranks);
    for (const [c, frequency] of frequencies.entries()) {
      table.cos[s * half + c] = gain * Math.cos(position * frequency);
      table.sin[s * half + c] = gain * Math.sin(position * frequency);
    }
  }
  tables.set(key, table);
  return table;
}
