/** Transposes matrices of weights. */

/** Rows and columns of a tile, which stays in the first-level cache. */
const TILE = 64;

/** Writes the transpose of `from`, a matrix [rows, cols], to `to` from index `at`. */
export function transpose(from: Float32Array, rows: number, cols: number, to: Float32Array, at: number): void {
  for (let firstCol = 0; firstCol < cols; firstCol += TILE) {
    const lastCol = Math.min(firstCol + TILE, cols);
    for (let firstRow = 0; firstRow < rows; firstRow += TILE) {
      const lastRow = Math.min(firstRow + TILE, rows);
      for (let c = firstCol; c < lastCol; c++) {
        let out = at + c * rows + firstRow;
        for (let r = firstRow, i = firstRow * cols + c; r < lastRow; r++, i += cols) to[out++] = from[i]!;
      }
    }
  }
}
