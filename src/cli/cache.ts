/**
 * Results that a later command needs again: peaks of jobs, compiled plans, plans whose laws hold, and estimates. One small file each in the folder of
 * cacheFolder.ts. Every failure is ignored: the command computes again.
 */
import { readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { deflateRawSync, inflateRawSync } from "node:zlib";
import type { Job } from "../../schemas/job.ts";
import type { AutoChoice, AutoProblem } from "../frontend/auto.ts";
import type { KnownPeaks } from "../frontend/readJob.ts";
import { sha256 } from "../plan/seal.ts";
import { cacheFolder } from "./cacheFolder.ts";

/** The largest number of results that are kept. */
const MOST = 1000;

/** Returns a small result by its name; undefined if it is not kept. */
export function recall(name: string): unknown {
  const folder = cacheFolder();
  if (folder === undefined) return undefined;
  try {
    return JSON.parse(readFileSync(join(folder, name), "utf8"));
  } catch {
    return undefined;
  }
}

/** Keeps a small result. */
export function remember(name: string, value: unknown): void {
  const folder = cacheFolder();
  if (folder !== undefined) writeResult(folder, name, () => JSON.stringify(value), "", MOST);
}

/** Writes a result as a whole file. If there are too many whose names start with `prefix`, the oldest half goes. */
function writeResult(folder: string, name: string, contentOf: () => string | Uint8Array, prefix: string, most: number): void {
  try {
    const names = readdirSync(folder).filter((other) => other.startsWith(prefix));
    if (names.length >= most) {
      const aged = names.map((other) => ({ other, age: statSync(join(folder, other)).mtimeMs })).sort((a, b) => a.age - b.age);
      for (const { other } of aged.slice(0, Math.ceil(most / 2))) rmSync(join(folder, other), { force: true });
    }
    const temporary = join(folder, `${process.pid}.tmp`);
    writeFileSync(temporary, contentOf(), { mode: 0o600 });
    renameSync(temporary, join(folder, name));
  } catch {
    // a full or read-only disk: the next command computes again
  }
}

/** The most compiled plans that are kept; each takes about a tenth of its size. */
const MOST_PLANS = 24;
/** Characters of a plan below which compiling again takes no longer than reading. */
const SMALL = 300_000;

/** What `compile` gave for a job: the text of the plan, and the kernel sources by file name. */
export interface CompiledText {
  readonly plan: string;
  readonly sources: readonly (readonly [file: string, source: string])[];
}

const compiledName = (job: Job, target: string): string => `compiled-${sha256(JSON.stringify([target, job])).slice(0, 32)}`;

/** Returns what this build of rankc compiled for an equal job and target before; undefined if it is not kept. */
export function recallCompiled(job: Job, target: string): CompiledText | undefined {
  const folder = cacheFolder();
  if (folder === undefined) return undefined;
  try {
    const file = join(folder, compiledName(job, target));
    const found: unknown = JSON.parse(inflateRawSync(readFileSync(file)).toString("utf8"));
    return typeof found === "object" && found !== null && "plan" in found && "sources" in found ? (found as CompiledText) : undefined;
  } catch {
    return undefined;
  }
}

/** Keeps what `compile` gave for a job. The oldest results make room. */
export function rememberCompiled(job: Job, target: string, compiled: CompiledText): void {
  const folder = cacheFolder();
  if (folder === undefined || compiled.plan.length < SMALL) return;
  writeResult(folder, compiledName(job, target), () => deflateRawSync(JSON.stringify(compiled), { level: 1 }), "compiled-", MOST_PLANS);
}

/** Peaks of jobs. `target` names the target whose kernels count; without it, that of the job's device. */
export function knownPeaks(target: string | undefined): KnownPeaks {
  const nameOf = (job: Job): string => `peak-${sha256(JSON.stringify([target ?? null, job])).slice(0, 32)}`;
  return {
    get(job) {
      const found = recall(nameOf(job));
      const isPeak = typeof found === "object" && found !== null && "bytes" in found && "who" in found;
      return isPeak && typeof found.bytes === "number" && typeof found.who === "string"
        ? { bytes: found.bytes, who: found.who, ...("isBound" in found && { isBound: true as const }) }
        : undefined;
    },
    set: (job, peak) => remember(nameOf(job), peak),
  };
}

/** Values that were chosen for keys that a job leaves as `auto`, by all that the choice depends on. */
export const knownAnswers = {
  get(key: string): AutoChoice | AutoProblem | undefined {
    const found = recall(`auto-${sha256(key)}`);
    return typeof found === "object" && found !== null && ("values" in found || "found" in found)
      ? (found as AutoChoice | AutoProblem)
      : undefined;
  },
  set: (key: string, answer: AutoChoice | AutoProblem): void => remember(`auto-${sha256(key)}`, answer),
};

/** Texts of plan files whose digests, schema and laws hold, by their SHA-256. */
export const knownPlans = {
  has: (text: string): boolean => cacheFolder() !== undefined && recall(`plan-${sha256(text)}`) === true,
  add: (text: string): void => void (cacheFolder() !== undefined && remember(`plan-${sha256(text)}`, true)),
};
