/** The matrix of communication as a pyramid: each level has the largest cell of two by two of the level below. */
import { signal } from "@preact/signals";
import type { Sheet } from "./canvas.tsx";
import { between, channels, palette, pixel } from "./palette.ts";

/** Bytes from rank (row) to rank (column), at several sizes. */
export interface TrafficMatrix {
  readonly world: number;
  readonly levels: readonly { readonly size: number; readonly cells: Float32Array }[];
  readonly most: number;
  readonly least: number;
}

/** The visible ranks: from row and column, and how many. */
export const matrixSpan = signal<{ readonly x: number; readonly y: number; readonly size: number } | undefined>(undefined);

/** Returns the pyramid of a matrix. Differences may be negative: the cell with the largest amount counts. */
export function matrixOf(cells: Float32Array, world: number): TrafficMatrix {
  const levels = [{ size: world, cells }];
  for (let last = levels[0]; last && last.size > 64; last = levels.at(-1)) {
    const { size, cells: below } = last;
    const half = Math.ceil(size / 2);
    const above = new Float32Array(half * half);
    for (let row = 0; row < size; row++)
      for (let column = 0; column < size; column++) {
        const value = below[row * size + column] ?? 0;
        if (value === 0) continue;
        const at = (row >> 1) * half + (column >> 1);
        if (Math.abs(value) > Math.abs(above[at] ?? 0)) above[at] = value;
      }
    levels.push({ size: half, cells: above });
  }
  let [most, least] = [0, Infinity];
  for (const value of cells) {
    const amount = Math.abs(value);
    if (amount > most) most = amount;
    if (amount > 0 && amount < least) least = amount;
  }
  return { world, levels, most, least: Math.min(least, most) };
}

/** Where the matrix is on its sheet: `x` and `y` give the corner of a rank. */
export interface MatrixPlace {
  readonly left: number;
  readonly top: number;
  readonly side: number;
  readonly from: { readonly x: number; readonly y: number };
  /** Pixels of a rank. */
  readonly each: number;
  readonly size: number;
}

/** Returns where the visible part stands. */
export function matrixPlace(
  world: number,
  { width, height }: { readonly width: number; readonly height: number },
  margin: number,
): MatrixPlace {
  const side = Math.max(40, Math.min(width - margin, height - margin) - 4);
  const span = matrixSpan.value ?? { x: 0, y: 0, size: world };
  return { left: margin, top: margin, side, from: { x: span.x, y: span.y }, each: side / span.size, size: span.size };
}

/** Shows ranks around a fixed one: `factor` below 1 zooms in. */
export function zoomMatrix(world: number, at: { readonly x: number; readonly y: number }, factor: number): void {
  const now = matrixSpan.peek() ?? { x: 0, y: 0, size: world };
  const size = Math.min(world, Math.max(Math.min(8, world), now.size * factor));
  showMatrix(world, at.x - ((at.x - now.x) / now.size) * size, at.y - ((at.y - now.y) / now.size) * size, size);
}

/** Shows a square of ranks, within the matrix. */
export function showMatrix(world: number, x: number, y: number, size: number): void {
  const inside = (value: number): number => Math.min(Math.max(0, value), world - size);
  matrixSpan.value = size >= world ? undefined : { x: inside(x), y: inside(y), size };
}

interface Colours {
  readonly perNode: number;
  /** Whether cells are differences. */
  readonly isDifference: boolean;
}

/** Steps of colour between the least and the largest amount. */
const STEPS = 64;

/** Draws the cells: the more bytes, the stronger the colour, on a logarithmic scale; links inside a node have another colour than those across. */
export function drawMatrix({ context, ratio }: Sheet, matrix: TrafficMatrix, place: MatrixPlace, { perNode, isDifference }: Colours): void {
  const pixels = Math.max(1, Math.round(place.side * ratio));
  const level = matrix.levels.findLast(({ size }) => (matrix.world / size) * place.each * ratio <= 1.01) ?? matrix.levels[0];
  if (!level) return;
  const image = new ImageData(pixels, pixels);
  const out = new Uint32Array(image.data.buffer);
  const colours = palette.value;
  const ramp = (to: string): Uint32Array =>
    Uint32Array.from({ length: STEPS }, (_, i) => pixel(...channels(between(between(colours.paper, to, 0.18), to, i / (STEPS - 1)))));
  const [inside, across] = isDifference ? [ramp(colours.wrong), ramp(colours.axes.edp)] : [ramp(colours.axes.pp), ramp(colours.axes.ep)];
  const empty = pixel(...channels(colours.idle));
  const [low, high] = [Math.log(Math.max(1, matrix.least)), Math.log(Math.max(2, matrix.most))];
  const scale = matrix.world / level.size;
  const cell = new Int32Array(pixels);
  const place1 = (from: number, i: number): number =>
    Math.min(level.size - 1, Math.floor((from + ((i + 0.5) * place.size) / pixels) / scale));
  for (let i = 0; i < pixels; i++) cell[i] = place1(place.from.x, i);
  for (let row = 0; row < pixels; row++) {
    const at = place1(place.from.y, row);
    const before = row > 0 ? place1(place.from.y, row - 1) : -1;
    if (at === before) {
      out.copyWithin(row * pixels, (row - 1) * pixels, row * pixels);
      continue;
    }
    const node = Math.floor((at * scale) / perNode);
    for (let column = 0; column < pixels; column++) {
      const to = cell[column] ?? 0;
      const value = level.cells[at * level.size + to] ?? 0;
      if (value === 0) {
        out[row * pixels + column] = empty;
        continue;
      }
      const share = high > low ? (Math.log(Math.abs(value)) - low) / (high - low) : 1;
      const step = Math.min(STEPS - 1, Math.max(0, Math.round(share * (STEPS - 1))));
      const isFirst = isDifference ? value > 0 : node === Math.floor((to * scale) / perNode);
      out[row * pixels + column] = (isFirst ? inside : across)[step] ?? empty;
    }
  }
  context.putImageData(image, Math.round(place.left * ratio), Math.round(place.top * ratio));
}
