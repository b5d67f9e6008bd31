/** Reading what people name: every way in which a file itself can be wrong is a Trouble, found before its bytes are looked at. */
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import type { Plan } from "../schemas/plan.ts";
import { Trouble } from "../schemas/trouble.ts";
import { sha256 } from "./plan.ts";

const LIMIT = 2 ** 20; // a job is a page of text; 1 MiB is hundreds of times the longest

export function readJobFile(path: string): string {
  const stat = attempt(path, () => statSync(path));
  if (stat.isDirectory())
    throw new Trouble(`${path} is a directory, not a job`, `name the file, for example ${path.replace(/\/+$/, "")}/job.yaml`);
  // a pipe has no size: it is read, then measured; a device such as /dev/zero may never end
  if (!stat.isFile() && !stat.isFIFO()) throw new Trouble(`${path} is not a file`, "name a YAML file");
  if (stat.isFile() && stat.size > LIMIT) throw tooBig(path, stat.size);
  const bytes = attempt(path, () => readFileSync(path));
  if (bytes.length > LIMIT) throw tooBig(path, bytes.length);
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Trouble(`${path} is not text: its bytes are not UTF-8`, "name a YAML file");
  }
  if (text.includes("\0")) throw new Trouble(`${path} is not text: it holds zero bytes`, "name a YAML file");
  return text;
}

const tooBig = (path: string, size: number) =>
  new Trouble(
    `${path} has ${(size / 2 ** 20).toFixed(1)} MiB; a job may have 1 MiB`,
    "name a job file; training text belongs in data.path",
  );

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

/** The source of a kernel beside its plan. Throws a Trouble where it is missing, or is not what the plan was sealed with. */
export function readKernel(plan: Plan, folder: string, file: string): string {
  const path = join(folder, "kernels", file);
  const again = "compile the job again";
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    throw new Trouble(`${path} cannot be read: ${(error as NodeJS.ErrnoException).code}; the plan's kernels lie beside it`, again);
  }
  const kernel = plan.kernels.find((k) => k.source?.file === file);
  if (kernel?.source?.sha256 !== sha256(text)) throw new Trouble(`${path} was changed since the plan was compiled`, again);
  return text;
}

/** A cubin beside its plan; undefined where there is none. */
export function readCubin(folder: string, file: string): Uint8Array | undefined {
  try {
    return readFileSync(join(folder, "kernels", file));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new Trouble(`${join(folder, "kernels", file)} cannot be read: ${(error as NodeJS.ErrnoException).code}`, "check its permissions");
  }
}
