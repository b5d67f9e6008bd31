/**
 * Finds and loads NVIDIA's libraries. A library is loaded at its first use, so this folder can be imported on any machine. A library that an
 * environment variable names is used, or is reported as unusable: no other is tried.
 */
import { existsSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import type { LibraryHandle } from "koffi";
import { Trouble } from "../../schemas/trouble.ts";

/** A library of NVIDIA. */
export type Library = "cuda" | "nvrtc" | "nccl";

/** A place that was tried, and why it failed. */
export type Attempt = { readonly place: string; readonly failed: string };
/** An open library. */
export type FoundLibrary = {
  readonly path: string;
  readonly handle: LibraryHandle;
  /** Libraries that it loads at run time; the loader finds them only if they are loaded already or on its path. */
  readonly companions: readonly LibraryHandle[];
};
/** A library that was not found. */
export type Missing = { readonly missing: string; readonly fix: string; readonly tried: readonly Attempt[] };

const libraries: Record<Library, { env: string; files: readonly string[]; companion?: string; probe: string; what: string; fix: string }> =
  {
    cuda: {
      env: "RANKC_LIBCUDA",
      files: ["libcuda.so.1"],
      probe: "cuInit",
      what: "the NVIDIA driver's library",
      fix: "install the NVIDIA driver (nvidia-smi must work); a container needs the GPUs passed in, as with docker run --gpus all",
    },
    nvrtc: {
      env: "RANKC_LIBNVRTC",
      files: ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
      companion: "libnvrtc-builtins.so",
      probe: "nvrtcVersion",
      what: "NVIDIA's runtime compiler",
      fix: "install the CUDA toolkit, or pip install nvidia-cuda-nvrtc-cu12 for a driver of CUDA 12, nvidia-cuda-nvrtc for 13",
    },
    nccl: {
      env: "RANKC_LIBNCCL",
      files: ["libnccl.so.2"],
      probe: "ncclGetVersion",
      what: "NVIDIA's library of collectives",
      fix: "install the package libnccl2, or pip install nvidia-nccl-cu12 for a driver of CUDA 12, nvidia-nccl-cu13 for 13",
    },
  };

/** Returns the foreign function interface, loaded at its first use. Throws a Trouble if it cannot be loaded. */
export function koffi(): typeof import("koffi") {
  try {
    return createRequire(import.meta.url)("koffi");
  } catch (error) {
    throw new Trouble(
      `koffi, which calls native libraries, cannot be loaded on ${process.platform}-${process.arch}: ${firstLine(error)}`,
      "install the npm packages again on this machine, optional ones too",
      3,
    );
  }
}

/** Returns the open library. Throws a Trouble that lists every place that was tried. */
export function openLibrary(library: Library): FoundLibrary {
  const found = findLibrary(library);
  if ("handle" in found) return found;
  const tried = found.tried.map(({ place, failed }) => `\n  ${place}: ${failed}`).join("");
  throw new Trouble(`${found.missing}; tried:${tried}`, found.fix, 3);
}

/** Cache of open libraries: for a bare name the loader returns a library that is loaded already. */
const inUse = new Map<string, FoundLibrary>();

/** Returns the open library, or the places that were tried. */
export function findLibrary(library: Library): FoundLibrary | Missing {
  const named = process.env[libraries[library].env];
  const key = `${library} ${named ?? ""}`;
  const result = inUse.get(key) ?? lookFor(library, named);
  if ("handle" in result) inUse.set(key, result);
  return result;
}

function lookFor(library: Library, named: string | undefined): FoundLibrary | Missing {
  const { env, files, what, fix } = libraries[library];
  if (named) {
    const opened = open(library, named);
    if (typeof opened !== "string") return opened;
    return {
      missing: `${env} names ${named}, which cannot be used as ${what}`,
      fix: `set ${env} to the path of ${files[0]}, or leave it unset`,
      tried: [{ place: named, failed: opened }],
    };
  }
  const tried: Attempt[] = [];
  for (const { place, paths } of places(library)) {
    if (paths.length === 0) tried.push({ place, failed: existsSync(place) ? `holds no ${files.join(" or ")}` : "does not exist" });
    for (const path of paths) {
      const opened = open(library, path);
      if (typeof opened !== "string") return opened;
      tried.push({ place: path, failed: opened });
    }
  }
  return { missing: `${what} (${files[0]}) was not found`, fix: `${fix}; or set ${env} to its path`, tried };
}

/** Returns the open library, or the reason why it cannot be used. */
function open(library: Library, path: string): FoundLibrary | string {
  const { load } = koffi();
  const { probe, companion } = libraries[library];
  const beside = companion === undefined || !path.includes("/") ? [] : newestFirst(dirname(path), companion);
  let handle: LibraryHandle;
  let companions: LibraryHandle[];
  try {
    handle = load(path);
    companions = beside.map((file) => load(file));
  } catch (error) {
    return firstLine(error).replace(/^Failed to load shared library: /, "");
  }
  try {
    handle.symbol(probe);
  } catch {
    handle.unload();
    return `is a library without ${probe}`;
  }
  return { path, handle, companions };
}

const firstLine = (error: unknown): string => (error instanceof Error ? error.message : String(error)).split("\n")[0]!;

type LibraryPath = { readonly place: string; readonly paths: readonly string[] };

function* places(library: Library): Generator<LibraryPath> {
  const { files } = libraries[library];
  const within = (place: string, folders: readonly string[]): LibraryPath => ({
    place,
    paths: folders.flatMap((folder) => files.map((file) => join(folder, file))).filter((path) => existsSync(path)),
  });
  // the loader finds a bare name in its cache, in LD_LIBRARY_PATH, and in the system's folders
  for (const file of files) yield { place: file, paths: [file] };
  if (library === "cuda") {
    // neither the toolkit nor a wheel contains the driver; containers and WSL mount it in folders that the loader may not search
    for (const folder of ["/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/wsl/lib"]) yield within(folder, [folder]);
    return;
  }
  for (const folder of libraryFolders()) yield within(folder, [folder]);
  for (const packages of pythonPackages()) {
    const wheels = join(packages, "nvidia");
    yield within(
      wheels,
      newestFirst(wheels, "").map((wheel) => join(wheel, "lib")),
    );
  }
}

const given = (...paths: readonly (string | undefined)[]): string[] => paths.flatMap((path) => path || []);

function libraryFolders(): Set<string> {
  const { CUDA_HOME, CUDA_PATH, CONDA_PREFIX } = process.env;
  const toolkits = [...given(CUDA_HOME, CUDA_PATH), "/usr/local/cuda", ...newestFirst("/usr/local", "cuda-")];
  return new Set([...toolkits.map((toolkit) => join(toolkit, "lib64")), ...given(CONDA_PREFIX).map((prefix) => join(prefix, "lib"))]);
}

/** Returns the folders of Python packages, those of the active environment first. */
function pythonPackages(): Set<string> {
  const { VIRTUAL_ENV, CONDA_PREFIX, PATH, PYTHONPATH } = process.env;
  const split = (paths: string | undefined): string[] => given(...(paths ?? "").split(delimiter));
  // an environment may be in use without activation: its python3 is on the path
  const onPath = split(PATH)
    .filter((bin) => existsSync(join(bin, "python3")))
    .map((bin) => dirname(bin));
  const prefixes = [...given(VIRTUAL_ENV, CONDA_PREFIX), ...onPath, "/usr/local", "/usr", join(homedir(), ".local")];
  const installed = prefixes
    .flatMap((prefix) => newestFirst(join(prefix, "lib"), "python3"))
    .flatMap((python) => ["site-packages", "dist-packages"].map((packages) => join(python, packages)))
    .filter((packages) => existsSync(packages));
  return new Set([...installed, ...split(PYTHONPATH)]);
}

/** Returns the entries of a folder with this prefix, python3.12 before python3.9; none if the folder cannot be read. */
function newestFirst(folder: string, prefix: string): string[] {
  try {
    return readdirSync(folder)
      .filter((name) => name.startsWith(prefix))
      .sort((a, b) => b.localeCompare(a, "en", { numeric: true }))
      .map((name) => join(folder, name));
  } catch {
    return [];
  }
}
