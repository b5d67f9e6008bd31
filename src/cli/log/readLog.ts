/** Reads the log of a run, of one under way or of one that has ended. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { Trouble } from "../../../schemas/trouble.ts";
import { logFiles } from "./runLog.ts";

/** A number at a step. */
export interface Point {
  readonly step: number;
  readonly value: number;
}
/** A run as its log shows it. */
export interface LoggedRun {
  readonly name: string;
  readonly about: Readonly<Record<string, unknown>>;
  /** The points of each scalar, by its name, in the order of steps. */
  readonly scalars: ReadonlyMap<string, readonly Point[]>;
  /** Per layer with experts, the load of the busiest over the mean, at the last line that has it. */
  readonly expertLoad: readonly number[];
}

/** Returns the folders of the runs in these folders: a folder is one run, or holds one in each subfolder. Throws a Trouble if one has none. */
export function runFolders(folders: readonly string[]): string[] {
  return folders.flatMap((folder) => {
    if (existsSync(join(folder, logFiles.run))) return [folder];
    const below = existsSync(folder) ? readdirSync(folder).map((name) => join(folder, name)) : [];
    const found = below.filter((path) => existsSync(join(path, logFiles.run)));
    if (found.length === 0)
      throw new Trouble(`${folder} has no log of a run`, "name the folder of rankc run --log, or one that holds several");
    return found;
  });
}

/** Reads a log. A line that is not whole yet is left out; of a step that a resumed run repeats, the later line counts. */
export function readLog(folder: string): LoggedRun {
  const about = JSON.parse(readFileSync(join(folder, logFiles.run), "utf8")) as Record<string, unknown>;
  const path = join(folder, logFiles.lines);
  const byName = new Map<string, Map<number, number>>();
  let expertLoad: readonly number[] = [];
  for (const line of existsSync(path) ? readFileSync(path, "utf8").split("\n") : []) {
    const values = parsed(line);
    const step = values?.step;
    if (!values || typeof step !== "number") continue;
    for (const [name, value] of Object.entries(values)) {
      if (typeof value === "number" && name !== "step" && name !== "time") {
        const points = byName.get(name) ?? new Map<number, number>();
        byName.set(name, points.set(step, value));
      } else if (name === "moe/load" && Array.isArray(value)) expertLoad = value.map(Number);
    }
  }
  const scalars = new Map([...byName].map(([name, points]) => [name, pointsOf(points)]));
  return { name: basename(folder), about, scalars, expertLoad };
}

const pointsOf = (points: ReadonlyMap<number, number>): Point[] =>
  [...points].map(([step, value]) => ({ step, value })).sort((a, b) => a.step - b.step);

function parsed(line: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}
