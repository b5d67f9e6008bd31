/** Conversion between float32 and narrower floats: bf16, IEEE binary16, and the 8-bit floats of the Open Compute Project. */

/** The elements of a narrow float in memory. */
export type Codes = Uint8Array | Uint16Array;

/** Converts between float32 values and the codes of a narrower float. Arrays have equal lengths. */
export interface FloatCodec {
  /** Rounds to nearest, ties to even. NaN becomes a NaN. Values beyond the largest finite one become infinite, or that one if the format has no infinity. */
  encode(out: Codes, from: Float32Array): void;
  /** Exact: each code of a narrower float is a float32 value. */
  decode(out: Float32Array, from: Codes): void;
}

/** A sign bit, then `exponent` bits, then `mantissa` bits; at most 16 together. The bias is 2^(exponent - 1) - 1. */
interface FloatFormat {
  readonly exponent: number;
  readonly mantissa: number;
  /** As in IEEE 754, the largest exponent means infinity or NaN. Otherwise only the codes with all bits set mean NaN, as in OCP's E4M3. */
  readonly infinities: boolean;
}

const FLOAT32 = { mantissa: 23, bias: 127, infinity: 0x7f800000 } as const;

/** bf16: the upper half of a float32, subnormals included. */
export const bf16Codec: FloatCodec = {
  encode(out, from) {
    const words = new Int32Array(from.buffer, from.byteOffset, from.length);
    for (let i = 0; i < out.length; i++) {
      const word = words[i]!;
      const isNan = (word & 0x7fffffff) > FLOAT32.infinity;
      out[i] = isNan ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
    }
  },
  decode(out, from) {
    const words = new Int32Array(out.buffer, out.byteOffset, out.length);
    for (let i = 0; i < from.length; i++) words[i] = from[i]! << 16;
  },
};

// Each format has a loop of its own. V8 compiles `encoded` into it with the constants of the format as literals; one loop for all formats
// would read them for each element, which takes about twice as long (1M elements, Node 20).
const f16 = roundingOf({ exponent: 5, mantissa: 10, infinities: true });
const f8e4m3 = roundingOf({ exponent: 4, mantissa: 3, infinities: false });

/** f16: IEEE binary16. */
export const f16Codec: FloatCodec = {
  encode(out, from) {
    const words = new Int32Array(from.buffer, from.byteOffset, from.length);
    for (let i = 0; i < out.length; i++) out[i] = encoded(f16, words[i]!, from[i]!);
  },
  decode: decoderOf(f16),
};

/** f8e4m3 of the Open Compute Project (OFP8): no infinity; conversions saturate, as with __NV_SATFINITE of cuda_fp8.h. */
export const f8e4m3Codec: FloatCodec = {
  encode(out, from) {
    const words = new Int32Array(from.buffer, from.byteOffset, from.length);
    for (let i = 0; i < out.length; i++) out[i] = encoded(f8e4m3, words[i]!, from[i]!);
  },
  decode: decoderOf(f8e4m3),
};

/** A format whose exponent is narrower than that of float32, with the constants of its arithmetic. */
interface Rounding extends FloatFormat {
  /** Bits of a float32 mantissa that the format does not have. */
  readonly dropped: number;
  readonly sign: number;
  readonly infinity: number;
  readonly nan: number;
  /** The code of values beyond the largest finite one. */
  readonly largest: number;
  /** The smallest normal number, in bits of float32. */
  readonly smallestNormal: number;
  /** One over the smallest subnormal. */
  readonly perUnit: number;
  /** Changes the bias, and adds just less than half a unit of the last bit that remains. */
  readonly shift: number;
}

function roundingOf(format: FloatFormat): Rounding {
  const { exponent, mantissa, infinities } = format;
  const bias = 2 ** (exponent - 1) - 1;
  const dropped = FLOAT32.mantissa - mantissa;
  const sign = 1 << (exponent + mantissa);
  const infinity = ((1 << exponent) - 1) << mantissa;
  const nan = infinities ? infinity | (1 << (mantissa - 1)) : sign - 1;
  return {
    ...{ exponent, mantissa, infinities, dropped, sign, infinity, nan },
    largest: infinities ? infinity : nan - 1,
    smallestNormal: (FLOAT32.bias + 1 - bias) << FLOAT32.mantissa,
    perUnit: 2 ** (bias - 1 + mantissa),
    shift: (1 << (dropped - 1)) - 1 - ((FLOAT32.bias - bias) << FLOAT32.mantissa),
  };
}

/** Returns the code of a value, given with its bits. */
function encoded(to: Rounding, word: number, value: number): number {
  const bits = word & 0x7fffffff;
  // A carry of the rounding into the exponent is correct. `| 0` keeps V8 from computing in floating point.
  let code = (((bits + to.shift) | 0) + ((bits >> to.dropped) & 1)) >> to.dropped;
  if (code > to.largest) code = to.largest;
  if (bits < to.smallestNormal) code = nearestEven(Math.abs(value) * to.perUnit) | 0;
  else if (bits > FLOAT32.infinity) code = to.nan;
  return ((word >> 31) & to.sign) | code;
}

function nearestEven(x: number): number {
  const down = Math.floor(x);
  return down + Number(x - down > 0.5 || (x - down === 0.5 && down % 2 === 1));
}

/** Returns a decoder that looks codes up in a table, which it computes on first use. */
function decoderOf(format: Rounding): FloatCodec["decode"] {
  let values: Float32Array | undefined;
  return (out, from) => {
    values ??= Float32Array.from({ length: 2 * format.sign }, (_, code) => decoded(format, code));
    for (let i = 0; i < from.length; i++) out[i] = values[from[i]!]!;
  };
}

function decoded({ mantissa, infinities, sign, infinity, largest, perUnit }: Rounding, code: number): number {
  const factor = (code & sign ? -1 : 1) / perUnit;
  const magnitude = code & (sign - 1);
  if (infinities && magnitude === infinity) return factor * Number.POSITIVE_INFINITY;
  if (magnitude > largest) return Number.NaN;
  const fraction = code & ((1 << mantissa) - 1);
  const power = magnitude >>> mantissa;
  return factor * (power === 0 ? fraction : (2 ** mantissa + fraction) * 2 ** (power - 1));
}
