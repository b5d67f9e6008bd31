/**
 * nvcc compiles every CUDA source for each architecture without a warning, and keeps all values of a kernel in registers: no spills, no
 * stack. NVRTC, which compiles at run time, compiles them too. The sources are those of the contract's cases and of the example plans.
 */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { compileOptions } from "../../runtime/cuda/kernels.ts";
import { findLibrary } from "../../runtime/cuda/libraries.ts";
import { compileBeside } from "../../runtime/cuda/nvrtc.ts";
import { type Arch, archs } from "../../schemas/devices.ts";
import { type OpName, opNames } from "../../schemas/opNames.ts";
import { makeCubins } from "../../src/codegen/cubins.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { ops } from "../../src/ops/index.ts";
import { root } from "../support/checkout.ts";
import { casesOf } from "../support/contract.ts";
import { byTier, full } from "../support/tiers.ts";

const run = promisify(execFile);
const version = await run("nvcc", ["--version"]).then(
  ({ stdout }) => /V[\d.]+/.exec(stdout)?.[0] ?? "unknown",
  () => undefined,
);
const cache = join(root, "node_modules/.cache/rankc-nvcc");

/** Returns the messages of the compiler for concatenated sources; cached by their digest. */
async function printed(sources: readonly string[], arch: Arch): Promise<string> {
  const text = sources.join("\n");
  const digest = createHash("sha256").update(`${version} ${arch} ${text}`).digest("hex");
  const known = join(cache, `${digest}.txt`);
  if (existsSync(known)) return readFileSync(known, "utf8");
  const folder = mkdtempSync(join(tmpdir(), "rankc-nvcc-"));
  try {
    writeFileSync(join(folder, "all.cu"), text);
    const code = arch.slice(3);
    // of a template's constants an instance may need only some
    const options = [
      "-std=c++17",
      "-diag-suppress=177",
      `-gencode=arch=compute_${code},code=sm_${code}`,
      "-cubin",
      "-Xptxas",
      "-v",
      "-o",
      "all.cubin",
      "all.cu",
    ];
    const { stdout, stderr } = await run("nvcc", options, { cwd: folder, maxBuffer: 1 << 26 }).catch((error) => {
      throw new Error(`nvcc refuses a source for ${arch}:\n${String(error.stderr).slice(0, 4000)}`);
    });
    mkdirSync(cache, { recursive: true });
    writeFileSync(known, stdout + stderr);
    return stdout + stderr;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The kernels that do not keep to their registers, the warnings, and how many kernels there are. */
function faults(text: string): { kernels: number; spills: string[]; warnings: string[] } {
  const reports = text.split("Compiling entry function '").slice(1);
  const spills = reports.flatMap((report) => {
    const [, name] = /^(\w+)'/.exec(report)!;
    const [, stack, stores, loads] = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(report)!;
    const isClean = [stack, stores, loads].every((n) => n === "0");
    return isClean || isAllowed(name ?? "", Number(stack)) ? [] : [`${name}: ${stack} bytes of stack, ${stores} spilled`];
  });
  return { kernels: reports.length, spills, warnings: text.split("\n").filter((line) => /warning|C75\d\d/.test(line)) };
}

/**
 * Kernels that may keep a few bytes a thread, `bytes` of stack at most, in local memory. ptxas gives them 64 registers, so that four blocks of 256 threads fill a
 * multiprocessor; with more registers and fewer blocks nothing is spilled (orthogonalize: 140 registers, one block).
 */
const spillsAllowed: readonly { readonly kernels: RegExp; readonly bytes: number }[] = [
  { kernels: /^rmsnorm_grad_add_/, bytes: 8 },
  { kernels: /^orthogonalize_.*_factor/, bytes: 16 },
  { kernels: /^grouped_dgrad_swiglu_/, bytes: 16 },
];
const isAllowed = (name: string, bytes: number): boolean => spillsAllowed.some((a) => a.kernels.test(name) && bytes <= a.bytes);

async function expectClean(sources: readonly string[], arch: Arch): Promise<void> {
  const { kernels, spills, warnings } = faults(await printed(sources, arch));
  expect(kernels).toBeGreaterThanOrEqual(sources.length);
  expect(warnings).toEqual([]);
  expect(spills).toEqual([]);
}

/** Of each op and mixture of types a small case and a large one; in f16 those that have it. */
const contractSources = (arch: Arch, half: "bf16" | "f16", of: readonly OpName[] = opNames): string[] =>
  of.flatMap((op) =>
    casesOf(ops[op], half)
      .filter((c) => /: (odd|large),/.test(c.title) && (half === "bf16" || Object.values(c.use.dtype).includes(half)))
      .map((c, i) => cudaKernels[op]({ ...c.use, name: `${op}_${i}` }, arch).source),
  );

async function planSources(name: string, arch: Arch): Promise<string[]> {
  const path = join(root, "plans", name, "job.yaml");
  const { job } = readJob(readFileSync(path, "utf8"), path);
  return [...compile(job!, { target: await loadTarget(`cuda:${arch}`) }).sources.values()];
}

describe.skipIf(!version)(`nvcc ${version ?? "(skipped: nvcc is missing)"}`, () => {
  describe.each(archs)("for %s", (arch) => {
    test.each(["bf16", "f16"] as const)("compiles the sources of the contract, with %s", full, (half) =>
      expectClean(contractSources(arch, half), arch),
    );

    const plans = readdirSync(join(root, "plans"));
    // a multiprocessor of sm_86 takes the fewest threads and blocks
    for (const { options, rows } of byTier(plans, (name) => name === "tiny-dense" && (arch === "sm_90a" || arch === "sm_86")))
      test.each(rows)("compiles the sources of plans/%s", options, async (name) => expectClean(await planSources(name, arch), arch));
  });
});

test.skipIf(!version)("a cubin does not depend on the folder of its source: kernels with tables", async () => {
  const { job } = readJob(readFileSync(join(root, "plans/tiny-dense/job.yaml"), "utf8"), "job.yaml");
  if (!job) throw new Error("plans/tiny-dense is invalid");
  const { plan, sources } = compile(job, { target: await loadTarget("cuda:sm_90a") });
  const units = ["rope", "adamw_cast", "sum_squares"].flatMap((op) => {
    const kernel = plan.kernels.find((k) => k.op === op);
    const text = kernel?.source && sources.get(kernel.source.file);
    return kernel && text ? [{ kernel: kernel.id, cubin: `${kernel.id}.cubin`, text }] : [];
  });
  expect(units.length).toBeGreaterThan(1);
  const made = () => makeCubins(units, { arch: "sm_90a", options: compileOptions, onProgress: () => undefined, known: () => undefined });
  const [first, second] = [await made(), await made()];
  for (const { cubin } of units) expect(Buffer.from(first.get(cubin) ?? []).equals(Buffer.from(second.get(cubin) ?? [])), cubin).toBe(true);
});

const nvrtc = findLibrary("nvrtc");
const noNvrtc = "missing" in nvrtc;
const options = [...compileOptions, "--diag-suppress=177"];

describe.skipIf(noNvrtc)(`NVRTC${noNvrtc ? ` (skipped: ${nvrtc.missing})` : ""}`, () => {
  const expectImage = async (sources: readonly string[], name: string): Promise<void> => {
    const image = await compileBeside(sources.join("\n"), { arch: "sm_90a", name, options });
    expect(image.length).toBeGreaterThan(0);
  };

  // NVRTC has no headers: sources that it compiles need none
  test("compiles the sources of plans/tiny-mixtral", async () => expectImage(await planSources("tiny-mixtral", "sm_90a"), "tiny-mixtral"));

  test("compiles a generic lambda in a kernel", () =>
    expectImage(
      [`extern "C" __global__ void twice(float* x) { auto add = [&](auto& to, auto by) { to += by; }; add(x[threadIdx.x], x[0]); }`],
      "twice",
    ));

  test.each(opNames)("takes the contract's sources of %s", full, (op) => expectImage(contractSources("sm_90a", "bf16", [op]), op));
});
