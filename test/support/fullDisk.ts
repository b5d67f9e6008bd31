/**
 * A disk that is full, for tests of one process: `vi.mock("node:fs", async (original) => (await import(…)).fullDisk(await original()))` refuses the calls that
 * need room. Worker threads keep the real file system.
 */
import type * as fs from "node:fs";

/** What the disk refuses now. */
export const disk: {
  /** Files whose writes fail, by path; a file that is written through a descriptor has the path that it was opened by. */
  full: RegExp | undefined;
  /** The code of the error. */
  code: "ENOSPC" | "EDQUOT";
  /** Bytes that the file system states to be free; undefined: the real number. */
  free: number | undefined;
} = { full: undefined, code: "ENOSPC", free: undefined };

/** Returns the module node:fs with all calls refused that write to a file of `disk.full`, or flush it. */
export function fullDisk(real: typeof fs): typeof fs {
  const paths = new Map<unknown, string>();
  const pathOf = (file: unknown): string => paths.get(file) ?? String(file);
  const refusing = <A extends unknown[], R>(act: (...args: A) => R, target = 0): ((...args: A) => R) =>
    Object.assign((...args: A): R => {
      if (disk.full?.test(pathOf(args[target]))) throw Object.assign(new Error("no space"), { code: disk.code });
      return act(...args);
    }, act);
  return {
    ...real,
    openSync: (...args) => {
      const fd = real.openSync(...args);
      paths.set(fd, String(args[0]));
      return fd;
    },
    writeSync: refusing(real.writeSync as (...args: unknown[]) => number) as typeof fs.writeSync,
    writeFileSync: refusing(real.writeFileSync),
    appendFileSync: refusing(real.appendFileSync),
    ftruncateSync: refusing(real.ftruncateSync),
    fsyncSync: refusing(real.fsyncSync),
    fdatasyncSync: refusing(real.fdatasyncSync),
    copyFileSync: refusing(real.copyFileSync, 1),
    statfsSync: ((path: string) =>
      disk.free === undefined ? real.statfsSync(path) : { bavail: disk.free, bsize: 1, blocks: 10 }) as typeof fs.statfsSync,
  };
}
