/** Conversion of the two 16-bit types. bf16 is the upper half of a float32; f16 is IEEE binary16. Rounds to nearest even; NaN stays NaN. */
import type { Dtype } from "../schemas/plan.ts";

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** Converts f32 values to bf16 or f16. */
export function encodeFloat16(dtype: Dtype, out: Uint16Array, from: Float32Array): void {
  if (dtype === "bf16") toBf16(out, from);
  else toF16(out, from);
}
/** Converts bf16 or f16 values to f32. */
export function decodeFloat16(dtype: Dtype, out: Float32Array, from: Uint16Array): void {
  const words = new Uint32Array(out.buffer, out.byteOffset, out.length);
  if (dtype === "bf16") for (let i = 0; i < from.length; i++) words[i] = from[i]! << 16;
  else fromF16(out, from);
}

function toBf16(out: Uint16Array, from: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    float[0] = from[i]!;
    const b = bits[0]!;
    out[i] = (b & 0x7fffffff) > 0x7f800000 ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
}

/** f16: 5 bits of exponent, 10 of mantissa; subnormals below 2^-14 are multiples of 2^-24. */
function toF16(out: Uint16Array, from: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    float[0] = from[i]!;
    const b = bits[0]! & 0x7fffffff;
    const sign = (bits[0]! >>> 16) & 0x8000;
    if (b > 0x7f800000) out[i] = 0x7e00;
    // from 65520 on
    else if (b >= 0x477ff000) out[i] = sign | 0x7c00;
    // a carry of the rounding into the exponent is correct
    else if (b >= 0x38800000) out[i] = sign | ((b - 0x38000000 + 0xfff + ((b >>> 13) & 1)) >>> 13);
    else out[i] = sign | inSteps(Math.abs(float[0]) * 2 ** 24);
  }
}
function inSteps(x: number): number {
  const down = Math.floor(x);
  return down + Number(x - down > 0.5 || (x - down === 0.5 && down % 2 === 1));
}

/** The table of all 65536 values, computed on first use. */
let known: Float32Array | undefined;
function fromF16(out: Float32Array, from: Uint16Array): void {
  known ??= Float32Array.from({ length: 65536 }, (_, h) => numberOf(h));
  for (let i = 0; i < from.length; i++) out[i] = known[from[i]!]!;
}
function numberOf(h: number): number {
  const sign = h & 0x8000 ? -1 : 1;
  const exponent = (h >>> 10) & 31;
  const mantissa = h & 1023;
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25));
}
