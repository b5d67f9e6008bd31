/** Finds the files of a job: in folders, or in a revision of the repository if the job is one of it (`git:REV:PATH`). */
import { dirname, isAbsolute, join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import type { JobFiles } from "../frontend/jobFiles.ts";
import { gitFile, readGitFile, resolveGitFile } from "./gitFiles.ts";
import { readJobFile } from "./inputFiles.ts";

/** Returns the files beside a job. `overlays`: files over it. */
export function jobFiles(overlays: readonly string[]): JobFiles {
  return { overlays, resolve: baseFile, read: readFile };
}

function readFile(file: string): string {
  const inGit = gitFile(file);
  return inGit ? readGitFile(resolveGitFile(inGit)) : readJobFile(file);
}

/** Returns the file that `extends: path` in the file `from` names: of the same revision if `from` is of one. */
function baseFile(path: string, from: string): string {
  const inGit = gitFile(from);
  if (!inGit) return isAbsolute(path) ? path : join(dirname(from), path);
  if (isAbsolute(path)) throw new Trouble(`${path} is no file of the revision ${inGit.revision}`, "write a path relative to the file");
  return `git:${inGit.revision}:${join(dirname(inGit.path), path)}`;
}
