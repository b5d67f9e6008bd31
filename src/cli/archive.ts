/**
 * Writes an archive with Node, rankc, its packages and a plan. The host needs tar, xz and the system's C and C++ libraries, but no Node, npm
 * or network. Equal inputs give equal bytes.
 */
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { createWriteStream, existsSync, mkdtempSync, readdirSync, readFileSync, realpathSync, renameSync, rmSync, statSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { basename, dirname, isAbsolute, join, posix, resolve } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { indexPath } from "../../schemas/dataFiles.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { root } from "../packageFile.ts";
import { parsePlan } from "../plan/read.ts";
import { readCubin, readKernel, readPlanFile } from "./inputFiles.ts";
import { dataDirOf } from "./loadPlan.ts";
import { expectWritable } from "./outputFiles.ts";
import { type TarEntry, tar } from "./tar.ts";

/** Settings of `pack`. */
export interface PackSettings {
  /** The directory of a compiled plan, or its plan.json. */
  readonly plan: string;
  readonly out: string;
  /** The base directory of data.path and data.labels. Default: that which the plan remembers; the files are then included only if they are small. */
  readonly dataDir?: string;
  /** Operating system and processor in Node's names: `linux-x64`. */
  readonly platform?: string;
  /** xz's preset, 0 to 9. 0, the default: 35 MiB in 14 s of CPU time; 6: 28 MiB in 90 s (2 slow cores, plans/tiny-dense). */
  readonly effort?: number;
  /** Receives the number of packed files. */
  readonly onProgress?: (files: number, of: number) => void;
}

/** The archive that `pack` wrote. */
export interface Packed {
  readonly out: string;
  readonly platform: string;
  readonly bytes: number;
  readonly sha256: string;
  readonly files: number;
  /** The path of the corpus in the archive; undefined if it is not included, so that `run` needs --data-dir. */
  readonly corpus: string | undefined;
}

/** Returns the script that starts rankc: by its bundle, which a package has and the build of a checkout lacks, because it starts in half of the CPU time. */
const startScript = (dist: string): string => `#!/bin/sh
# Starts the rankc of this folder with the Node beside it.
here=$(dirname "$(readlink -f "$0")")
exec "$here/lib/node" "$here/lib/dist/${existsSync(join(dist, "cli/rankc.cjs")) ? "cli/rankc.cjs" : "src/cli/main.js"}" "$@"
`;

/** Writes the archive. Throws a Trouble if the platform differs, xz is missing, the plan is damaged or a file cannot be written. */
export async function pack({ plan: path, out, dataDir, platform = own, effort = 0, onProgress }: PackSettings): Promise<Packed> {
  if (platform !== own)
    throw new Trouble(`Node for ${platform} is not available: this machine is ${own}`, `run rankc pack on a ${platform} machine`, 3);
  expectWritable(out);
  if (spawnSync("xz", ["--version"]).error)
    throw new Trouble(
      "xz is not installed: it compresses the archive",
      "install it (Debian and Ubuntu: xz-utils; macOS: brew install xz)",
      3,
    );
  const folder = basename(path) === "plan.json" ? dirname(path) : path;
  const plan = readPlan(folder);
  const data = dataOf(plan, path, dataDir);
  const planned = filesOfPlan(plan, folder);
  const build = existsSync(new URL("tsconfig.build.json", root)) ? buildHere() : undefined;
  try {
    const home = fileURLToPath(root);
    const dist = build ?? join(home, "dist");
    const entries = [
      { path: "rankc", executable: true, read: () => Buffer.from(startScript(dist)) },
      { path: "lib/node", executable: true, read: () => readFileSync(process.execPath) },
      ...["package.json", "LICENSE"].map((name) => fileEntry(`lib/${name}`, join(home, name))),
      ...folderEntries("lib/dist", dist, needless),
      ...folderEntries("lib/schemas", join(home, "schemas"), needless),
      ...folderEntries("lib/templates", join(home, "templates"), needless),
      ...packagesOf(home).flatMap(({ place, folder }) =>
        folderEntries(`lib/${place}`, folder, (path) => needless(path) || foreign(place, path)),
      ),
      ...planned,
      ...(data ?? []),
    ];
    const top = topFolder(out);
    const { bytes, sha256 } = await compress(inFolder(top, entries, onProgress), out, effort);
    const corpus = data?.[0]?.path;
    return { out, platform, bytes, sha256, files: entries.length, corpus: corpus && `${top}/${corpus}` };
  } finally {
    if (build) rmSync(build, { recursive: true, force: true });
  }
}

/** Returns the one folder that an archive unpacks into: its file name without the ending. */
const topFolder = (out: string): string => basename(out).replace(/\.(tar(\.xz)?|txz)$/i, "") || "rankc";

/** Returns the entries below a folder; each read is reported. */
function inFolder(folder: string, entries: readonly TarEntry[], onProgress: PackSettings["onProgress"]): TarEntry[] {
  let done = 0;
  return entries.map(({ path, executable, read }) => ({
    ...{ path: `${folder}/${path}`, executable },
    read: () => {
      onProgress?.(++done, entries.length);
      return read();
    },
  }));
}

const own = `${process.platform}-${process.arch}`;

function readPlan(folder: string): Plan {
  const file = join(folder, "plan.json");
  if (!existsSync(file)) throw new Trouble(`${folder} holds no plan.json`, "name the directory that rankc compile -o wrote");
  const plan = parsePlan(readPlanFile(file), file);
  const missing = plan.kernels.find(({ source }) => source && !existsSync(join(folder, "kernels", source.file)));
  if (missing) throw new Trouble(`${folder}: kernels/${missing.source?.file} is missing`, "compile the job again");
  return plan;
}

/** Returns the entries of the plan: plan.json, plan.txt and its kernels, verified against the digests. Other files of the folder are skipped. */
function filesOfPlan(plan: Plan, folder: string): readonly TarEntry[] {
  const sources = plan.kernels.flatMap(({ source }) => source?.file ?? []);
  for (const file of sources) readKernel(plan, folder, file);
  const cubins = plan.kernels.flatMap(({ cubin }) => cubin?.file ?? []).filter((file) => readCubin(plan, folder, file));
  const texts = ["plan.json", "plan.txt"].filter((name) => existsSync(join(folder, name)));
  return [...texts, ...[...sources, ...cubins].map((file) => `kernels/${file}`)].map((name) => {
    const path = join(folder, name);
    if (!isWithin(realpathSync(path), realpathSync(folder)))
      throw new Trouble(`${path} leads out of the plan's directory`, "compile the job again, or copy what it leads to into its place");
    return fileEntry(`plan/${name}`, path);
  });
}

const isWithin = (path: string, folder: string): boolean => path.startsWith(join(folder, "/"));

/** A corpus above this size in bytes is included only with --data-dir. */
const smallCorpus = 16 * 2 ** 20;

/**
 * Returns the entries of the corpus, its index and its labels, at the paths relative to plan/ that the job names. Without `dataDir` they are
 * looked for in the directory that the plan at `planPath` remembers. If a file is missing, outside of the archive or too large: returns undefined
 * without `dataDir`, throws a Trouble with it.
 */
export function dataOf({ job }: Plan, planPath: string, dataDir: string | undefined): readonly TarEntry[] | undefined {
  const folder = dataDirOf(planPath);
  const { path, labels, sources, tokenizer } = job.data;
  const inSources = (sources ?? []).flatMap(({ path: prefix }) =>
    [".bin", ".idx"].map((end) => ({ key: "data.sources", path: `${prefix.replace(/\.(bin|idx)$/, "")}${end}`, what: "the source does" })),
  );
  const wanted = sources ? inSources : [{ key: "data.path", path, what: "the corpus does" }];
  // without its index, a Megatron data set would be read as data.dtype
  const index = sources ? undefined : indexPath(path);
  if (index !== undefined && existsSync(resolve(dataDir ?? folder, index)))
    wanted.push({ key: "data.path", path: index, what: "its index does" });
  if (tokenizer !== "bytes") wanted.push({ key: "data.tokenizer", path: tokenizer, what: "the tokenizer does" });
  if (labels !== null) wanted.push({ key: "data.labels", path: labels, what: "the labels do" });
  const files = wanted.map(({ path, ...as }) => {
    const file = resolve(dataDir ?? folder, path);
    const place = posix.normalize(posix.join("plan", path));
    // without --data-dir, files behind symbolic links are not included
    const asked = dataDir !== undefined || (existsSync(file) && realpathSync(file) === resolve(realpathSync(folder), path));
    const there = asked && existsSync(file) && statSync(file).isFile();
    return { ...as, path, file, place, there, outside: isAbsolute(path) || /^(\.\.|lib|rankc)(\/|$)/.test(place) };
  });
  if (dataDir === undefined) {
    if (!files.every(({ there, outside }) => there && !outside)) return undefined;
    if (files.reduce((bytes, { file }) => bytes + statSync(file).size, 0) > smallCorpus) return undefined;
  }
  return files.map(({ key, path, what, file, place, there, outside }) => {
    if (!there) throw new Trouble(`${file}: ${what} not exist`, `${key} starts at --data-dir`);
    if (outside) throw new Trouble(`${key} ${path} leads out of the archive`, "omit --data-dir here, and pass it to rankc run");
    return fileEntry(place, file);
  });
}

const fileEntry = (path: string, file: string): TarEntry => ({
  path,
  executable: (statSync(file).mode & 0o100) !== 0,
  read: () => readFileSync(file),
});

/** Returns all files below a folder, except those that `leftOut` selects; follows links. */
function folderEntries(place: string, folder: string, leftOut: (path: string) => boolean): readonly TarEntry[] {
  const walk = (at: string): TarEntry[] =>
    readdirSync(join(folder, at)).flatMap((name) => {
      const path = posix.join(at, name);
      if (name === "node_modules" || leftOut(path)) return [];
      return statSync(join(folder, path)).isDirectory() ? walk(path) : [fileEntry(`${place}/${path}`, join(folder, path))];
    });
  return walk("");
}

/** Returns whether a file is not needed at run time. Licences are kept. */
const needless = (path: string): boolean => /\.(ts|mts|cts|map|md|flow|c|cc|cpp|h|hh|hpp|inc|S|asm)$/.test(path);

/** Returns whether a file is a binary for another system. */
const foreign = (place: string, path: string): boolean =>
  place === "node_modules/webgpu" && /^dist\/[^/]+$/.test(path) && !path.endsWith(own) && path !== `dist/${process.platform}-universal`;

interface Manifest {
  readonly dependencies?: Readonly<Record<string, string>>;
  readonly optionalDependencies?: Readonly<Record<string, string>>;
  readonly os?: readonly string[];
  readonly cpu?: readonly string[];
}
const manifestOf = (folder: string): Manifest => JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as Manifest;

/** Returns all transitive dependencies of rankc, with the optional ones for this system. */
function packagesOf(home: string): readonly { readonly place: string; readonly folder: string }[] {
  const placed = new Map<string, string>();
  const visit = (folder: string, at: string): void => {
    const { dependencies = {}, optionalDependencies = {} } = manifestOf(folder);
    for (const name of Object.keys({ ...optionalDependencies, ...dependencies }).sort()) {
      const found = find(name, folder);
      if (name in optionalDependencies && !(found && isForHere(manifestOf(found)))) continue;
      if (!found) throw new Trouble(`the package ${name} is not installed`, "run npm ci in the folder of rankc");
      // top level, or below its user if the top level has another version
      const top = `node_modules/${name}`;
      const place = (placed.get(top) ?? found) === found ? top : `${at}${top}`;
      if (placed.has(place)) continue;
      placed.set(place, found);
      visit(found, `${place}/`);
    }
  };
  visit(home, "");
  return [...placed].map(([place, folder]) => ({ place, folder }));
}
const isForHere = ({ os, cpu }: Manifest): boolean => Boolean(os?.includes(process.platform) && cpu?.includes(process.arch));

/** Resolves a package like Node: in the node_modules of each parent directory. */
function find(name: string, from: string): string | undefined {
  for (let at = from; ; at = dirname(at)) {
    const folder = join(at, "node_modules", name);
    if (existsSync(join(folder, "package.json"))) return realpathSync(folder);
    if (at === dirname(at)) return undefined;
  }
}

/** Builds rankc from the sources of a checkout into a temporary folder, because its build may be old or missing. */
function buildHere(): string {
  const home = fileURLToPath(root);
  const compiler = find("typescript", home);
  if (!compiler)
    throw new Trouble("rankc runs from a checkout, and the compiler that builds it is not installed", "run npm ci in the checkout");
  const folder = mkdtempSync(join(tmpdir(), "rankc-build-"));
  const args = [join(compiler, "bin/tsc"), "-p", "tsconfig.build.json", "--outDir", folder, "--noCheck", "--declaration", "false"];
  try {
    execFileSync(process.execPath, args, { cwd: home, stdio: ["ignore", "pipe", "pipe"] });
  } catch (error) {
    rmSync(folder, { recursive: true, force: true });
    throw new Trouble(`rankc could not be built: ${String((error as { stdout?: unknown }).stdout)}`, "see what npm run build says");
  }
  return folder;
}

/** Compresses blocks of a fixed size in several threads; the bytes do not depend on the number of threads. */
async function compress(entries: readonly TarEntry[], out: string, effort: number): Promise<{ bytes: number; sha256: string }> {
  const threads = Math.max(2, availableParallelism());
  const filters = process.arch === "x64" ? ["--x86", `--lzma2=preset=${effort}`] : [`--lzma2=preset=${effort}`];
  const { XZ_OPT: _, XZ_DEFAULTS: __, ...env } = process.env;
  const xz = spawn("xz", ["--compress", "--stdout", "--format=xz", `--threads=${threads}`, "--block-size=24MiB", ...filters], {
    env,
    stdio: ["pipe", "pipe", "pipe"],
  });
  const temporary = `${out}.${process.pid}.tmp`;
  const hash = createHash("sha256");
  let bytes = 0;
  let errors = "";
  xz.stderr.on("data", (chunk) => (errors += chunk));
  const ended = new Promise<void>((done, fail) => {
    xz.once("error", fail);
    xz.once("close", (code) =>
      code === 0 ? done() : fail(new Trouble(`xz failed: ${errors.trim()}`, "check free memory and disk space")),
    );
  });
  async function* counted(chunks: AsyncIterable<Buffer>) {
    for await (const chunk of chunks) {
      hash.update(chunk);
      bytes += chunk.length;
      yield chunk;
    }
  }
  try {
    // report the error of xz before the error of its broken pipe
    const flows = [pipeline(Readable.from(tar(entries)), xz.stdin), pipeline(xz.stdout, counted, createWriteStream(temporary))];
    for (const result of await Promise.allSettled([ended, ...flows])) if (result.status === "rejected") throw result.reason;
    renameSync(temporary, out);
  } finally {
    rmSync(temporary, { force: true });
  }
  return { bytes, sha256: hash.digest("hex") };
}
