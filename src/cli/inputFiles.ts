/** Reading what people name: every way in which a file itself can be wrong is a Trouble, found before its bytes are looked at. */
import { readFileSync, type Stats, statSync } from "node:fs";
import { basename, dirname, extname, join, resolve } from "node:path";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { sha256 } from "../plan/seal.ts";

/** What a text file is for, in the messages about it. */
interface TextKind {
  /** As in "PATH is a directory, not a job". */
  readonly noun: string;
  readonly limit: number;
  readonly fix: string;
  /** The way out for a file above the limit. */
  readonly fixLong: string;
}
// a job is a page of text, a config a few; lists of layers or of labels can make a config long
const jobFix = "name a job file; training text belongs in data.path";
const jobText: TextKind = { noun: "a job", limit: 2 ** 20, fix: "name a YAML file", fixLong: jobFix };
const configFix = "name the config.json of a Hugging Face model";
const configText: TextKind = { noun: "a config.json", limit: 64 * 2 ** 20, fix: configFix, fixLong: configFix };

/** The text of a job file. Throws a Trouble if it is no file, longer than 1 MiB, or not UTF-8. */
export function readJobFile(path: string): string {
  const stat = attempt(path, () => statSync(path));
  if (stat.isDirectory())
    throw new Trouble(`${path} is a directory, not a job`, `name the file, for example ${path.replace(/\/+$/, "")}/job.yaml`);
  return readText(path, stat, jobText);
}

/**
 * The text of a Hugging Face config, its path, and the model's name: that of the directory of a config.json, else that of the file.
 * A directory stands for the config.json in it. Throws as `readJobFile` does.
 */
export function readConfigFile(path: string): { readonly text: string; readonly file: string; readonly name: string } {
  const file = attempt(path, () => statSync(path)).isDirectory() ? join(path, "config.json") : path;
  const stat = attempt(file, () => statSync(file));
  const stem = basename(file, extname(file));
  const name = stem === "config" ? basename(dirname(resolve(file))) || stem : stem;
  return { text: readText(file, stat, configText), file, name };
}

function readText(path: string, stat: Stats, { noun, limit, fix, fixLong }: TextKind): string {
  // a pipe has no size: it is read, then measured; a device such as /dev/zero may never end
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

/** JavaScript holds no longer text. */
const planText: TextKind = {
  noun: "a plan",
  limit: 2 ** 29 - 2 ** 20,
  fix: "name the directory that rankc compile -o wrote",
  fixLong: "compile the job again",
};

/** The text of a plan. Throws a Trouble where it is no file, too large, or no text. */
export const readPlanFile = (path: string): string =>
  readText(
    path,
    attempt(path, () => statSync(path)),
    planText,
  );

/** The source of a kernel beside its plan. Throws a Trouble where it is missing, or is not what the plan was sealed with. */
export function readKernel(plan: Plan, folder: string, file: string): string {
  const path = join(folder, "kernels", file);
  const again = "compile the job again";
  let text: string;
  try {
    // a symbolic link may lead to a device that never ends
    if (!statSync(path).isFile()) throw new Trouble(`${path} is not a file`, again);
    text = readFileSync(path, "utf8");
  } catch (error) {
    if (error instanceof Trouble) throw error;
    throw new Trouble(`${path} cannot be read: ${(error as NodeJS.ErrnoException).code}; the plan's kernels lie beside it`, again);
  }
  const kernel = plan.kernels.find((k) => k.source?.file === file);
  if (kernel?.source?.sha256 !== sha256(text)) throw new Trouble(`${path} was changed since the plan was compiled`, again);
  return text;
}

/** A cubin that the plan was sealed with; undefined where it was not, or the file is missing. Throws a Trouble where it is another. */
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
