/** Reads files of a revision of the repository: `git:REV:PATH` names one, relative to the current folder. */
import { basename, join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";

/** A file of a revision. */
export interface GitFile {
  readonly revision: string;
  readonly path: string;
}

/** Returns the file that `git:REV:PATH` names; undefined for other texts. Throws a Trouble if the revision or the path is missing. */
export function gitFile(text: string): GitFile | undefined {
  if (!text.startsWith("git:")) return undefined;
  const [, revision = "", path = ""] = /^git:([^:]*):?(.*)$/s.exec(text) ?? [];
  if (revision === "" || path === "")
    throw new Trouble(`${text} names no file of a revision`, "write git:REV:PATH, for example git:HEAD:plan/ or git:main:job.yaml");
  return { revision, path };
}

/** The most bytes of a plan that are read. */
const MOST = 2 ** 29;

const checkRevision = "check the revision and the path: git log -- PATH lists the revisions of a file";

/** Runs git in a folder, and returns what it prints. Throws a Trouble with git's own message. */
export function git(
  args: readonly string[],
  { cwd = ".", fix = checkRevision }: { readonly cwd?: string; readonly fix?: string } = {},
): string {
  // most jobs are files, and the module takes 3 ms to load
  const { execFileSync } = process.getBuiltinModule("node:child_process");
  try {
    return execFileSync("git", args, { cwd, encoding: "utf8", maxBuffer: MOST, stdio: ["ignore", "pipe", "pipe"] });
  } catch (error) {
    const { code, stderr } = error as { readonly code?: string; readonly stderr?: string };
    if (code === "ENOENT")
      throw new Trouble("git is not installed, or the folder does not exist", "install git, or name files instead of git:REV:PATH");
    const [line = "no message"] = String(stderr ?? "")
      .trim()
      .split("\n");
    throw new Trouble(`git ${args[0]} failed: ${line.replace(/^fatal: /, "")}`, fix);
  }
}

/** Returns the path of the plan.json, or of the job, that a file of a revision means: a folder means its plan.json. */
export function resolveGitFile({ revision, path }: GitFile): GitFile & { readonly isPlan: boolean } {
  const name = path.replace(/\/+$/, "");
  const type = git(["cat-file", "-t", `${revision}:./${name}`]).trim();
  const file = type === "tree" ? join(name, "plan.json") : name;
  return { revision, path: file, isPlan: basename(file) === "plan.json" };
}

/** Returns the text of a file of a revision. */
export const readGitFile = ({ revision, path }: GitFile): string => git(["show", "--end-of-options", `${revision}:./${path}`]);
