/** Writes the index of a Megatron data set with one sequence for each document; ../megatronIndex.ts draws its layout. */

const codes = { u16: 8, i32: 4 } as const;
const widths = { u16: 2, i32: 4 } as const;

/** Megatron Core writes u16 for vocabularies below this size (indexed_dataset.py, DType.optimal_dtype). */
const U16_VOCABULARY = 65_500;
/** Returns the type in which ids of a vocabulary are written. */
export const idTypeOf = (vocab: number): "u16" | "i32" => (vocab < U16_VOCABULARY ? "u16" : "i32");

/** Returns the header. */
export function idxHeader(dtype: "u16" | "i32", documents: number): Uint8Array {
  const header = Buffer.alloc(34);
  header.write("MMIDIDX");
  header.writeBigUInt64LE(1n, 9);
  header.writeUInt8(codes[dtype], 17);
  header.writeBigUInt64LE(BigInt(documents), 18);
  header.writeBigUInt64LE(BigInt(documents + 1), 26);
  return header;
}

/** Returns what follows the header, in parts: lengths, byte offsets, and the first sequence of each document with the end. */
export function* idxSections(dtype: "u16" | "i32", lengths: Int32Array): Generator<Uint8Array> {
  yield new Uint8Array(lengths.buffer, lengths.byteOffset, lengths.byteLength);
  let offset = 0;
  yield* numbers(lengths.length, (i) => {
    const at = offset;
    offset += (lengths[i] ?? 0) * widths[dtype];
    return at;
  });
  yield* numbers(lengths.length + 1, (i) => i);
}

/** Numbers as i64 in parts of at most 8 MiB. */
function* numbers(count: number, of: (i: number) => number): Generator<Uint8Array> {
  const most = 2 ** 20;
  for (let from = 0; from < count; from += most) {
    const part = BigInt64Array.from({ length: Math.min(most, count - from) }, (_, i) => BigInt(of(from + i)));
    yield new Uint8Array(part.buffer);
  }
}
