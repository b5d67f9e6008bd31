/** Where ranks stand in a drawing of the mesh: a box for a node, with a cell for each of its ranks. */

/** The places of ranks, in CSS pixels. */
export interface MeshLayout {
  readonly cell: number;
  /** The size of the box of a node. */
  readonly box: { readonly width: number; readonly height: number };
  readonly height: number;
  /** Nodes in a row. */
  readonly across: number;
  at(rank: number): { readonly x: number; readonly y: number };
  /** Returns the rank at a point; undefined between cells. */
  rankAt(x: number, y: number): number | undefined;
  /** Returns the corner of the box of a node. */
  node(n: number): { readonly x: number; readonly y: number };
}

interface Wanted {
  readonly world: number;
  readonly perNode: number;
  /** Room at the left for the names of rows, where nodes have no names. */
  readonly left?: number;
  readonly width: number;
  readonly height: number;
  /** Room above the cells of a node for its name. */
  readonly label: number;
  readonly largest: number;
}

/** The least width of a cell. */
const LEAST = 4;

/** Returns the layout with the largest cells that fits; with the least cells it may be higher than the room. */
export function meshLayout({ world, perNode, left: rowNames = 0, width, height, label, largest }: Wanted): MeshLayout {
  const nodes = Math.ceil(world / perNode);
  const columns = perNode % 4 === 0 && perNode > 4 ? 4 : Math.ceil(Math.sqrt(perNode));
  const rows = Math.ceil(perNode / columns);
  const sized = (cell: number) => {
    const gap = cell >= 8 ? 2 : 1;
    const pad = cell >= 12 ? 5 : 2;
    const named = cell >= 14 ? label : 0;
    const box = { width: columns * (cell + gap) - gap + 2 * pad, height: rows * (cell + gap) - gap + 2 * pad + named };
    const apart = cell >= 12 ? 10 : cell >= 7 ? 4 : 2;
    const left = cell >= 14 ? 0 : rowNames;
    const fitting = Math.max(1, Math.min(nodes, Math.floor((width - left + apart) / (box.width + apart))));
    // groups of nodes begin at the left: a power of two nodes in a row
    const across = fitting === nodes ? nodes : 2 ** Math.floor(Math.log2(fitting));
    return { cell, gap, pad, named, box, apart, across, left, height: Math.ceil(nodes / across) * (box.height + apart) - apart };
  };
  let chosen = sized(LEAST);
  for (let cell = LEAST + 1; cell <= largest; cell++) {
    const next = sized(cell);
    if (next.height <= height && next.box.width <= width) chosen = next;
  }
  const { cell, gap, pad, named, box, apart, across, left } = chosen;
  const node = (n: number) => ({ x: left + (n % across) * (box.width + apart), y: Math.floor(n / across) * (box.height + apart) });
  const at = (rank: number) => {
    const corner = node(Math.floor(rank / perNode));
    const own = rank % perNode;
    return {
      x: corner.x + pad + (own % columns) * (cell + gap),
      y: corner.y + pad + named + Math.floor(own / columns) * (cell + gap),
    };
  };
  const rankAt = (x: number, y: number): number | undefined => {
    const [i, j] = [Math.floor((x - left) / (box.width + apart)), Math.floor(y / (box.height + apart))];
    const column = Math.floor((x - left - i * (box.width + apart) - pad) / (cell + gap));
    const row = Math.floor((y - j * (box.height + apart) - pad - named) / (cell + gap));
    if (i < 0 || j < 0 || i >= across || column < 0 || row < 0 || column >= columns || row >= rows) return undefined;
    const own = row * columns + column;
    const rank = (j * across + i) * perNode + own;
    return own < perNode && rank < world ? rank : undefined;
  };
  return { cell, box, across, height: chosen.height, at, rankAt, node };
}
