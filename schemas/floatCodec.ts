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
export interface FloatFormat {
  readonly exponent: number;
  readonly mantissa: number;
  /** As in IEEE 754, the largest exponent means infinity or NaN. Otherwise only the codes with all bits set mean NaN, as in OCP's E4M3. */
  readonly infinities: boolean;
}

const FLOAT32 = { exponent: 8, mantissa: 23, bias: 127, infinity: 0x7f800000 } as const;

/** Returns the codec of a format. */
export const floatCodec = (format: FloatFormat): FloatCodec =>
  format.exponent === FLOAT32.exponent ? upperBits(format) : smallFloat(format);

/** A format with the exponent of float32 consists of its upper bits, subnormals included. */
function upperBits({ mantissa }: FloatFormat): FloatCodec {
  const dropped = FLOAT32.mantissa - mantissa;
  const justBelowHalf = (1 << (dropped - 1)) - 1;
  const quiet = 1 << (mantissa - 1);
  return {
    encode(out, from) {
      const words = new Int32Array(from.buffer, from.byteOffset, from.length);
      for (let i = 0; i < out.length; i++) {
        const word = words[i]!;
        const isNan = (word & 0x7fffffff) > FLOAT32.infinity;
        out[i] = isNan ? (word >>> dropped) | quiet : (word + justBelowHalf + ((word >>> dropped) & 1)) >>> dropped;
      }
    },
    decode(out, from) {
      const words = new Int32Array(out.buffer, out.byteOffset, out.length);
      for (let i = 0; i < from.length; i++) words[i] = from[i]! << dropped;
    },
  };
}

function smallFloat({ exponent, mantissa, infinities }: FloatFormat): FloatCodec {
  const bias = 2 ** (exponent - 1) - 1;
  const dropped = FLOAT32.mantissa - mantissa;
  const signAt = exponent + mantissa;
  const infinity = ((1 << exponent) - 1) << mantissa;
  const nan = infinities ? infinity | (1 << (mantissa - 1)) : (1 << signAt) - 1;
  const largest = infinities ? infinity : nan - 1;
  const smallestNormal = (FLOAT32.bias + 1 - bias) << FLOAT32.mantissa;
  /** One over the smallest subnormal. */
  const perUnit = 2 ** (bias - 1 + mantissa);
  /** Changes the bias, and adds just less than half a unit of the last bit that remains. */
  const shift = (1 << (dropped - 1)) - 1 - ((FLOAT32.bias - bias) << FLOAT32.mantissa);

  const decoded = (code: number): number => {
    const sign = code >>> signAt ? -1 : 1;
    const magnitude = code & ((1 << signAt) - 1);
    if (infinities && magnitude === infinity) return sign * Number.POSITIVE_INFINITY;
    if (magnitude > largest) return Number.NaN;
    const fraction = code & ((1 << mantissa) - 1);
    const power = magnitude >>> mantissa;
    return (sign * (power === 0 ? fraction : (2 ** mantissa + fraction) * 2 ** (power - 1))) / perUnit;
  };
  /** The value of each code, computed on first use. */
  let values: Float32Array | undefined;

  return {
    encode(out, from) {
      const words = new Int32Array(from.buffer, from.byteOffset, from.length);
      for (let i = 0; i < out.length; i++) {
        const word = words[i]!;
        const bits = word & 0x7fffffff;
        // A carry of the rounding into the exponent is correct. `| 0` keeps V8 from computing in floating point.
        let code = (((bits + shift) | 0) + ((bits >> dropped) & 1)) >> dropped;
        if (code > largest) code = largest;
        if (bits < smallestNormal) code = nearestEven(Math.abs(from[i]!) * perUnit) | 0;
        else if (bits > FLOAT32.infinity) code = nan;
        out[i] = ((word >> 31) & (1 << signAt)) | code;
      }
    },
    decode(out, from) {
      values ??= Float32Array.from({ length: 2 << signAt }, (_, code) => decoded(code));
      for (let i = 0; i < from.length; i++) out[i] = values[from[i]!]!;
    },
  };
}

function nearestEven(x: number): number {
  const down = Math.floor(x);
  return down + Number(x - down > 0.5 || (x - down === 0.5 && down % 2 === 1));
}
