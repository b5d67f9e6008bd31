/** The two 16-bit floats in memory. bf16 is the upper half of a float32; f16 is IEEE binary16. Both round to nearest even; NaN stays NaN. */
import type { Dtype } from "../schemas/plan.ts";

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** Rounds into 16 bits each. */
export function narrow(dtype: Dtype, out: Uint16Array, from: Float32Array): void {
  if (dtype === "bf16") toBf16(out, from);
  else for (let i = 0; i < out.length; i++) out[i] = toF16(from[i]!);
}
export function widen(dtype: Dtype, out: Float32Array, from: Uint16Array): void {
  const words = new Uint32Array(out.buffer, out.byteOffset, out.length);
  if (dtype === "bf16") for (let i = 0; i < from.length; i++) words[i] = from[i]! << 16;
  else for (let i = 0; i < from.length; i++) out[i] = fromF16(from[i]!);
}

function toBf16(out: Uint16Array, from: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    float[0] = from[i]!;
    const b = bits[0]!;
    out[i] = (b & 0x7fffffff) > 0x7f800000 ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
}

/** 5 bits of exponent, 10 of mantissa; below 2^-14 steps of 2^-24. */
function toF16(x: number): number {
  float[0] = x;
  const sign = (bits[0]! >>> 16) & 0x8000;
  const size = Math.abs(float[0]!);
  if (Number.isNaN(x)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  const exponent = Math.max(-14, Math.floor(Math.log2(size || 2 ** -15)));
  // in steps of the last bit; rounding up may carry into the exponent, which the sum below takes along
  const steps = size / 2 ** (exponent - 10);
  const down = Math.floor(steps);
  const rest = steps - down;
  const rounded = down + Number(rest > 0.5 || (rest === 0.5 && down % 2 === 1));
  return sign | (exponent === -14 && rounded < 1024 ? rounded : (exponent + 14) * 1024 + rounded);
}
function fromF16(h: number): number {
  const sign = h & 0x8000 ? -1 : 1;
  const exponent = (h >>> 10) & 31;
  const mantissa = h & 1023;
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25));
}
