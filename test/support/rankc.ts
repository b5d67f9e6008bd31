/** The command line, for tests: what it prints, and its exit code; in the process of the test, or in one of its own. */
import { execFileSync, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./checkout.ts";

export interface CliResult {
  readonly exit: number | null;
  readonly out: string;
  readonly err: string;
}

/**
 * The path of a compiled file of the package or of `scripts`, e.g. of src/cli/main.ts. All are compiled once for the sources as
 * they are and kept below node_modules: a process or thread that starts from them takes a fraction of the time of one that transforms TypeScript.
 */
export function built(source: string): string {
  const inputs = [
    "package.json",
    "LICENSE",
    "tsconfig.json",
    "tsconfig.build.json",
    ...scripts,
    ...["schemas", "src", "runtime", "templates"].flatMap(filesBelow),
  ];
  const digest = createHash("sha256");
  for (const path of inputs) digest.update(path).update(readFileSync(join(root, path)));
  const cache = join(root, "node_modules/.cache/rankc-build");
  const folder = join(cache, digest.digest("hex").slice(0, 16));
  if (!existsSync(folder)) build(cache, folder);
  return join(folder, "dist", source.replace(/\.ts$/, ".js"));
}
/** Files of the tests that processes start from. */
const scripts = ["rank", "deadline", "handPlan"].map((name) => `test/support/${name}.ts`);

/** The path of the compiled command line. */
export const builtCli = (): string => built("src/cli/main.ts");

/** Compiles the package into `folder`, which appears when it is whole. Test files that need it at the same time wait for one of them. */
function build(cache: string, folder: string): void {
  mkdirSync(cache, { recursive: true });
  const lock = `${folder}.lock`;
  // a build takes seconds: one that does not end has left its lock behind
  for (let tries = 0; tries < 1200 && isTaken(lock); tries++) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 100);
  if (!existsSync(folder)) buildAlone(folder, lock);
}

/** Takes the lock, or returns true if another process has it. */
function isTaken(lock: string): boolean {
  try {
    mkdirSync(lock);
    return false;
  } catch {
    return true;
  }
}

function buildAlone(folder: string, lock: string): void {
  const own = mkdtempSync(`${folder}-`);
  const config = {
    extends: join(root, "tsconfig.build.json"),
    compilerOptions: { declaration: false, rootDir: root, outDir: join(own, "dist") },
    include: ["schemas", "src", "runtime", ...scripts].map((path) => join(root, path)),
    exclude: ["runtime/browser", "src/page", "src/cli/vite.config.ts"].map((path) => join(root, path)),
  };
  writeFileSync(join(own, "tsconfig.json"), JSON.stringify(config));
  const tsc = join(root, "node_modules/typescript/bin/tsc");
  // `npm test` checks types before
  execFileSync(process.execPath, [tsc, "-p", own, "--noCheck"], { cwd: root });
  for (const name of ["package.json", "LICENSE", "schemas", "templates", "plans"])
    cpSync(join(root, name), join(own, name), { recursive: true });
  try {
    renameSync(own, folder);
  } catch (error) {
    if (!existsSync(folder)) throw error;
    rmSync(own, { recursive: true });
  } finally {
    rmSync(lock, { recursive: true, force: true });
  }
}

const filesBelow = (folder: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length))
    .sort();

/** Runs a command in this process, after earlier calls have ended. The compiled command line is loaded once; printed text is returned. */
export function rankc(...args: string[]): Promise<CliResult> {
  const answer = latest.then(() => commandHere(args));
  latest = answer.catch(() => undefined);
  return answer;
}
let latest: Promise<unknown> = Promise.resolve();

async function commandHere(args: readonly string[]): Promise<CliResult> {
  const { runCommandLine }: typeof import("../../src/cli/commandLine.ts") = await import(built("src/cli/commandLine.ts"));
  const printed: { exit: number; out: string; err: string } = { exit: 0, out: "", err: "" };
  const { NO_COLOR } = process.env;
  const streams = [
    { stream: process.stdout, to: "out" },
    { stream: process.stderr, to: "err" },
  ] as const;
  const writers = streams.map(({ stream }) => stream.write);
  for (const { stream, to } of streams)
    stream.write = (text: string | Uint8Array): boolean => {
      printed[to] += typeof text === "string" ? text : Buffer.from(text).toString();
      return true;
    };
  process.env.NO_COLOR = "1";
  try {
    await runCommandLine(args, {
      setCode: (code) => {
        printed.exit = code;
      },
      exitSoon: () => {
        throw new Error("a command that ends its process needs one of its own");
      },
    });
  } finally {
    for (const [i, { stream }] of streams.entries()) stream.write = writers[i]!;
    if (NO_COLOR === undefined) delete process.env.NO_COLOR;
    else process.env.NO_COLOR = NO_COLOR;
  }
  return printed;
}

/** Runs a command in a process of its own, as a user starts it. */
export const rankcProcess = (...args: string[]): Promise<CliResult> => rankcWith({}, ...args);

/** The same with variables of the environment. */
export function rankcWith(env: Readonly<Record<string, string>>, ...args: string[]): Promise<CliResult> {
  const child = spawn(process.execPath, [builtCli(), ...args], { env: { ...process.env, NO_COLOR: "1", ...env } });
  const printed = { out: "", err: "" };
  child.stdout.on("data", (chunk) => (printed.out += chunk));
  child.stderr.on("data", (chunk) => (printed.err += chunk));
  return new Promise((resolve) => child.on("close", (exit) => resolve({ exit, ...printed })));
}
