/** The command line as a user starts it, for tests: what it prints, and its exit code. */
import { execFileSync, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { root } from "./checkout.ts";

export interface Said {
  readonly exit: number | null;
  readonly out: string;
  readonly err: string;
}

/**
 * The path of the compiled command line. It is built once for the sources as they are and kept below node_modules: a process that
 * starts from it takes half the time of one that transforms TypeScript.
 */
export function builtCli(): string {
  const inputs = [
    "package.json",
    "LICENSE",
    "tsconfig.json",
    "tsconfig.build.json",
    ...["schemas", "src", "runtime", "templates"].flatMap(filesBelow),
  ];
  const digest = createHash("sha256");
  for (const path of inputs) digest.update(path).update(readFileSync(join(root, path)));
  const cache = join(root, "node_modules/.cache/rankc-build");
  const folder = join(cache, digest.digest("hex").slice(0, 16));
  if (!existsSync(folder)) build(cache, folder);
  return join(folder, "dist/src/cli/main.js");
}

/** Compiles the package into `folder`, which appears when it is whole: other test files may build it at the same time. */
function build(cache: string, folder: string): void {
  mkdirSync(cache, { recursive: true });
  const own = mkdtempSync(`${folder}-`);
  const tsc = join(root, "node_modules/typescript/bin/tsc");
  execFileSync(process.execPath, [tsc, "-p", "tsconfig.build.json", "--outDir", join(own, "dist")], { cwd: root });
  for (const name of ["package.json", "LICENSE", "schemas", "templates"]) cpSync(join(root, name), join(own, name), { recursive: true });
  try {
    renameSync(own, folder);
  } catch (error) {
    if (!existsSync(folder)) throw error;
    rmSync(own, { recursive: true });
  }
}

const filesBelow = (folder: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length))
    .sort();

/** Runs the command line with these arguments; resolves when it has ended. */
export function rankc(...args: string[]): Promise<Said> {
  const child = spawn(process.execPath, [builtCli(), ...args], { env: { ...process.env, NO_COLOR: "1" } });
  const said = { out: "", err: "" };
  child.stdout.on("data", (chunk) => (said.out += chunk));
  child.stderr.on("data", (chunk) => (said.err += chunk));
  return new Promise((resolve) => child.on("close", (exit) => resolve({ exit, ...said })));
}
