/**
 * The bench of CUDA kernels: each generated kernel, compiled by nvcc for an H100 or H200, and all that a launch needs, in a
 * folder; then test/bench/cuda_bench.py on it, beside torch, where a GPU is. `--out FOLDER` (.rankc/bench), `--only REGEX`.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { compileOptions } from "../../runtime/cuda/kernels.ts";
import type { TensorMap } from "../../schemas/plan.ts";
import { compileCubins } from "../../src/codegen/cubins.ts";
import type { KernelArg } from "../../src/codegen/launchArgs.ts";
import { sha256 } from "../../src/plan/seal.ts";
import { root } from "../support/checkout.ts";
import { type BenchCase, type BenchKernel, benchCases } from "./cudaBenchCases.ts";

const ARCH = "sm_90a";
/** nvcc takes a GB for a large kernel. */
const COMPILERS = Math.min(8, Math.max(2, Math.floor(availableParallelism() / 2)));

const { values } = parseArgs({
  options: { out: { type: "string", default: join(root, ".rankc/bench") }, only: { type: "string", default: "" } },
});
const folder = values.out;
mkdirSync(folder, { recursive: true });

const cubinOf = ({ use, made }: BenchKernel): string => `${use.op}.${sha256(made.source).slice(0, 16)}.cubin`;
const cases = benchCases(new RegExp(values.only));
const failed = await compileAll(cases);
writeFileSync(join(folder, "cases.json"), `${JSON.stringify({ arch: ARCH, cases: cases.map(written) }, null, 1)}\n`);
if (!values.only) {
  const kept = new Set(cases.flatMap((c) => c.kernels.map(cubinOf)));
  for (const file of readdirSync(folder)) if (file.endsWith(".cubin") && !kept.has(file)) rmSync(join(folder, file));
}
process.stdout.write(`${cases.length} cases in ${folder}, ${failed.size} kernels not compiled\n`);

const missing = whatIsMissing();
if (missing)
  process.stdout.write(`Not measured: ${missing}. Where there is a GPU: python3 test/bench/cuda_bench.py ${folder} --out RESULTS\n`);
else {
  const only = values.only ? ["--only", values.only] : [];
  const script = join(root, "test/bench/cuda_bench.py");
  process.exitCode = spawnSync("python3", [script, folder, "--out", join(folder, "results"), ...only], { stdio: "inherit" }).status ?? 1;
}

/** Compiles several at once. Returns the errors of nvcc by the name of the cubin. */
async function compileAll(all: readonly BenchCase[]): Promise<Map<string, string>> {
  const printed = new Map<string, string>();
  const units = new Map(all.flatMap((c) => c.kernels.map((k) => [cubinOf(k), k.made.source] as const)));
  const queue = [...units].filter(([cubin]) => !existsSync(join(folder, cubin)));
  const work = async (): Promise<void> => {
    for (let unit = queue.shift(); unit; unit = queue.shift()) {
      const [cubin, text] = unit;
      await compileCubins(folder, [{ kernel: cubin.replace(".cubin", ""), text, cubin }], {
        arch: ARCH,
        options: compileOptions,
        onProgress: () => {},
      }).catch((error: Error) => {
        printed.set(cubin, error.message);
        process.stderr.write(`${error.message}\n`);
      });
    }
  };
  await Promise.all(Array.from({ length: COMPILERS }, work));
  return printed;
}

/** A case as the other side reads it: the launches of all its kernels in order, their arguments by the names of buffers. */
function written({ kernels, ...c }: BenchCase) {
  return {
    ...c,
    scratch: Math.max(...kernels.map((k) => k.made.scratch ?? 0)),
    launches: kernels.flatMap((k) =>
      k.made.launches.map((l) => ({ ...l, cubin: cubinOf(k), args: l.args.map((arg) => renamed(arg, k.as)) })),
    ),
    ...(kernels.some((k) => failed.has(cubinOf(k))) ? { error: "nvcc refuses a kernel" } : {}),
  };
}
function renamed(arg: KernelArg, as: Readonly<Record<string, string>>): string | TensorMap {
  if (typeof arg === "string") return as[arg] ?? arg;
  switch (arg.kind) {
    case "tensor_map":
      return { ...arg, tensor: as[arg.tensor] ?? arg.tensor };
    case "tensors":
      throw new Error("a case has no lists of tensors");
    case "rows":
    case "needed":
      return as[arg.kind] ?? arg.kind;
    case "scratch":
      return `scratch+${arg.offset}`;
    case "start":
      return `start(${arg.dim})`;
    case "block":
      return "start(block)";
    case "attribute":
      return `attr(${arg.name})`;
    default:
      return arg satisfies never;
  }
}

/** Why nothing can be measured here, or nothing. */
function whatIsMissing(): string | undefined {
  const test = "import torch\nimport cuda.bindings.driver\nassert torch.cuda.is_available(), 'torch sees no GPU'";
  const { error, status, stderr } = spawnSync("python3", ["-c", test], { encoding: "utf8" });
  if (error) return "python3 is missing";
  return status === 0 ? undefined : stderr.trim().split("\n").at(-1);
}
