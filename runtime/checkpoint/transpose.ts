/** Transposes matrices of weights. */

/** Rows and columns of a tile, which stays in the first-level cache. */
const TILE = 64;

/** Writes the transpose of columns [first, end) of `from`, a matrix [rows, cols], to the beginning of `to`: a matrix [end - first, rows]. */
export function transpose(
  from: Float32Array,
  [rows, cols]: readonly [number, number],
  [first, end]: readonly [number, number],
  to: Float32Array,
): void {
  for (let firstCol = first; firstCol < end; firstCol += TILE) {
    const lastCol = Math.min(firstCol + TILE, end);
    for (let firstRow = 0; firstRow < rows; firstRow += TILE) {
      const lastRow = Math.min(firstRow + TILE, rows);
      for (let c = firstCol; c < lastCol; c++) {
        let out = (c - first) * rows + firstRow;
        for (let r = firstRow, i = firstRow * cols + c; r < lastRow; r++, i += cols) to[out++] = from[i]!;
      }
    }
  }
}
