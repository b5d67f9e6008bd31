/** Reads the files that a command line names. A file that is missing, too large or not text is a Trouble. */
import { closeSync, existsSync, openSync, readFileSync, readSync, type Stats, statSync } from "node:fs";
import { basename, dirname, extname, join, resolve } from "node:path";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { sha256 } from "../plan/seal.ts";

/** The kind of a text file: words for its messages, and its size limit in bytes. */
interface TextKind {
  /** As in "PATH is a directory, not a job". */
  readonly noun: string;
  readonly limit: number;
  readonly fix: string;
  /** The fix for a file above the limit. */
  readonly fixLong: string;
}
// configs may contain long lists of layers or labels
const jobFix = "name a job file; training text belongs in data.path";
const jobText: TextKind = { noun: "a job", limit: 2 ** 20, fix: "name a YAML file", fixLong: jobFix };
const configFix = "name the config.json of a Hugging Face model";
const configText: TextKind = { noun: "a config.json", limit: 64 * 2 ** 20, fix: configFix, fixLong: configFix };

/** Reads a job file. Throws a Trouble if it is not a file, longer than 1 MiB, or not UTF-8. */
export function readJobFile(path: string): string {
  const stat = attempt(path, () => statSync(path));
  if (stat.isDirectory())
    throw existsSync(join(path, "plan.json"))
      ? new Trouble(
          `${path} has a compiled plan, not a job`,
          "name the job's YAML file; rankc inspect, diff, run, serve and pack take plans",
        )
      : new Trouble(`${path} is a directory, not a job`, `name the file, for example ${path.replace(/\/+$/, "")}/job.yaml`);
  expectNoPlan(path, stat);
  return readText(path, stat, jobText);
}

/** Throws a Trouble if a file that should be a job is a plan.json or plan.txt: a plan may exceed the limit of jobs, and is no valid YAML. */
function expectNoPlan(path: string, stat: Stats): void {
  if (!stat.isFile()) return;
  const head = Buffer.alloc(Math.min(512, stat.size));
  const file = attempt(path, () => openSync(path, "r"));
  try {
    readSync(file, head, 0, head.length, 0);
  } finally {
    closeSync(file);
  }
  const text = head.toString("utf8");
  const isText = /^[^\n]+: plan [0-9a-f]{16}, rankc /.test(text);
  const isJson = basename(path) === "plan.json" && /^\s*\{/.test(text);
  if (!isText && !isJson) return;
  throw new Trouble(
    `${path} is ${isText ? "the text of a plan" : "a compiled plan"}, not a job`,
    `name the job's YAML file; rankc inspect, diff, run, serve and pack take ${isText ? "the folder of plan.json" : "plans"}`,
  );
}

/**
 * Reads a Hugging Face config: `path` is the file, or the directory of a config.json. The model's name is that of the directory of a
 * config.json, or that of another file. Throws like `readJobFile`.
 */
export function readConfigFile(path: string): { readonly text: string; readonly file: string; readonly name: string } {
  const file = attempt(path, () => statSync(path)).isDirectory() ? join(path, "config.json") : path;
  const stat = attempt(file, () => statSync(file));
  const stem = basename(file, extname(file));
  const name = stem === "config" ? basename(dirname(resolve(file))) || stem : stem;
  return { text: readText(file, stat, configText), file, name };
}

const launchFix = "name a launch script, or a YAML list of arguments";
const launchText: TextKind = { noun: "a launch script", limit: 2 ** 20, fix: launchFix, fixLong: launchFix };

/** Reads a launch script or a list of arguments. The job has the name of the file. Throws like `readJobFile`. */
export function readLaunchFile(path: string): { readonly text: string; readonly file: string; readonly name: string } {
  const stat = attempt(path, () => statSync(path));
  return { text: readText(path, stat, launchText), file: path, name: basename(path, extname(path)) };
}

const profileFix = "name a profile of the package, or the JSON file of one";
const profileText: TextKind = { noun: "a device profile", limit: 4 * 2 ** 20, fix: profileFix, fixLong: profileFix };

/** Reads the file of a device profile. Throws like `readJobFile`. */
export const readProfileFile = (path: string): string =>
  readText(
    path,
    attempt(path, () => statSync(path)),
    profileText,
  );

/** Reads a script that another one in `folder` reads; undefined if there is no such text. */
export function readIncludedScript(path: string, folder: string): string | undefined {
  try {
    return readLaunchFile(resolve(folder, path)).text;
  } catch (error) {
    if (error instanceof Trouble) return undefined;
    throw error;
  }
}

function readText(path: string, stat: Stats, { noun, limit, fix, fixLong }: TextKind): string {
  // a pipe has no size and is measured after reading; a device such as /dev/zero may be endless
  if (!stat.isFile() && !stat.isFIFO()) throw new Trouble(`${path} is not a file`, fix);
  const tooBig = (size: number) =>
    new Trouble(`${path} has ${(size / 2 ** 20).toFixed(1)} MiB; ${noun} may have ${limit / 2 ** 20} MiB`, fixLong);
  if (stat.isFile() && stat.size > limit) throw tooBig(stat.size);
  const bytes = attempt(path, () => readFileSync(path));
  if (bytes.length > limit) throw tooBig(bytes.length);
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Trouble(`${path} is not text: its bytes are not UTF-8`, fix);
  }
  if (text.includes("\0")) throw new Trouble(`${path} is not text: it holds zero bytes`, fix);
  return text;
}

