/**
 * The order of microbatches as a picture: a row per stage, a column per unit of time. A forward takes one unit, a backward
 * two; transfers are free. It shows who waits for whom, not seconds.
 */
export interface SchedulePicture {
  readonly rows: readonly string[];
  /** Units from the first forward to the last backward. */
  readonly units: number;
  /** Share of the units in which a stage waits, over all stages. */
  readonly idle: number;
}

interface Piece {
  readonly name: string;
  readonly start: number;
  readonly end: number;
}

const widest = 100;

export function drawSchedule(orders: readonly (readonly string[])[]): SchedulePicture {
  const stages = simulate(orders);
  const units = Math.max(0, ...stages.flat().map((piece) => piece.end));
  const busy = stages.flat().reduce((sum, piece) => sum + piece.end - piece.start, 0);
  const width = Math.max(2, ...orders.flat().map((name) => name.length)) + 1;
  const shown = Math.max(6, Math.floor(widest / width));
  const cut = units > shown ? { from: Math.ceil(shown / 2), to: units - Math.floor(shown / 2) + 1 } : undefined;
  const rows = stages.map((pieces, stage) => {
    const cells = Array.from({ length: units }, () => ".");
    for (const { name, start, end } of pieces) for (let t = start; t < end; t++) cells[t] = t === start ? name : "-".repeat(name.length);
    const visible = cut ? [...cells.slice(0, cut.from), "…", ...cells.slice(cut.to)] : cells;
    return `stage ${String(stage).padStart(String(orders.length - 1).length)} | ${visible.map((cell) => cell.padEnd(width)).join("")}`.trimEnd();
  });
  if (cut) rows.push(`(units ${cut.from}..${cut.to - 1} of ${units} are left out at …)`);
  return { rows, units, idle: units === 0 ? 0 : 1 - busy / (units * orders.length) };
}

/** Each stage does its own list in order; F waits for the stage before, B for the stage after. */
function simulate(orders: readonly (readonly string[])[]): Piece[][] {
  const done = new Map<string, number>();
  const pieces: Piece[][] = orders.map(() => []);
  const next = orders.map(() => 0);
  const clock = orders.map(() => 0);
  let moved = true;
  while (moved) {
    moved = false;
    for (const [stage, order] of orders.entries()) {
      for (let name = order[next[stage]!]; name !== undefined; name = order[next[stage]!]) {
        const forward = name.startsWith("F");
        const from = forward ? stage - 1 : stage + 1;
        const ready = from < 0 || from >= orders.length ? 0 : done.get(`${from} ${name}`);
        if (ready === undefined) break;
        const start = Math.max(clock[stage]!, ready);
        const end = start + (forward ? 1 : 2);
        pieces[stage]!.push({ name, start, end });
        done.set(`${stage} ${name}`, end);
        clock[stage] = end;
        next[stage]!++;
        moved = true;
      }
    }
  }
  return pieces;
}
