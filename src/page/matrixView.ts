/** The matrix of communication as a pyramid: each level has the largest cell of two by two of the level below. */
import { signal } from "@preact/signals";
import type { Sheet } from "./canvas.tsx";
import { between, channels, palette, pixel } from "./palette.ts";

/** Bytes from rank (row) to rank (column), at several sizes. */
export interface TrafficMatrix {
  readonly world: number;
  readonly levels: readonly MatrixLevel[];
}

interface MatrixLevel {
  readonly size: number;
  /** The colour of each cell: 0 is empty, then steps by amount, of the first kind and from `STEPS` on of the second. */
  readonly steps: Uint8Array;
}

/** The visible ranks: from row and column, and how many. */
export const matrixSpan = signal<{ readonly x: number; readonly y: number; readonly size: number } | undefined>(undefined);

/** How cells are coloured. */
export interface MatrixColours {
  readonly perNode: number;
  /** Whether cells are differences: these are more or less, and amounts are inside of a node or across. */
  readonly isDifference: boolean;
}

/** Steps of colour between the least and the largest amount. */
const STEPS = 64;

/** Returns the pyramid of a matrix. Differences may be negative: the cell with the largest amount counts. */
export function matrixOf(cells: Float32Array, world: number, { perNode, isDifference }: MatrixColours): TrafficMatrix {
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
  const [low, high] = [Math.log(Math.max(1, least)), Math.log(Math.max(2, most))];
  const stepOf = (amount: number): number => {
    const share = high > low ? (Math.log(amount) - low) / (high - low) : 1;
    return 1 + Math.min(STEPS - 1, Math.max(0, Math.round(share * (STEPS - 1))));
  };
  const colouredLevel = ({ size, cells: own }: (typeof levels)[number]): MatrixLevel => {
    const steps = new Uint8Array(size * size);
    const ranks = world / size;
    for (let row = 0; row < size; row++)
      for (let column = 0; column < size; column++) {
        const value = own[row * size + column] ?? 0;
        if (value === 0) continue;
        const isFirst = isDifference ? value > 0 : Math.floor((row * ranks) / perNode) === Math.floor((column * ranks) / perNode);
        steps[row * size + column] = stepOf(Math.abs(value)) + (isFirst ? 0 : STEPS);
      }
    return { size, steps };
  };
  return { world, levels: levels.map(colouredLevel) };
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

/** The pixels of the last drawing, used again while the size is the same. */
let image: ImageData | undefined;

/** Draws the cells: the more bytes, the stronger the colour, on a logarithmic scale. */
export function drawMatrix({ context, ratio }: Sheet, matrix: TrafficMatrix, place: MatrixPlace, isDifference: boolean): void {
  const pixels = Math.max(1, Math.round(place.side * ratio));
  const level = matrix.levels.findLast(({ size }) => (matrix.world / size) * place.each * ratio <= 1.01) ?? matrix.levels[0];
  if (!level) return;
  if (image?.width !== pixels) image = new ImageData(pixels, pixels);
  const out = new Uint32Array(image.data.buffer);
  const colours = coloursOf(isDifference);
  const scale = matrix.world / level.size;
  const cellAt = (from: number, i: number): number =>
    Math.min(level.size - 1, Math.floor((from + ((i + 0.5) * place.size) / pixels) / scale));
  const columns = Int32Array.from({ length: pixels }, (_, i) => cellAt(place.from.x, i));
  let before = -1;
  for (let row = 0; row < pixels; row++) {
    const at = cellAt(place.from.y, row);
    if (at === before) {
      out.copyWithin(row * pixels, (row - 1) * pixels, row * pixels);
      continue;
    }
    before = at;
    const start = at * level.size;
    for (let column = 0; column < pixels; column++)
      out[row * pixels + column] = colours[level.steps[start + (columns[column] ?? 0)] ?? 0] ?? 0;
  }
  context.putImageData(image, Math.round(place.left * ratio), Math.round(place.top * ratio));
}

/** Returns the pixels of all steps. */
function coloursOf(isDifference: boolean): Uint32Array {
  const { paper, wrong, axes, idle } = palette.value;
  const ramp = (to: string): number[] =>
    Array.from({ length: STEPS }, (_, i) => pixel(...channels(between(between(paper, to, 0.18), to, i / (STEPS - 1)))));
  const [first, second] = isDifference ? [wrong, axes.edp] : [axes.pp, axes.ep];
  return Uint32Array.from([pixel(...channels(idle)), ...ramp(first), ...ramp(second)]);
}