function attempt<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (e) {
    const code = (e as NodeJS.ErrnoException).code;
    if (code === "ENOENT" || code === "ENOTDIR") throw new Trouble(`${path} does not exist`, "check the path");
    if (code === "EACCES" || code === "EPERM") throw new Trouble(`${path} may not be read`, "check its permissions");
    throw new Trouble(`${path} cannot be read: ${code ?? e}`, "check the path");
  }
}

/** The limit is the longest string of JavaScript. */
const planText: TextKind = {
  noun: "a plan",
  limit: 2 ** 29 - 2 ** 20,
  fix: "name the directory that rankc compile -o wrote",
  fixLong: "compile the job again",
};

/** Reads a plan file. Throws a Trouble if it is not a file, too large, or not text. */
export const readPlanFile = (path: string): string =>
  readText(
    path,
    attempt(path, () => statSync(path)),
    planText,
  );

/** Reads the source of a kernel of a plan. Throws a Trouble if it is missing, or its digest differs from the plan's. */
export function readKernel(plan: Plan, folder: string, file: string): string {
  const path = join(folder, "kernels", file);
  const again = "compile the job again";
  let text: string;
  try {
    // a symbolic link may lead to an endless device
    if (!statSync(path).isFile()) throw new Trouble(`${path} is not a file`, again);
    text = readFileSync(path, "utf8");
  } catch (error) {
    if (error instanceof Trouble) throw error;
    throw new Trouble(
      `${path} cannot be read: ${(error as NodeJS.ErrnoException).code}; a plan needs the kernels/ folder next to it`,
      again,
    );
  }
  const kernel = plan.kernels.find((k) => k.source?.file === file);
  if (kernel?.source?.sha256 !== sha256(text)) throw new Trouble(`${path} was changed since the plan was compiled`, again);
  return text;
}

/** Reads a cubin of a plan; undefined if the plan has no such cubin, or the file is missing. Throws a Trouble if its digest differs from the plan's. */
export function readCubin(plan: Plan, folder: string, file: string): Uint8Array | undefined {
  const sealed = plan.kernels.find((k) => k.cubin?.file === file)?.cubin;
  const path = join(folder, "kernels", file);
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!sealed || !stat) return undefined;
  if (!stat.isFile()) throw new Trouble(`${path} is not a file`, "compile the job again");
  const bytes = attempt(path, () => readFileSync(path));
  if (sha256(bytes) !== sealed.sha256) throw new Trouble(`${path} was changed since the plan was compiled`, "compile the job again");
  return bytes;
}
