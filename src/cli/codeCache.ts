/**
 * Keeps the machine-independent code that V8 compiles from the bundle, so that a later command does not compile it again. Node 22.8 has this
 * built in (`enableCompileCache`); for Node 20 this file compiles the files of the bundle as scripts with V8's cached data. V8 refuses data of
 * another version of itself. Failures are ignored: the code is compiled again.
 */
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import Module, { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { constants, Script } from "node:vm";
import { cacheFolder } from "./cacheFolder.ts";

/** CPU microseconds above which a command is long: its code has functions that a short one never called. */
const LONG = 500_000;

/** What Node calls to run a CommonJS file. */
interface Compiles {
  _compile(this: NodeModule, content: string, file: string): unknown;
}

/** Caches the code of the bundle's files that are loaded from now on. */
export function cacheCode(): void {
  const folder = cacheFolder();
  if (folder === undefined) return;
  const { enableCompileCache } = Module as { enableCompileCache?: (folder: string) => unknown };
  if (enableCompileCache) enableCompileCache(join(folder, "code"));
  else compileFrom(folder);
}

function compileFrom(folder: string): void {
  const bundle = dirname(fileURLToPath(import.meta.url));
  // the validator of plans, which the build writes beside the bundle
  const folders = [bundle, join(bundle, "../src/plan")];
  /** The scripts of this command, and whether their cached code is that of a long command. */
  const scripts: { readonly file: string; readonly script: Script; readonly cached: "long" | "short" | undefined }[] = [];
  const prototype = Module.prototype as unknown as Compiles;
  const compile = prototype._compile;
  prototype._compile = function (content, file) {
    if (!folders.includes(dirname(file))) return compile.call(this, content, file);
    const [cached, cachedData] = codeOf(folder, file);
    const importModuleDynamically = constants.USE_MAIN_CONTEXT_DEFAULT_LOADER;
    const script = new Script(Module.wrap(content), { filename: file, cachedData, importModuleDynamically });
    scripts.push({ file, script, cached: script.cachedDataRejected === false ? cached : undefined });
    return script.runInThisContext().call(this.exports, this.exports, createRequire(file), this, file, dirname(file));
  };
  process.once("exit", () => {
    const kind = process.cpuUsage().user > LONG ? "long" : "short";
    for (const { file, script, cached } of scripts)
      if (cached === undefined || (kind === "long" && cached === "short")) store(nameOf(folder, file, kind), script);
  });
}

const nameOf = (folder: string, file: string, kind: "long" | "short"): string => join(folder, `code-${kind}-${basename(file)}`);

/** Returns the cached code of a file, that of a long command first. */
function codeOf(folder: string, file: string): readonly ["long" | "short" | undefined, Buffer | undefined] {
  for (const kind of ["long", "short"] as const)
    try {
      return [kind, readFileSync(nameOf(folder, file, kind))];
    } catch {
      // not cached yet
    }
  return [undefined, undefined];
}

function store(name: string, script: Script): void {
  try {
    const temporary = `${name}.${process.pid}.tmp`;
    writeFileSync(temporary, script.createCachedData(), { mode: 0o600 });
    renameSync(temporary, name);
  } catch {
    // a full or read-only disk
  }
}
