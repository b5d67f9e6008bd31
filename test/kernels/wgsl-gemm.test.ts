/**
 * Products in WGSL beyond the contract's small sizes: every tile, the depth in parts, and the matrix kernel, whose matrix
 * operations are spelled out here in plain WGSL, for software adapters have none.
 */
import { expect, test } from "vitest";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import { type Profile, profiles } from "../../src/codegen/targetNames.ts";
import { gemmMatrix, matrixTiles } from "../../src/codegen/wgsl/gemmMatrix.ts";
import { gemmTiles, plainTiles } from "../../src/codegen/wgsl/gemmTiles.ts";
import { wgslGenerator } from "../../src/codegen/wgsl/index.ts";
import { tilingOf } from "../../src/codegen/wgsl/matmul.ts";
import { ops } from "../../src/ops/index.ts";
import type { ContractCase } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { random } from "../support/opCases.ts";
import { products } from "../support/productCases.ts";
import { noAdapter } from "../support/softwareAdapter.ts";
import { byTier, isFull } from "../support/tiers.ts";
import { openWgslDevices } from "../support/wgslDevices.ts";

// without f16, so that f32 takes its place everywhere; Dawn validates matrix kernels
const { executor, checked } = await openWgslDevices({
  limits: { maxComputeWorkgroupStorageSize: 32768 },
  checked: {
    features: ["shader-f16", "chromium-experimental-subgroup-matrix" as GPUFeatureName],
    toggles: ["enable-dawn-features=allow_unsafe_apis"],
  },
});
const skipped = noAdapter ? ` (skipped: ${noAdapter})` : "";

const operands: Readonly<Record<string, readonly [string, string, string]>> = {
  gemm: ["x", "w", "y"],
  gemm_dgrad: ["dy", "w", "dx"],
  gemm_wgrad: ["x", "dy", "dw"],
  grouped_gemm: ["x", "w", "y"],
  grouped_dgrad: ["dy", "w", "dx"],
  grouped_wgrad: ["x", "dy", "dw"],
};
interface Sizes {
  readonly T: number;
  readonly K: number;
  readonly N: number;
  /** Rows of each expert, which are T together; the buffers hold 20 more. */
  readonly counts?: readonly number[];
}

function specFor(op: OpName, { T, K, N, counts = [] }: Sizes, half: Dtype = "f32", adds = false): KernelSpec {
  const bound = counts.length ? T + 20 : 0;
  const rows = bound || T;
  const all = { x: rows * K, dx: rows * K, y: rows * N, dy: rows * N, w: K * N * (counts.length || 1), dw: K * N * (counts.length || 1) };
  const names = operands[op]!;
  return {
    ...{ op, name: `${op}_0`, d: { B: 1, S: T, K, N, E: counts.length }, accumulates: new Set(adds ? [names[2]] : []), bound },
    size: Object.fromEntries(names.map((n) => [n, all[n as keyof typeof all]])),
    dtype: Object.fromEntries(names.map((n) => [n, n === "dw" ? "f32" : half])),
    ...{ makesRows: false, mayOverflow: false },
  };
}

/** Random operands; rows past the last are NaN. */
function caseOf(use: KernelSpec, { T, counts = [] }: Sizes): ContractCase {
  const next = random(use.size[operands[use.op]![0]]!);
  const [, , out] = operands[use.op]!;
  const data: Record<string, Float32Array> = {};
  for (const [name, size] of Object.entries(use.size)) {
    data[name] = name === out && !use.accumulates.has(out) ? new Float32Array(size) : new Float32Array(size).map(next);
    if (use.bound && "x dx y dy".split(" ").includes(name) && name !== out) data[name]!.fill(Number.NaN, (size / use.bound) * T);
  }
  const rows = new Int32Array(use.bound ? offsetsAt(use.bound) + counts.length + 1 : 1).fill(-1);
  rows[0] = T;
  let row = 0;
  for (const [e, count] of counts.entries()) {
    rows[offsetsAt(use.bound) + e] = row;
    for (let s = 0; s < count; s++) rows.set([0, row, e], 1 + 3 * row++);
  }
  if (use.bound) rows[offsetsAt(use.bound) + counts.length] = row;
  const want = { ...data, [out]: data[out]!.slice() };
  ops[use.op].cpu(want, use.d, { start: () => 0, rows });
  const exists = use.bound && out !== "dw" ? (use.size[out]! / use.bound) * T : use.size[out]!;
  return {
    ...{ title: `${use.op} of ${Object.values(use.d)}`, use, starts: {} },
    data: use.bound ? { ...data, rows } : data,
    want: { [out]: want[out]!.subarray(0, exists) },
  };
}

