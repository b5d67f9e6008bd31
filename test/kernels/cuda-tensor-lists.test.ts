/**
 * Kernels of tensor lists: one launch on tensors of many sizes gives each the bits that its own launch gives it, and a sum of all their elements that is
 * right within f32. Sizes are multiples of nothing, multiples of a vector, and several blocks. Emulated in any order of threads; on a device too.
 */
import { describe, expect, test } from "vitest";
import type { Arch } from "../../schemas/devices.ts";
import { bytesOf } from "../../schemas/dtypes.ts";
import { listedName } from "../../schemas/tensorLists.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import type { KernelSpec } from "../../src/codegen/kernelSpec.ts";
import { mapFormulaOps, ops } from "../../src/ops/index.ts";
import type { AnyOp } from "../../src/ops/op.ts";
import { type Buffers, type ContractCase, casesOf, type Executor } from "../support/contract.ts";
import { cudaDevice, firstGpu } from "../support/cudaDevice.ts";
import { type Compiled, cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { byTier, isFull } from "../support/tiers.ts";

const operandsOf = ({ inputs, outputs }: AnyOp) => [...inputs, ...outputs];
/** The ops that may have lists: elementwise or sums, of operands of any shape and scalars. */
const listOps = Object.keys(mapFormulaOps(() => undefined))
  .map((name) => ops[name as keyof typeof ops])
  .filter((op) => operandsOf(op).some((o) => o.any) && operandsOf(op).every((o) => o.any || o.dimSpecs.length === 0));

/** A list of the tensors of cases of one op, types and attributes, with the scalars of the first. */
interface List {
  readonly spec: KernelSpec;
  readonly data: Readonly<Buffers>;
  /** Each tensor alone. */
  readonly single: readonly { readonly spec: KernelSpec; readonly data: Readonly<Buffers> }[];
}

function listsOf(op: AnyOp): List[] {
  const groups = new Map<string, ContractCase[]>();
  for (const c of casesOf(op, "bf16")) {
    if (c.use.bound > 0) continue;
    const key = JSON.stringify([c.use.dtype, [...c.use.accumulates], (op.attrs ?? []).map((a) => c.use.d[a])]);
    groups.set(key, [...(groups.get(key) ?? []), c]);
  }
  return [...groups.values()].map((cases, n) => listOf(op, cases, n));
}

function listOf(op: AnyOp, cases: readonly ContractCase[], n: number): List {
  const [first] = cases;
  if (!first) throw new Error(`${op.name} has no cases`);
  const { dtype, accumulates, d } = first.use;
  const data: Buffers = {};
  const size: Record<string, number> = {};
  for (const [at, c] of cases.entries())
    for (const { name, any } of operandsOf(op)) {
      const own = (any ? c : first).data[name];
      if (!own || !(any || at === 0)) continue;
      data[listedName(name, at)] = own;
      size[listedName(name, at)] = own.length;
    }
  const attrs = Object.fromEntries((op.attrs ?? []).flatMap((a) => (d[a] === undefined ? [] : [[a, d[a]]])));
  const spec = (name: string, sizes: KernelSpec["size"]): KernelSpec => ({
    ...{ op: first.use.op, name: `${op.name}_${n}_${name}`, d: attrs, size: sizes, dtype, accumulates, bound: 0 },
    ...{ makesRows: false, mayOverflow: false },
  });
  const single = cases.map((_, at) => {
    const own = Object.fromEntries(
      operandsOf(op).map(({ name, any }) => [name, data[any ? listedName(name, at) : name] ?? new Float32Array()]),
    );
    return { spec: spec(String(at), Object.fromEntries(Object.entries(own).map(([name, x]) => [name, x.length]))), data: own };
  });
  return { spec: { ...spec("list", size), tensors: cases.length }, data, single };
}

const made = (spec: KernelSpec, arch: Arch): Compiled => ({ use: spec, made: cudaKernels[spec.op](spec, arch) });
const bitsOf = (x: Float32Array | Int32Array | undefined): Uint8Array => new Uint8Array(x?.slice().buffer ?? new ArrayBuffer());

/** Runs all lists of an op, and each of their tensors alone, and compares. */
async function holds(op: AnyOp, arch: Arch, executorOf: (kernels: readonly Compiled[]) => Executor): Promise<void> {
  const lists = (isFull ? listsOf(op) : listsOf(op).slice(-1)).map((list) => ({
    ...list,
    kernel: made(list.spec, arch),
    kernels: list.single.map(({ spec }) => made(spec, arch)),
  }));
  const executor = executorOf(lists.flatMap(({ kernel, kernels }) => [kernel, ...kernels]));
  for (const { spec, data, single, kernel, kernels } of lists) {
    const got = await executor.run(kernel.made, spec, data, {});
    let added = 0;
    for (const [at, { spec: own, data: alone }] of single.entries()) {
      const want = await executor.run(kernels[at]?.made ?? kernel.made, own, alone, {});
      for (const { name, any } of operandsOf(op)) {
        const label = `${op.name} ${Object.values(spec.dtype).join(".")}, ${name} of tensor ${at}, ${own.size[name]} elements`;
        if (any) expect(Buffer.compare(bitsOf(got[listedName(name, at)]), bitsOf(want[name])), label).toBe(0);
        else if (op.outputs.some((o) => o.name === name)) added += (want[name]?.[0] ?? 0) - (alone[name]?.[0] ?? 0);
      }
    }
    for (const { name, any } of op.outputs)
      if (!any) expect(Math.abs(((got[name]?.[0] ?? 0) - (data[name]?.[0] ?? 0)) / added - 1), `${op.name} ${name}`).toBeLessThan(1e-5);
  }
}

test("lists have tensors of one element to several blocks, and such that a vector does not divide", () => {
  expect(listOps.map(({ name }) => name)).toEqual(
    expect.arrayContaining(["sum_squares", "adamw", "adamw_cast", "sgd_momentum_cast", "cast"]),
  );
  const sizes = listsOf(ops.adamw_cast).flatMap(({ spec, single }) =>
    single.map((s) => (s.spec.size.g ?? 0) % (16 / bytesOf[spec.dtype.y ?? "f32"])),
  );
  expect(sizes.filter((rest) => rest > 0).length).toBeGreaterThan(5);
  expect(sizes.filter((rest) => rest === 0).length).toBeGreaterThan(5);
});

test("a tensor of more than 2^31 vectors has indices of 64 bits, a sum few blocks", () => {
  const size = 2 ** 34 + 1;
  const spec = (op: "adamw" | "sum_squares", dtype: KernelSpec["dtype"]): KernelSpec => ({
    ...{ op, name: "many", d: { beta1: 0.9, beta2: 0.9, eps: 0, decay: 0, scale: 1 }, dtype, tensors: 2, bound: 0 },
    size: Object.fromEntries(Object.keys(dtype).flatMap((name) => [[name, 5] as const, [`${name}.1`, size] as const])),
    ...{ accumulates: new Set(["w", "m", "v", "y"].filter((name) => name in dtype)), makesRows: false, mayOverflow: false },
  });
  const f32 = (...names: string[]) => Object.fromEntries(names.map((name) => [name, "f32" as const]));
  const [update, sum] = [
    cudaKernels.adamw(spec("adamw", f32("g", "scale", "lr", "step", "w", "m", "v")), "sm_90a"),
    cudaKernels.sum_squares(spec("sum_squares", f32("g", "y")), "sm_90a"),
  ];
  for (const { source } of [update, sum]) expect(source).toContain("using Index = u64;");
  expect(update.launches[0]?.grid[0]).toBe(1 + 2 ** 34 / 4 / (2 * 256));
  expect(sum.launches[0]?.grid[0]).toBeLessThan(40 * 132);
});

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  for (const { options, rows } of byTier(listOps, ({ name }) => ["sum_squares", "adamw_cast", "sgd_momentum"].includes(name)))
    test.each(rows)("$name of a list does what it does on each tensor", options, (op) =>
      holds(op, "sm_90a", (kernels) => cudaEmulator(kernels, [0, 1, 12345])),
    );
});

const gpu = firstGpu();
const none = typeof gpu === "string";
describe.skipIf(none)(`on a device${none ? ` (skipped: ${gpu})` : `: ${gpu.name}`}`, () => {
  test.each(listOps)("$name of a list does what it does on each tensor", async (op) => {
    if (!none) await holds(op, gpu.arch, (kernels) => cudaDevice(gpu, kernels));
  });
});
