/**
 * ptxas compiles products and attention at the sizes of real jobs without spills, and without a warning about their form (C75..: products of
 * warpgroups that it serializes).
 */
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { type Arch, archs } from "../../schemas/devices.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import type { GeneratedKernel } from "../../src/codegen/kernelSpec.ts";
import { ops } from "../../src/ops/index.ts";
import { adding, fusedCaseOf, products, type Sizes, specFor } from "../support/productCases.ts";
import { byTier, full } from "../support/tiers.ts";

const run = promisify(execFile);
const compiler = await run("nvcc", ["--version"]).then(
  () => "",
  () => " (skipped: nvcc is missing)",
);
describe.skipIf(compiler)(`for nvcc${compiler}`, () => {
  const ofAll = (arch: Arch, name: string, sizes: Sizes, rows: readonly number[], half: "f32" | "bf16" | "f16"): GeneratedKernel[] =>
    products.flatMap((op) =>
      adding(op).map((adds) => {
        const of = op.startsWith("grouped") ? { ...sizes, rows } : sizes;
        return cudaKernels[op](specFor(`${name}_${op}${adds ? "_adds" : ""}`, op, of, half, adds), arch);
      }),
    );
  const large = { S: 1024, K: 512, N: 1024 };
  const odd = { S: 77, K: 35, N: 131 };
  const made: Record<Arch, GeneratedKernel[]> = {
    sm_80: [...ofAll("sm_80", "odd", odd, [5], "bf16"), ...ofAll("sm_80", "large", large, [300, 200], "bf16")],
    sm_86: ofAll("sm_86", "large", large, [300, 200], "bf16"),
    sm_89: ofAll("sm_89", "large", large, [300, 200], "bf16"),
    sm_90a: [...ofAll("sm_90a", "large", large, [300, 200], "bf16"), ...ofAll("sm_90a", "plain", large, [300], "f32")],
    sm_100a: [...ofAll("sm_100a", "large", large, [300, 200], "bf16"), ...ofAll("sm_100a", "odd", odd, [5], "f32")],
  };
  // enough tiles of 128 x 128 for the kernel with asynchronous copies
  const many = { S: 2048, K: 512, N: 2048 };
  const f32 = (["sm_80", "sm_86", "sm_90a"] as const).map((arch) => {
    const plain = ofAll(arch, "many", many, [1024, 1024], "f32");
    return [arch, [...plain, ...ofAll(arch, "many_tf32", { ...many, tf32: 1 }, [1024, 1024], "f32")]] as const;
  });
  for (const { options, rows } of byTier(f32, ([arch]) => arch === "sm_90a"))
    test.each(rows)("%s: products of f32 and in TF32 compile without register spills", options, staysInRegisters);
  const f16: Record<Arch, GeneratedKernel[]> = {
    sm_80: ofAll("sm_80", "large_f16", large, [300, 200], "f16"),
    sm_86: ofAll("sm_86", "large_f16", large, [300, 200], "f16"),
    sm_89: ofAll("sm_89", "large_f16", large, [300, 200], "f16"),
    sm_90a: [...ofAll("sm_90a", "large_f16", large, [300, 200], "f16"), ...ofAll("sm_90a", "odd_f16", odd, [5], "f16")],
    sm_100a: ofAll("sm_100a", "large_f16", large, [300, 200], "f16"),
  };
  for (const { options, rows } of byTier(Object.entries(made), ([arch]) => arch === "sm_100a"))
    test.each(rows)("%s: products compile without register spills", options, staysInRegisters);
  // grouped_dgrad_swiglu keeps two values of a tile in local memory: 16 bytes, which are stored and loaded once a tile
  test("sm_90a: products with an epilogue and pairs of products compile without register spills", full, () =>
    staysInRegisters(
      "sm_90a",
      (["gemm_swiglu", "grouped_gemm_swiglu", "gemm_dgrad_swiglu", "gemm_pair", "gemm_wgrad_pair", "grouped_wgrad_pair"] as const).map(
        (op) => {
          const sizes = op.startsWith("grouped") ? { K: 512, N: 768, rows: [300, 200] } : { S: 512, K: 768, N: 512 };
          return cudaKernels[op](fusedCaseOf(`fused_${op}`, op, sizes, "bf16").use, "sm_90a");
        },
      ),
    ),
  );
  test.each(Object.entries(f16))("%s: products of f16 compile without register spills", full, staysInRegisters);

  const whole = { S: 4096, U: 4096, chunk: 0, ranks: 1 };
  // eight ranks' keys here, or another rank's
  const gathered = { S: 1024, U: 8192, chunk: 512, ranks: 8 };
  const piece = { ...gathered, U: 1024 };
  const attentions = (arch: Arch, half: "bf16" | "f16", drops: boolean): GeneratedKernel[] =>
    (
      [
        { op: "attention", C: 192, W: 128, ...whole },
        { op: "attention", C: 192, W: 128, ...gathered },
        { op: "attention", C: 128, W: 128, ...gathered },
        { op: "attention", C: 64, W: 64, ...gathered },
        { op: "attention", C: 256, W: 256, ...whole },
        { op: "attention", C: 256, W: 256, ...gathered },
        { op: "attention_part", C: 192, W: 128, ...piece },
        { op: "attention_part", C: 128, W: 128, ...piece },
        { op: "attention_part", C: 96, W: 96, ...piece },
        { op: "attention_part", C: 64, W: 64, ...piece, chunk: 0 },
        { op: "attention", C: 64, W: 64, ...whole },
        { op: "attention_dropout", C: 192, W: 128, ...whole },
        { op: "attention_dropout", C: 128, W: 128, ...gathered },
        { op: "attention_dropout", C: 64, W: 64, ...whole },
        { op: "attention_dropout", C: 256, W: 256, ...whole },
        { op: "attention_dropout_part", C: 128, W: 128, ...piece },
        { op: "attention_dropout_part", C: 64, W: 64, ...piece, chunk: 0 },
      ] as const
    ).flatMap(({ op, ...d }, i) =>
      (op.includes("dropout") === drops ? [op, `${op}_grad` as const] : []).map((op) => {
        const operands = [...ops[op].inputs, ...ops[op].outputs].map((o) => o.name);
        return cudaKernels[op](
          {
            ...{ op, name: `${op}_${i}`, d: { B: 2, G: 8, M: 4, scale: 0.1, drop: 0.1, ...d }, accumulates: new Set() },
            // kernels of attention take their sizes from the dims
            size: Object.fromEntries(operands.map((n) => [n, 0])),
            ...{
              dtype: Object.fromEntries(operands.map((n) => [n, n === "lse" ? "f32" : n === "sample" ? "i32" : half])),
            },
            ...{ bound: 0, makesRows: false, mayOverflow: false },
          },
          arch,
        );
      }),
    );
  const both = archs.flatMap((arch) => [[arch, "bf16"] as const, [arch, "f16"] as const]);
  test.each(both)("%s: attention in %s compiles without register spills", full, (arch, half) =>
    staysInRegisters(arch, attentions(arch, half, false)),
  );
  // the draws of several random words overlap: Hopper's kernels keep addresses of outputs in local memory, and of the gradient a few values of a step
  test.each(both)("%s: attention with dropout in %s compiles with few register spills", full, (arch, half) =>
    staysInRegisters(arch, attentions(arch, half, true), arch === "sm_90a" ? 32 : 0),
  );
});

/** Fails if an entry has more than `most` bytes of stack. */
async function staysInRegisters(arch: string, kernels: readonly GeneratedKernel[], most = 0): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "rankc-registers-"));
  try {
    writeFileSync(join(folder, "all.cu"), kernels.map((k) => k.source).join("\n"));
    const code = `arch=${arch.replace("sm", "compute")},code=${arch}`;
    const options = ["-std=c++17", "-gencode", code, "-cubin", "-Xptxas", "-v", "-o", "all.cubin", "all.cu"];
    const { stdout, stderr } = await run("nvcc", options, { cwd: folder, maxBuffer: 1 << 26 });
    const printed = stdout + stderr;
    expect(printed.match(/\(C7\d+\).*/g)).toBeNull();
    const entries = kernels.reduce((n, k) => n + new Set(k.launches.map((l) => l.entry)).size, 0);
    const stacks = [...printed.matchAll(/(\d+) bytes stack frame, \d+ bytes spill stores/g)].map(([, bytes]) => Number(bytes));
    expect(stacks).toHaveLength(entries);
    expect(Math.max(...stacks)).toBeLessThanOrEqual(most);
  } finally {
    rmSync(folder, { recursive: true });
  }
}
