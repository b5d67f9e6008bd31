/**
 * The memory of an export. Matrices that are transposed are collected in regions of one shared block before they are written, in the type of
 * the file; everything else passes through buffers of a fixed size that each thread uses again and again. The peak is the largest matrix in
 * the type of the file, `BESIDE`, and `PER_WRITER` for each writer.
 */
import { type Dtype, dtypes, storeValues, typedMemory } from "../../schemas/dtypes.ts";

/** Bytes of regions beside the largest one, so that several matrices are collected at once. */
export const BESIDE = 2 ** 27;
/**
 * Bytes of the buffers of a writer, if a row of a matrix is smaller than a part (hfExport.ts) and a tensor is in one file of the
 * checkpoint: a part in f32, the rest of the ranges that have digests, and the part in another type.
 */
export const PER_WRITER = 2 ** 24;

/** Bytes of the shared block from `at`. */
export interface MatrixMemory {
  readonly memory: SharedArrayBuffer;
  readonly at: number;
  readonly bytes: number;
}

/** Regions of one block of shared memory. */
export class Regions {
  readonly #memory: SharedArrayBuffer;
  /** By position. */
  readonly #taken: MatrixMemory[] = [];
  readonly #waiting: { readonly bytes: number; readonly take: (region: MatrixMemory) => void }[] = [];
  #peak = 0;

  /** `largest`: bytes of the largest region that is taken. Pages that no region has used take no memory. */
  constructor(largest: number) {
    this.#memory = new SharedArrayBuffer(Math.ceil((largest + BESIDE) / 8) * 8);
  }

  /** The most bytes that were taken at once. */
  get peak(): number {
    return this.#peak;
  }

  /** Resolves when so many bytes are free in one place. Who asks first gets first. */
  take(bytes: number): Promise<MatrixMemory> {
    if (bytes > this.#memory.byteLength) throw new Error(`rankc: a region of ${bytes} of ${this.#memory.byteLength} bytes`);
    return new Promise((take) => {
      this.#waiting.push({ bytes, take });
      this.#serve();
    });
  }

  /** Gives a region back. */
  give(region: MatrixMemory): void {
    this.#taken.splice(this.#taken.indexOf(region), 1);
    this.#serve();
  }

  #serve(): void {
    for (let [first] = this.#waiting; first; [first] = this.#waiting) {
      const region = this.#place(first.bytes);
      if (!region) return;
      this.#waiting.shift();
      first.take(region);
    }
  }

  /** Takes the first gap that is large enough. */
  #place(bytes: number): MatrixMemory | undefined {
    let at = 0;
    let n = 0;
    for (; n < this.#taken.length; n++) {
      const next = this.#taken[n];
      if (!next || next.at - at >= bytes) break;
      at = Math.ceil((next.at + next.bytes) / 8) * 8;
    }
    if (at + bytes > this.#memory.byteLength) return undefined;
    const region = { memory: this.#memory, at, bytes };
    this.#taken.splice(n, 0, region);
    this.#peak = Math.max(
      this.#peak,
      this.#taken.reduce((sum, own) => sum + own.bytes, 0),
    );
    return region;
  }
}

/** Shares of something that several take at once. Who asks first gets first. */
export class Shares {
  #free: number;
  readonly #waiting: { readonly share: number; readonly take: () => void }[] = [];

  /** `all`: how much there is. */
  constructor(all: number) {
    this.#free = all;
  }

  /** Resolves when the share, at most all there is, is free. */
  take(share: number): Promise<void> {
    return new Promise((take) => {
      this.#waiting.push({ share, take });
      this.give(0);
    });
  }

  /** Gives a share back. */
  give(share: number): void {
    this.#free += share;
    for (let [first] = this.#waiting; first && first.share <= this.#free; [first] = this.#waiting) {
      this.#waiting.shift();
      this.#free -= first.share;
      first.take();
    }
  }
}

/** Bytes of a part (hfExport.ts) in 16 bits. */
const FIRST = 2 ** 21;

/** A buffer of this thread for elements in the type of the file. */
export class EncodeBuffer {
  #buffer = new ArrayBuffer(0);

  /** Its bytes. */
  get bytes(): number {
    return this.#buffer.byteLength;
  }

  /** Returns values as elements: their own memory if they have the type, otherwise memory that is valid until the next call. */
  encode(dtype: Dtype, values: Float32Array): Uint8Array {
    const bytes = values.length * dtypes[dtype].bytes;
    if (dtype !== "f32") {
      if (this.#buffer.byteLength < bytes) this.#buffer = new ArrayBuffer(Math.max(FIRST, bytes));
      storeValues(typedMemory(dtype, this.#buffer, 0, values.length), values);
      return new Uint8Array(this.#buffer, 0, bytes);
    }
    return new Uint8Array(values.buffer, values.byteOffset, bytes);
  }
}

/** Some columns of a matrix [rows, cols], from column `first`. */
export interface Columns {
  readonly rows: number;
  readonly cols: number;
  readonly first: number;
}

/** Copies columns, which lie one after another, to their places in the matrix. `size`: bytes of an element, 2 or 4. */
export function placeColumns(from: Uint8Array, columns: Columns, size: number, to: MatrixMemory): void {
  const elements = columns.rows * columns.cols;
  if (from.length % (columns.rows * size) !== 0 || to.bytes < elements * size) throw new Error("rankc: columns do not fit their matrix");
  const [count, at] = [from.length / size, from.byteOffset];
  if (size === 2) placeWords(new Uint16Array(from.buffer, at, count), columns, new Uint16Array(to.memory, to.at, elements));
  else placeWords(new Uint32Array(from.buffer, at, count), columns, new Uint32Array(to.memory, to.at, elements));
}

/** Rows and columns of a tile, which stays in the first-level cache. */
const TILE = 64;

function placeWords(from: Uint16Array | Uint32Array, { rows, cols, first }: Columns, to: Uint16Array | Uint32Array): void {
  const count = from.length / rows;
  for (let firstRow = 0; firstRow < rows; firstRow += TILE) {
    const lastRow = Math.min(firstRow + TILE, rows);
    for (let firstCol = 0; firstCol < count; firstCol += TILE) {
      const lastCol = Math.min(firstCol + TILE, count);
      for (let r = firstRow; r < lastRow; r++) {
        let out = r * cols + first + firstCol;
        for (let c = firstCol, i = firstCol * rows + r; c < lastCol; c++, i += rows) to[out++] = from[i]!;
      }
    }
  }
}
