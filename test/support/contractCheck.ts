/** Compares what a kernel computes in a case of the contract with the reference of its op. */
import { expect } from "vitest";
import { bytesOf, type Dtype } from "../../schemas/dtypes.ts";
import { tensorOf } from "../../schemas/tensorLists.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import type { ContractCase, Executor } from "./contract.ts";

/** Runs a case's kernel and compares. Fails with the first element that is off. */
export async function hold(executor: Executor, made: GeneratedKernel, c: ContractCase): Promise<void> {
  const have = await executor.run(made, c.use, c.data, c.starts);
  for (const [name, before] of Object.entries(c.data)) {
    const want = c.want[name];
    const label = `${executor.name}: ${c.title}: ${name}`;
    if (!want) expect(same(have[name]!, before), `${label} is only read`).toBe(true);
    else if (name === "rows") sameRows(have.rows as Int32Array, want as Int32Array, c.use.bound, label);
    else close(have[name]!, want, c.use, name, label);
  }
}

const same = (have: Float32Array | Int32Array, want: Float32Array | Int32Array): boolean =>
  have.length === want.length && want.every((x, i) => Object.is(have[i], x));

function sameRows(have: Int32Array, want: Int32Array, bound: number, label: string): void {
  const used = (rows: Int32Array) => [...rows.subarray(0, 1 + 3 * want[0]!), ...rows.subarray(offsetsAt(bound))];
  expect(used(have), label).toEqual(used(want));
}

/** Half a step of the last place, relative. */
const stepOf: Readonly<Record<Dtype, number>> = { f32: 2 ** -24, bf16: 2 ** -9, f16: 2 ** -12, f8e4m3: 2 ** -4, i32: 0 };

/** Ops whose NaN is a result; elsewhere it stands for what the reference leaves alone. */
const passesOnNaN = new Set(["mark_nonfinite", "clip", "clip_scaled"]);

function close(have: Float32Array | Int32Array, want: Float32Array | Int32Array, use: KernelSpec, name: string, label: string): void {
  const dtype = use.dtype[tensorOf(name).name]!;
  if (!dtype || dtype === "i32") {
    const at = want.findIndex((x, i) => have[i] !== x);
    if (at >= 0) expect.fail(`${label}[${at}] is ${have[at]}, not ${want[at]}`);
    return;
  }
  let largest = 0;
  for (const x of want) if (Number.isFinite(x) && Math.abs(x) > largest) largest = Math.abs(x);
  // f32 sums of up to some thousand terms in another order, and a device's exp, log and sqrt (WGSL allows exp 3 + 2|x| units)
  let relative = 3e-5;
  let absolute = 1e-5 * largest;
  // rounded once when stored; one step more where that falls on the other side
  relative += 3 * stepOf[dtype];
  // y is a function of the product, or of the sum, as it is stored, so that backward computes with the same values
  if (/gemm_swiglu$|rmsnorm_sum(_triple)?$/.test(use.op) && name === "y") relative += 2 * stepOf[dtype];
  // weights and their gradients enter the second product in half precision, as in every fused attention
  const halfType = Object.values(use.dtype).find((t) => bytesOf[t] === 2);
  if (use.op.startsWith("attention") && halfType) absolute += 4 * stepOf[halfType] * largest;
  for (let i = 0; i < want.length; i++) {
    if (passesOnNaN.has(use.op) && Number.isNaN(want[i]!) !== Number.isNaN(have[i]!))
      expect.fail(`${label}[${i}] is ${have[i]}, not ${want[i]}`);
    if (Number.isNaN(want[i]!) || have[i] === want[i]) continue;
    const off = Math.abs(have[i]! - want[i]!);
    if (!(off <= relative * Math.abs(want[i]!) + absolute))
      expect.fail(`${label}[${i}] is ${have[i]}, not ${want[i]} (${want.length} elements, the largest ${largest})`);
  }
}
