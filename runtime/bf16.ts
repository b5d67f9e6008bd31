/** bfloat16: the upper half of a float32, rounded to nearest even; NaN stays NaN. */
const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

export function toBf16(out: Uint16Array, from: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    float[0] = from[i]!;
    const b = bits[0]!;
    out[i] = (b & 0x7fffffff) > 0x7f800000 ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
}

export function fromBf16(out: Float32Array, from: Uint16Array): void {
  const words = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < from.length; i++) words[i] = from[i]! << 16;
}
