/** What ptxas makes of products: everything stays in registers, and nothing it says asks for another form (C75..: products of warpgroups put in a row). */
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { cudaKernels } from "../src/kernels/cuda/index.ts";
import type { Made } from "../src/kernels/kernel.ts";
import type { Arch } from "../src/target.ts";
import { adding, products, type Sizes, useOf } from "./productCases.ts";

const run = promisify(execFile);
const compiler = await run("nvcc", ["--version"]).then(
  () => "",
  () => " (skipped: nvcc is missing)",
);
describe.skipIf(compiler)(`for nvcc${compiler}`, () => {
  const ofAll = (arch: Arch, name: string, sizes: Sizes, rows: readonly number[], half: "f32" | "bf16"): Made[] =>
    products.flatMap((op) =>
      adding(op).map((adds) => {
        const of = op.startsWith("grouped") ? { ...sizes, rows } : sizes;
        return cudaKernels[op]!(useOf(`${name}_${op}${adds ? "_adds" : ""}`, op, of, half, adds), arch);
      }),
    );
  const large = { S: 1024, K: 512, N: 1024 };
  const odd = { S: 77, K: 35, N: 131 };
  const made: Record<Arch, Made[]> = {
    sm_80: [...ofAll("sm_80", "odd", odd, [5], "bf16"), ...ofAll("sm_80", "large", large, [300, 200], "bf16")],
    sm_90a: [...ofAll("sm_90a", "large", large, [300, 200], "bf16"), ...ofAll("sm_90a", "plain", large, [300], "f32")],
    sm_100a: [...ofAll("sm_100a", "large", large, [300, 200], "bf16"), ...ofAll("sm_100a", "odd", odd, [5], "f32")],
  };
  for (const [arch, kernels] of Object.entries(made))
    test(`${arch}: ${kernels.length} kernels in one file keep all they work on in registers`, { timeout: 240_000 }, async () => {
      const folder = mkdtempSync(join(tmpdir(), "rankc-gemm-"));
      try {
        writeFileSync(join(folder, "all.cu"), kernels.map((k) => k.source).join("\n"));
        const code = `arch=${arch.replace("sm", "compute")},code=${arch}`;
        const { stdout, stderr } = await run("nvcc", ["-gencode", code, "-cubin", "-Xptxas", "-v", "-o", "all.cubin", "all.cu"], {
          cwd: folder,
        });
        const said = stdout + stderr;
        expect(said.match(/\(C7\d+\).*/g)).toBeNull();
        expect(said.match(/0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/g)).toHaveLength(kernels.length);
      } finally {
        rmSync(folder, { recursive: true });
      }
    });
});
