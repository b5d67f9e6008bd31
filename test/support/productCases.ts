/** Products of any sizes as cases of the contract: every op with weights, given rows of experts, and NaN where no kernel may read. */
import type { OpName } from "../../schemas/opNames.ts";
import { type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { ops } from "../../src/ops/index.ts";
import type { Operand } from "../../src/ops/op.ts";
import { dimSize } from "../../src/ops/signature.ts";
import { type ContractCase, rounded } from "./contract.ts";
import { random } from "./opCases.ts";

type Half = "f32" | "bf16" | "f16";
export interface Sizes {
  readonly S?: number;
  readonly K: number;
  readonly N: number;
  /** Rows of each expert. */
  readonly rows?: readonly number[];
  /** Operands are rounded to TF32. */
  readonly tf32?: 1;
}
export const products = ["gemm", "gemm_dgrad", "gemm_wgrad", "grouped_gemm", "grouped_dgrad", "grouped_wgrad"] as const;
/** Outputs that a plan may let add to what is there: gradients of weights. */
export const adding = (op: OpName): boolean[] => (op.endsWith("wgrad") ? [false, true] : [false]);

const namesOf = (op: OpName): [string, string, string] =>
  op.endsWith("wgrad") ? ["x", "dy", "dw"] : op.endsWith("dgrad") ? ["dy", "w", "dx"] : ["x", "w", "y"];

/** The spec of a product for a generator. The bound exceeds the rows by `spare`. */
export function specFor(
  name: string,
  op: OpName,
  { S = 0, K, N, rows, tf32 }: Sizes,
  half: Half,
  adds = false,
  spare = 29,
  sums: Half = "f32",
): KernelSpec {
  const bound = rows ? rows.reduce((a, b) => a + b, 0) + spare : 0;
  const height = rows ? bound : S;
  const weights = K * N * (rows?.length ?? 1);
  const names = namesOf(op);
  return {
    ...{ op, name, bound, makesRows: false, mayOverflow: false },
    d: { B: 1, S: height, K, N, E: rows?.length ?? 1, ...(tf32 && { tf32 }) },
    size: { x: height * K, dx: height * K, dy: height * N, y: height * N, w: weights, dw: weights },
    dtype: Object.fromEntries(names.map((n) => [n, n === "dw" ? sums : half])),
    accumulates: new Set(adds ? [names[2]] : []),
  };
}

/** A product with its buffers and what the reference makes of them. Rows beyond the count hold NaN: no kernel may read them. */
export function caseOf(name: string, op: OpName, sizes: Sizes, half: Half, adds = false, spare = 29, sums: Half = "f32"): ContractCase {
  const use = specFor(name, op, sizes, half, adds, spare, sums);
  const { bound, d, size, dtype } = use;
  const { rows } = sizes;
  const next = random(name.length * 31 + d.K!);
  const count = rows ? bound - spare : 0;
  const names = namesOf(op);
  const output = names[2];
  const data: Record<string, Float32Array | Int32Array> = {};
  for (const n of names) {
    const values = new Float32Array(size[n]!).map(() => (n === output && !adds ? 0 : next()));
    if (rows && n !== output && n !== "w") values.fill(Number.NaN, (values.length / bound) * count);
    data[n] = rounded(values, dtype[n]!);
  }
  const index = rows ? indexOfRows(rows, bound) : new Int32Array(1).fill(-1);
  if (rows) data.rows = index;
  const after = Object.fromEntries(names.map((n) => [n, (data[n] as Float32Array).slice()]));
  ops[op].cpu(after, d, { start: () => 0, rows: index });
  const exists = rows && output !== "dw" ? (size[output]! / bound) * count : size[output]!;
  return {
    title: `${name}: ${op} ${half}${adds ? " adding" : ""} ${JSON.stringify(sizes)}`,
    ...{ use, data, starts: {}, want: { [output]: after[output]!.subarray(0, exists) } },
  };
}

/** A sum of input gradients of products of `depths`, as a fused op computes it. */
export function sumCaseOf(
  name: string,
  op: OpName,
  { S = 0, K, rows, tf32, depths }: Omit<Sizes, "N"> & { readonly depths: readonly number[] },
  half: Half,
): ContractCase {
  const spare = 29;
  const count = rows?.reduce((a, b) => a + b, 0) ?? S;
  const bound = rows ? count + spare : 0;
  const height = rows ? bound : S;
  const next = random(name.length * 37 + K);
  const data: Record<string, Float32Array | Int32Array> = {};
  const d: Record<string, number> = { B: 1, S: height, K, E: rows?.length ?? 1, ...(tf32 && { tf32 }) };
  for (const [i, depth] of depths.entries()) {
    d[["N", "F", "D"][i]!] = depth;
    const dy = new Float32Array(height * depth).map(next);
    data[`dy${i + 1}`] = rounded(dy.fill(Number.NaN, count * depth), half);
    data[`w${i + 1}`] = rounded(new Float32Array(K * depth * (rows?.length ?? 1)).map(next), half);
  }
  const index = rows ? indexOfRows(rows, bound) : new Int32Array(1);
  const dx = new Float32Array(height * K);
  ops[op].cpu({ ...(data as Record<string, Float32Array>), dx }, d, { start: () => 0, rows: index });
  data.dx = new Float32Array(height * K);
  const names = Object.keys(data);
  return {
    title: `${name}: ${op} ${half} ${JSON.stringify({ S, K, rows, depths })}`,
    use: {
      ...{ op, name, d, bound, makesRows: false, mayOverflow: false, accumulates: new Set() },
      size: Object.fromEntries(names.map((n) => [n, data[n]!.length])),
      dtype: Object.fromEntries(names.map((n) => [n, half])),
    },
    data: rows ? { ...data, rows: index } : data,
    starts: {},
    want: { dx: dx.subarray(0, count * K) },
  };
}

/** A fused op of products whose widths are N or K. Rows beyond the count hold NaN. */
export function fusedCaseOf(
  name: string,
  op: OpName,
  { S = 0, K, N, rows }: Sizes,
  half: Half,
  adds = false,
  sums: Half = "f32",
): ContractCase {
  const spare = 29;
  const count = rows?.reduce((a, b) => a + b, 0) ?? S;
  const bound = rows ? count + spare : 0;
  const d = { B: 1, S: rows ? bound : S, K, N, F: N, E: rows?.length ?? 1 };
  const next = random(name.length * 41 + K);
  const index = rows ? indexOfRows(rows, bound) : new Int32Array(1);
  const { inputs, outputs } = ops[op];
  const widthOf = (o: Operand): number => o.dimSpecs.slice(o.ragged).reduce((n, slot) => n * dimSize(slot, d), 1);
  const typeOf = (o: Operand): Half => (/^dw/.test(o.name) ? sums : widthOf(o) === 1 ? "f32" : half);
  const data: Record<string, Float32Array | Int32Array> = {};
  for (const o of inputs) {
    const values = new Float32Array(widthOf(o) * (o.ragged ? bound : 1)).map(next);
    data[o.name] = rounded(o.ragged ? values.fill(Number.NaN, count * widthOf(o)) : values, typeOf(o));
  }
  const results = Object.fromEntries(
    outputs.map((o) => [
      o.name,
      rounded(
        new Float32Array(widthOf(o) * (o.ragged ? bound : 1)).map(() => (adds ? next() : 0)),
        typeOf(o),
      ),
    ]),
  );
  const after = Object.fromEntries(Object.entries(results).map(([n, x]) => [n, x.slice()]));
  ops[op].cpu({ ...(data as Record<string, Float32Array>), ...after }, d, { start: () => 0, rows: index });
  Object.assign(data, results);
  const operands = [...inputs, ...outputs];
  return {
    title: `${name}: ${op} ${half} ${JSON.stringify({ S, K, N, rows })}`,
    use: {
      ...{ op, name, d, bound, makesRows: false, mayOverflow: false, accumulates: new Set(adds ? outputs.map((o) => o.name) : []) },
      size: Object.fromEntries(operands.map((o) => [o.name, data[o.name]?.length ?? 0])),
      dtype: Object.fromEntries(operands.map((o) => [o.name, typeOf(o)])),
    },
    data: rows ? { ...data, rows: index } : data,
    starts: {},
    want: Object.fromEntries(
      outputs.map((o) => [o.name, after[o.name]?.subarray(0, o.ragged ? count * widthOf(o) : undefined) ?? new Float32Array()]),
    ),
  };
}

/** The index of the rows of each expert, in order. */
function indexOfRows(rows: readonly number[], bound: number): Int32Array {
  const index = new Int32Array(offsetsAt(bound) + rows.length + 1).fill(-1);
  let at = 0;
  for (const [e, n] of rows.entries()) {
    index[offsetsAt(bound) + e] = at;
    for (let i = 0; i < n; i++, at++) index.set([0, at, e], 1 + 3 * at);
  }
  index[offsetsAt(bound) + rows.length] = at;
  index[0] = at;
  return index;
}