const odd: Sizes = { T: 133, K: 70, N: 139 };
const even: Sizes = { T: 140, K: 72, N: 132, counts: [61, 0, 79] };
// the contract has all layouts, in the tiles of small products
const inTiles = [
  ["gemm", 128, odd, false],
  ["grouped_wgrad", 128, even, true],
  ["gemm_dgrad", 64, odd, false],
  ["grouped_dgrad", 64, even, false],
] as const;
for (const { options, rows } of byTier(inTiles, ([op]) => op === "grouped_dgrad"))
  test.skipIf(noAdapter).each(rows)(`%s in tiles of %s${skipped}`, options, async (op, size, sizes, adds) => {
    const use = specFor(op, sizes, "f32", adds);
    const p = productOf(use);
    const tiles = plainTiles.filter((t) => t.bm === size && t.bn === size);
    await hold(executor!, gemmTiles(use, p, tilingOf(p, tiles)), caseOf(use, sizes));
  });

const deep = [
  ["gemm", { T: 16, K: 2051, N: 12 }, false],
  ["gemm_wgrad", { T: 4100, K: 12, N: 7 }, true],
] as const;
for (const { options, rows } of byTier(deep, ([op]) => op === "gemm"))
  test.skipIf(noAdapter).each(rows)(
    `a deep product of few tiles is summed in parts, then over the parts: %s${skipped}`,
    options,
    async (op, sizes, adds) => {
      const use = specFor(op, sizes, "f32", adds);
      const made = wgslGenerator(op)(use, "baseline");
      expect(made.launches.map((l) => l.entry)).toEqual([use.name, `${use.name}_sum`]);
      expect(made.launches[0]!.grid[0]).toBeGreaterThan(1);
      await hold(executor!, made, caseOf(use, sizes));
    },
  );

// with f32 in place of f16, tiles take twice the memory: the larger one is tried with half its depth
const onMatrixUnits = [
  ["gemm", 128, { T: 130, K: 18, N: 132 }],
  ["gemm_wgrad", 64, { T: 70, K: 40, N: 72 }],
  ["grouped_dgrad", 64, { T: 70, K: 36, N: 68, counts: [31, 0, 39] }],
  ["grouped_wgrad", 64, { T: 70, K: 36, N: 68, counts: [31, 0, 39] }],
] as const;
for (const { options, rows } of byTier(onMatrixUnits, ([op]) => op === "gemm_wgrad"))
  test.skipIf(noAdapter).each(rows)(`%s on matrix units, in tiles of %s${skipped}`, options, async (op, size, sizes) => {
    const use = specFor(op, sizes, "f16");
    const p = productOf(use);
    const tiles = matrixTiles.filter((t) => t.bm === size).map((t) => ({ ...t, bk: size > 64 ? 16 : t.bk }));
    const made = gemmMatrix(use, p, tilingOf(p, tiles));
    await hold(executor!, { ...made, source: spelledOut(made.source) }, caseOf(use, sizes));
  });

/** Sizes of real products; in the fast tier those that are multiples of nothing. */
const large = (
  [
    [4096, 4096, 4096],
    [2048, 512, 1000],
    [8192, 2048, 8],
  ] as const
).filter(([, , N]) => isFull || N === 1000);
test.each(profiles)("kernels of real sizes compile: webgpu:%s", async (profile) => {
  for (const op of products)
    for (const half of profile === "baseline" ? (["f32"] as const) : (["f16", "f32"] as const))
      for (const [T, K, N] of large) {
        const counts = op.startsWith("grouped") ? Array.from({ length: 8 }, () => T / 8) : undefined;
        const made = wgslGenerator(op)(specFor(op, { T, K, N, ...(counts && { counts }) }, half, op.endsWith("wgrad")), profile);
        expect(await compiled(made, profile), `${op} ${half} ${T} ${K} ${N}`).toEqual([]);
      }
});

