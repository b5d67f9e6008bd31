/**
 * Results that a later command needs again: peaks of jobs, and plans whose laws hold. Below the user's cache folder, one small file each,
 * in a folder named by the digest of the built command line, because a result is that of one state of the code. A checkout has no cache.
 * Every failure is ignored: the command computes again. A folder of another user is not read.
 */
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import type { Job } from "../../schemas/job.ts";
import type { KnownPeaks } from "../frontend/readJob.ts";
import type { KnownPlans } from "../plan/read.ts";
import { sha256 } from "../plan/seal.ts";

/** The largest number of results that are kept. */
const MOST = 1000;

let opened: { readonly folder: string | undefined } | undefined;

/** Returns the folder of the cache; undefined if there is none. */
function cacheFolder(): string | undefined {
  opened ??= { folder: openFolder() };
  return opened.folder;
}

function openFolder(): string | undefined {
  if (process.env.RANKC_CACHE === "off") return undefined;
  try {
    // the entry of the bundle names all its files, and their names hold their digests
    const build = sha256(readFileSync(new URL("rankc.js", import.meta.url))).slice(0, 16);
    const folder = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "rankc", `results-${build}`);
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    const { uid, mode } = statSync(folder);
    return (process.getuid?.() ?? uid) === uid && (mode & 0o022) === 0 ? folder : undefined;
  } catch {
    return undefined;
  }
}

function read(name: string): unknown {
  const folder = cacheFolder();
  if (folder === undefined) return undefined;
  try {
    return JSON.parse(readFileSync(join(folder, name), "utf8"));
  } catch {
    return undefined;
  }
}

function write(name: string, value: unknown): void {
  const folder = cacheFolder();
  if (folder === undefined) return;
  try {
    const names = readdirSync(folder);
    if (names.length >= MOST) for (const old of names) rmSync(join(folder, old), { force: true });
    const temporary = join(folder, `${process.pid}.tmp`);
    writeFileSync(temporary, JSON.stringify(value), { mode: 0o600 });
    renameSync(temporary, join(folder, name));
  } catch {
    // a full or read-only disk: the next command computes again
  }
}

/** Peaks of jobs. `target` names the target whose kernels count; without it, that of the job's device. */
export function knownPeaks(target: string | undefined): KnownPeaks {
  const nameOf = (job: Job): string => `peak-${sha256(JSON.stringify([target ?? null, job])).slice(0, 32)}`;
  return {
    get(job) {
      const found = read(nameOf(job));
      const isPeak = typeof found === "object" && found !== null && "bytes" in found && "who" in found;
      return isPeak && typeof found.bytes === "number" && typeof found.who === "string"
        ? { bytes: found.bytes, who: found.who }
        : undefined;
    },
    set: (job, peak) => write(nameOf(job), peak),
  };
}

/** Texts of plan files whose digests, schema and laws hold, by their SHA-256. */
export const knownPlans: KnownPlans = {
  has: (text) => cacheFolder() !== undefined && read(`plan-${sha256(text)}`) === true,
  add: (text) => void (cacheFolder() !== undefined && write(`plan-${sha256(text)}`, true)),
};
