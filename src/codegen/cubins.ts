/** Compilation of CUDA sources to cubins by nvcc at the time the plan is compiled. Without nvcc, the host compiles the sources by NVRTC at start. */
import { execFile, spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder } from "../../schemas/writing.ts";

/** One CUDA source to compile. */
export interface Unit {
  readonly kernel: string;
  readonly text: string;
  /** File name of the cubin. */
  readonly cubin: string;
}
/** Architecture and options of nvcc, and a callback that receives the number of compiled units. */
export interface CubinSettings {
  /** For example `sm_90a`. */
  readonly arch: string;
  readonly options: readonly string[];
  readonly onProgress: (done: number, of: number) => void;
}

/** Returns the version of nvcc (RANKC_NVCC, or `nvcc` on the path); undefined if it does not run. */
export function nvccVersion(): string | undefined {
  const { stdout, error } = spawnSync(nvcc(), ["--version"], { encoding: "utf8", timeout: 10_000 });
  return error ? undefined : /release ([\d.]+)/.exec(stdout)?.[1];
}
const nvcc = (): string => process.env.RANKC_NVCC ?? "nvcc";

/** Compiles the units whose cubins are not in `folder`; the name of a cubin contains the digest of its source. Throws a Trouble with the output of nvcc. */
export async function compileCubins(folder: string, units: readonly Unit[], { arch, options, onProgress }: CubinSettings): Promise<void> {
  makeFolder(folder);
  const left = units.filter((u) => !existsSync(join(folder, u.cubin)));
  const own = mkdtempSync(join(tmpdir(), "rankc-cubins-"));
  let done = units.length - left.length;
  const flags = [`-gencode=arch=compute_${arch.slice(3)},code=${arch}`, "-cubin", ...options];
  const work = async (): Promise<void> => {
    for (let unit = left.shift(); unit; unit = left.shift()) {
      const [source, made] = [join(own, `${unit.kernel}.cu`), join(own, unit.cubin)];
      writeFileSync(source, unit.text);
      try {
        await promisify(execFile)(nvcc(), [...flags, "-o", made, source], { maxBuffer: 2 ** 24 });
      } catch (error) {
        const message = `${(error as { stderr?: string }).stderr ?? error}`.replaceAll(source, `kernels/${unit.kernel}.cu`);
        throw new Trouble(
          `nvcc does not compile kernel ${unit.kernel}:\n${message.trim()}`,
          "this is a bug in rankc, or nvcc is too old: --no-cubins leaves it to the host",
        );
      }
      copyFileSync(made, join(folder, unit.cubin));
      onProgress(++done, units.length);
    }
  };
  try {
    await Promise.all(Array.from({ length: availableParallelism() }, work));
  } finally {
    rmSync(own, { recursive: true, force: true });
  }
}

/** Returns the cubins of all units by file name. Cubins that `known` returns are not compiled. Throws a Trouble with the output of nvcc. */
export async function makeCubins(
  units: readonly Unit[],
  { known, ...settings }: CubinSettings & { readonly known: (file: string) => Uint8Array | undefined },
): Promise<Map<string, Uint8Array>> {
  const folder = mkdtempSync(join(tmpdir(), "rankc-cubins-"));
  try {
    for (const { cubin } of units) {
      const bytes = known(cubin);
      if (bytes) writeFileSync(join(folder, cubin), bytes);
    }
    await compileCubins(folder, units, settings);
    return new Map(units.map(({ cubin }) => [cubin, readFileSync(join(folder, cubin))]));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