/** Returns the errors of Dawn for a kernel. Matrix kernels need more workgroup memory than Dawn has without a device, so no pipeline is made of them. */
async function compiled(made: GeneratedKernel, profile: Profile): Promise<string[]> {
  checked.pushErrorScope("validation");
  const module = checked.createShaderModule({ code: made.source });
  const { messages } = await module.getCompilationInfo();
  for (const { entry } of profile === "matrix" ? [] : made.launches)
    checked.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
  const wrong = await checked.popErrorScope();
  return [...messages.map((m) => `${m.lineNum}:${m.linePos} ${m.message}`), ...(wrong ? [wrong.message] : [])];
}

test("large products use large tiles, small ones small tiles", () => {
  const tileOf = (op: OpName, sizes: Sizes, tiles: Parameters<typeof tilingOf>[1] = plainTiles) => {
    const { tile, parts } = tilingOf(productOf(specFor(op, sizes, "f16")), tiles);
    return `${tile.bm}x${tile.bn}${parts > 1 ? ` in ${parts}` : ""}`;
  };
  expect(tileOf("gemm", { T: 4096, K: 4096, N: 4096 })).toBe("128x128");
  expect(tileOf("gemm", { T: 64, K: 64, N: 64 })).toBe("32x32");
  expect(tileOf("gemm", { T: 8192, K: 4096, N: 8 })).toBe("64x16");
  expect(tileOf("gemm_wgrad", { T: 8192, K: 256, N: 256 })).toBe("64x64 in 8");
  expect(tileOf("grouped_wgrad", { T: 8192, K: 2048, N: 1536, counts: [4096, 4096] })).toBe("128x128");
});

/** The same kernel without matrix operations: an operand is where it lies, and each lane of a subgroup has every 32nd sum. */
function spelledOut(source: string): string {
  const body = source
    .replace(/enable chromium.*\n|diagnostic.*\n/g, "")
    .replace(
      /subgroupMatrixLoad<subgroup_matrix_\w+<f16, 16, 16>, (row|col)_major>\(&stage_\w, (.*), (\d+u)\)/g,
      (_, major, at, stride) => `vec3<u32>(${at}, ${major === "row" ? `${stride}, 1u` : `1u, ${stride}`})`,
    )
    .replace(/(\w+) = subgroupMatrixMultiplyAccumulate\((\w+), (\w+), \1\);/g, "multiply(lane, &$1, $2, $3);")
    .replace(
      /subgroupMatrixStore<row_major>\(&sums, (.*), (\w+), (\d+u)\);/g,
      "for (var i = 0u; i < 8u; i++) { sums[$1 + (lane + i * 32u) / 16u * $3 + lane % 16u] = $2[i]; }",
    )
    // words of 8 halves
    .replaceAll("vec4<u32>", "array<vec4<f16>, 2>")
    .replace(/bitcast<vec4<f16>>\((\w+)\.(xy|zw)\)/g, (_, word, part) => `${word}[${part === "xy" ? 0 : 1}]`)
    .replace(/subgroup_matrix_result<f32, 16, 16>/g, "array<f32, 8>");
  expect(body).not.toMatch(/subgroup_?[mM]atrix/);
  return `${body}
    // of a matrix: where it begins, and how far it is to the next row and to the next column
    fn multiply(lane: u32, sums_here: ptr<function, array<f32, 8>>, a: vec3<u32>, b: vec3<u32>) {
      for (var i = 0u; i < 8u; i++) {
        let row = (lane + i * 32u) / 16u;
        let column = lane % 16u;
        for (var k = 0u; k < 16u; k++) {
          (*sums_here)[i] += f32(stage_a[a.x + row * a.y + k * a.z]) * f32(stage_b[b.x + k * b.y + column * b.z]);
        }
      }
    }`;
}
