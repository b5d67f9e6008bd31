/** Kernels compiled by nvcc when the plan is: a cubin for each source, beside it. Where there is no nvcc, the host's NVRTC does it. */
import { execFile, spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder } from "../../schemas/writing.ts";

export interface Unit {
  readonly kernel: string;
  readonly text: string;
  /** The name of its cubin. */
  readonly cubin: string;
}
export interface CubinSettings {
  /** `sm_90a` */
  readonly arch: string;
  readonly options: readonly string[];
  readonly onProgress: (done: number, of: number) => void;
}

/** The version of the nvcc that would be used; undefined where there is none on the path (or at RANKC_NVCC). */
export function nvccVersion(): string | undefined {
  const { stdout, error } = spawnSync(nvcc(), ["--version"], { encoding: "utf8", timeout: 10_000 });
  return error ? undefined : /release ([\d.]+)/.exec(stdout)?.[1];
}
const nvcc = (): string => process.env.RANKC_NVCC ?? "nvcc";

/** Compiles what is not in `folder` yet: a cubin's name holds its source's digest. Throws a Trouble with the compiler's words. */
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
        const said = `${(error as { stderr?: string }).stderr ?? error}`.replaceAll(source, `kernels/${unit.kernel}.cu`);
        throw new Trouble(
          `nvcc does not compile kernel ${unit.kernel}:\n${said.trim()}`,
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

/** The cubins of all units by file; what `known` has is not compiled again. Throws a Trouble with the compiler's words. */
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
