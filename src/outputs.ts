/** Files that a command leaves behind: all of them whole, or none. Each is written beside its place, then renamed into it. */
import { accessSync, constants, existsSync, mkdirSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { Trouble } from "../schemas/trouble.ts";

/** Names may lie in folders below. */
export function writeFolder(folder: string, files: Readonly<Record<string, string | Uint8Array>>): void {
  if (existsSync(folder) && !statSync(folder).isDirectory())
    throw new Trouble(`${folder} is a file, not a directory`, "name another directory after -o");
  let made: string | undefined;
  try {
    made = mkdirSync(folder, { recursive: true });
    for (const name of Object.keys(files)) mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeTogether(Object.entries(files).map(([name, text]) => [join(folder, name), text]));
  } catch (error) {
    if (made) rmSync(made, { recursive: true, force: true });
    throw asTrouble(error, folder);
  }
}

export function writeFile(path: string, content: string | Uint8Array): void {
  try {
    writeTogether([[path, content]]);
  } catch (error) {
    throw asTrouble(error, path);
  }
}

/** Says now that a file cannot be written later, when the work is done. */
export function expectWritable(path: string): void {
  try {
    accessSync(existsSync(path) ? path : dirname(path), constants.W_OK);
    if (existsSync(path) && statSync(path).isDirectory()) throw Object.assign(new Error(), { code: "EISDIR" });
  } catch (error) {
    throw asTrouble(error, path);
  }
}

function writeTogether(files: readonly (readonly [string, string | Uint8Array])[]): void {
  const staged = files.map(([path, content]) => ({ path, content, temporary: `${path}.${process.pid}.tmp` }));
  try {
    for (const { temporary, content } of staged) writeFileSync(temporary, content);
    for (const { temporary, path } of staged) renameSync(temporary, path);
  } finally {
    for (const { temporary } of staged) rmSync(temporary, { force: true });
  }
}

function asTrouble(error: unknown, path: string): unknown {
  const { code } = error as NodeJS.ErrnoException;
  return code ? new Trouble(`${path} could not be written: ${code}`, "name a place that you may write to") : error;
}
