/**
 * TensorBoard event files: TFRecords of protobuf messages. Only what scalars and histograms need is written; the messages are those of
 * tensorflow/core/util/event.proto and summary.proto.
 */

/** A number, or the distribution of numbers, under a tag. */
export type LoggedValue =
  | { readonly tag: string; readonly value: number }
  | { readonly tag: string; readonly values: readonly number[]; readonly buckets?: number };

/** Returns the record that begins an event file. */
export const firstRecord = (seconds: number): Uint8Array => record(message(double(1, seconds), bytes(3, utf8("brain.Event:2"))));

/** Returns the record of the summaries of a step. */
export const stepRecord = (seconds: number, step: number, summaries: readonly LoggedValue[]): Uint8Array =>
  record(message(double(1, seconds), varint(2, step), bytes(5, message(...summaries.map((s) => bytes(1, summaryValue(s)))))));

function summaryValue(summary: LoggedValue): Uint8Array {
  const plugin = (name: string): Uint8Array => bytes(9, message(bytes(1, message(bytes(1, utf8(name))))));
  const tag = bytes(1, utf8(summary.tag));
  if ("value" in summary) return message(tag, float(2, summary.value), plugin("scalars"));
  return message(tag, bytes(5, histogramOf(summary.values, summary.buckets ?? 30)), plugin("histograms"));
}

/** HistogramProto with buckets of equal width. The first bucket ends at the minimum and is empty, because it has no left edge. */
function histogramOf(values: readonly number[], count: number): Uint8Array {
  const finite = values.filter(Number.isFinite);
  const low = finite.length > 0 ? Math.min(...finite) : 0;
  const high = finite.length > 0 ? Math.max(...finite) : 0;
  const width = (high - low || 1) / count;
  const counts = new Float64Array(count + 1);
  for (const x of finite) {
    const bucket = 1 + Math.min(count - 1, Math.floor((x - low) / width));
    counts[bucket] = (counts[bucket] ?? 0) + 1;
  }
  const limits = Float64Array.from(counts, (_, i) => low + i * width);
  const sum = finite.reduce((a, b) => a + b, 0);
  const squares = finite.reduce((a, b) => a + b * b, 0);
  return message(
    ...[double(1, low), double(2, high), double(3, finite.length), double(4, sum), double(5, squares)],
    ...[bytes(6, doubles(limits)), bytes(7, doubles(counts))],
  );
}

// -- protobuf

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);
const message = (...parts: readonly Uint8Array[]): Uint8Array => Buffer.concat(parts);

function unsigned(value: number): number[] {
  const out: number[] = [];
  for (let left = value; ; left = Math.floor(left / 128)) {
    if (left < 128) return [...out, left];
    out.push((left % 128) | 128);
  }
}
const fieldHeader = (field: number, wire: 0 | 1 | 2 | 5): number[] => unsigned(8 * field + wire);
const varint = (field: number, value: number): Uint8Array => Uint8Array.from([...fieldHeader(field, 0), ...unsigned(value)]);
const bytes = (field: number, content: Uint8Array): Uint8Array =>
  message(Uint8Array.from([...fieldHeader(field, 2), ...unsigned(content.length)]), content);
const double = (field: number, value: number): Uint8Array =>
  message(Uint8Array.from(fieldHeader(field, 1)), doubles(Float64Array.of(value)));
const float = (field: number, value: number): Uint8Array =>
  message(Uint8Array.from(fieldHeader(field, 5)), new Uint8Array(Float32Array.of(value).buffer));
const doubles = (values: Float64Array): Uint8Array => new Uint8Array(values.buffer);

// -- TFRecord

const table = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc;
});
/** CRC-32C (Castagnoli). */
export function crc32c(content: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of content) crc = (table[(crc ^ byte) & 0xff] ?? 0) ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
/** The checksum of a TFRecord: rotated, so that data which holds checksums has another one. */
const masked = (content: Uint8Array): number => {
  const crc = crc32c(content);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
};

/** A TFRecord: length, its checksum, content, its checksum. */
function record(content: Uint8Array): Uint8Array {
  const out = Buffer.alloc(content.length + 16);
  out.writeBigUInt64LE(BigInt(content.length), 0);
  out.writeUInt32LE(masked(out.subarray(0, 8)), 8);
  out.set(content, 12);
  out.writeUInt32LE(masked(content), 12 + content.length);
  return out;
}
