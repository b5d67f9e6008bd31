/**
 * The parts of files that a rank's shards consist of. A piece is a matrix of a file that becomes part of a shard, maybe transposed. Reads
 * are the byte ranges that hold pieces: neighbours are joined, and what no piece needs is left out where that saves a read.
 */
import type { ElementPiece, ShardBox } from "../backend.ts";
import { type Ranges, shardBox } from "../shards.ts";
import type { TensorSlice } from "./hfLayout.ts";

/** Where the bytes of a tensor are. */
export interface TensorPlace {
  readonly path: string;
  readonly name: string;
  /** The element type, as safetensors names it. */
  readonly dtype: string;
  /** The first byte in the file. */
  readonly start: number;
}

/** A piece of a tensor in a file, from element `at` on. */
export interface FilePiece extends ElementPiece {
  readonly tensor: TensorPlace;
  readonly at: number;
}

/** Returns the pieces of a shard of a parameter, whose tensors have the blocks of hfLayout.ts. `sizes`: of the whole parameter. */
export function piecesOf(
  parts: readonly TensorSlice[],
  sizes: readonly number[],
  ranges: Ranges,
  placeOf: (tensor: string) => TensorPlace,
): FilePiece[] {
  const box = shardBox(sizes, ranges);
  return parts.flatMap(({ tensor, blocks }) => {
    const place = placeOf(tensor);
    return blocks.flatMap((block) => (block.rows === 1 ? plain(place, block.there, box) : transposed(place, block, sizes, ranges)));
  });
}

/** The pieces of a parameter that the file holds as it is, one for each plane of the shard. */
function plain(tensor: TensorPlace, there: number, { rows, height, width, rowStride, planeStride, base }: ShardBox): FilePiece[] {
  return Array.from({ length: rows / height }, (_, plane) => ({
    ...{ tensor, at: there + base + plane * planeStride, rows: height, columns: width, stride: rowStride },
    ...{ to: plane * height * width, rowStep: width, columnStep: 1 },
  }));
}

/** The piece of one matrix [rows, cols] of a file that is [cols, rows] in the parameter, at element `here`; none if another rank has the expert. */
function transposed(
  tensor: TensorPlace,
  { there, here, rows, cols }: TensorSlice["blocks"][number],
  sizes: readonly number[],
  ranges: Ranges,
): FilePiece[] {
  const [[inputs], [outputs]] = [ranges.at(-2) ?? [], ranges.at(-1) ?? []];
  if (sizes.at(-2) !== cols || sizes.at(-1) !== rows || !inputs || !outputs)
    throw new Error(`rankc: ${tensor.name} is no matrix of the parameter`);
  const expert = here / (rows * cols);
  const [experts = [0, 1] as const] = sizes.length === 3 ? (ranges[0] ?? []) : [];
  if (expert < experts[0] || expert >= experts[1]) return [];
  const [height, width] = [inputs[1] - inputs[0], outputs[1] - outputs[0]];
  return [
    {
      ...{ tensor, at: there + outputs[0] * cols + inputs[0], rows: width, columns: height, stride: cols },
      ...{ to: (expert - experts[0]) * height * width, rowStep: 1, columnStep: width },
    },
  ];
}

/** A byte range of a file, and the pieces in it; `offset`: the first byte of a piece within the range. */
export interface ReadRange<T> {
  readonly path: string;
  readonly from: number;
  readonly bytes: number;
  readonly pieces: readonly { readonly piece: FilePiece; readonly offset: number; readonly of: T }[];
}

/** Bytes that are read and not used rather than begin another read. */
const GAP = 2 ** 16;

/** Returns the reads for these pieces, in the order of the files, each of at most `most` bytes. */
export function readsFor<T>(
  pieces: readonly { readonly piece: FilePiece; readonly of: T }[],
  bytesOf: (piece: FilePiece) => number,
  most: number,
): ReadRange<T>[] {
  const split = pieces.flatMap(({ piece, of }) => rowsWithin(piece, bytesOf(piece), most).map((part) => ({ ...part, of })));
  const paths = new Map([...new Set(split.map(({ piece }) => piece.tensor.path))].map((path, n) => [path, n]));
  split.sort((a, b) => paths.get(a.piece.tensor.path)! - paths.get(b.piece.tensor.path)! || a.from - b.from);
  const reads: { path: string; from: number; bytes: number; pieces: { piece: FilePiece; offset: number; of: T }[] }[] = [];
  for (const { piece, from, bytes, of } of split) {
    const { path } = piece.tensor;
    const last = reads.at(-1);
    const end = last ? last.from + last.bytes : 0;
    if (last && last.path === path && from <= end + GAP && from + bytes - last.from <= most) {
      last.pieces.push({ piece, offset: from - last.from, of });
      last.bytes = Math.max(last.bytes, from + bytes - last.from);
    } else reads.push({ path, from, bytes, pieces: [{ piece, offset: 0, of }] });
  }
  return reads;
}

/** Splits a piece into groups of rows whose bytes are within the limit; rows far apart are read one by one. A row above the limit is split. */
function rowsWithin(piece: FilePiece, bytes: number, most: number): { piece: FilePiece; from: number; bytes: number }[] {
  const { rows, columns, stride } = piece;
  if (columns * bytes > most) {
    const width = Math.floor(most / bytes);
    const starts = Array.from({ length: Math.ceil(columns / width) }, (_, n) => n * width);
    return starts.flatMap((start) =>
      rowsWithin(
        { ...piece, at: piece.at + start, columns: Math.min(width, columns - start), to: piece.to + start * piece.columnStep },
        bytes,
        most,
      ),
    );
  }
  const isSparse = (stride - columns) * bytes > GAP;
  const each = isSparse ? 1 : Math.max(1, Math.floor((most / bytes - columns) / stride) + 1);
  return Array.from({ length: Math.ceil(rows / each) }, (_, n) => {
    const first = n * each;
    const count = Math.min(each, rows - first);
    const part = { ...piece, at: piece.at + first * stride, rows: count, to: piece.to + first * piece.rowStep };
    return { piece: part, from: piece.tensor.start + part.at * bytes, bytes: ((count - 1) * stride + columns) * bytes };
  });
}
