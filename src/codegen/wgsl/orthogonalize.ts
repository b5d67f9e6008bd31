/** Kernels of Newton–Schulz iterations (Muon): tiled products, several dispatches for each iteration. */
import { render } from "../../../templates/bindings.ts";
import { newtonSchulz } from "../../ops/newtonSchulz.ts";
import * as ops from "../../ops/optimizer.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, wgslKernel } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { distinct, newtonSchulzSteps, orthogonalizeSizes } from "../orthogonalizeSizes.ts";
import { THREADS, totalOver } from "./reduce.ts";
import { type Binding, bindingOf, type EntryPoint, float, kernel, scratchBytes } from "./text.ts";

const TILE = 32;

function makeOrthogonalize(spec: KernelSpec<"x" | "y", "K" | "N">, matrices: number): GeneratedKernel {
  const { rows, columns, short, long, parts, at, words } = orthogonalizeSizes(spec, matrices);
  const steps = newtonSchulzSteps(spec);
  const matrix = rows * columns;
  const scratch: Binding = { arg: scratchStart, name: "scratch", type: "f32" };
  const [x, y]: [Binding, Binding] = [bindingOf(operandOf(spec, "x")), { arg: "y", type: "f32" }];
  const entry = (name: string, grid: [number, number], buffers: readonly Binding[]): EntryPoint => ({
    ...{ entry: `${spec.name}_${name}`, grid: [...grid, matrices], threads: THREADS, buffers },
  });
  const tiles = (n: number): number => Math.ceil(n / TILE);
  /** Returns the index of element (i, k) of X, seen as short × long. */
  const place = (i: string, k: string): string => (rows < columns ? `(${i}) * ${columns}u + ${k}` : `(${k}) * ${columns}u + ${i}`);
  const copyOf = {
    x: (index: string) => `scratch[${at.x}u + group.z * ${matrix}u + ${index}]`,
    y: (index: string) => `y[group.z * ${matrix}u + ${index}]`,
  };
  const square = (from: number, i: string, k: string): string =>
    `scratch[${from}u + group.z * ${short * short}u + (${i}) * ${short}u + ${k}]`;
  /** Sources of the entries by name: X lies in scratch and in the output in turns. */
  const products = [
    ...(["x", "y"] as const).map((from) => ({
      ...{ entry: `${spec.name}_gram_${from}`, depth: long, down: short, across: short },
      left: copyOf[from](place("m0 + lead", "k")),
      right: copyOf[from](place("n0 + lead", "k")),
      store: `${square(at.gram, "m", "n")} = sums[j];`,
    })),
    ...distinct(steps, ({ suffix }) => suffix).map(({ b, c, suffix }) => ({
      ...{ entry: `${spec.name}_factor${suffix}`, depth: short, down: short, across: short },
      left: square(at.gram, "m0 + lead", "k"),
      right: square(at.gram, "n0 + lead", "k"),
      store: `${square(at.factor, "m", "n")} = ${float(b)} * ${square(at.gram, "m", "n")} + ${float(c)} * sums[j];`,
    })),
    ...distinct(steps, ({ from, suffix }) => from + suffix).map(({ from, to, a, suffix }) => ({
      ...{ entry: `${spec.name}_next_${from}${suffix}`, depth: short, down: short, across: long },
      left: square(at.factor, "m0 + lead", "k"),
      right: copyOf[from](place("k", "n0 + lead")),
      store: `${copyOf[to](place("m", "n"))} = ${float(a)} * ${copyOf[from](place("m", "n"))} + sums[j];`,
    })),
  ];
  const entries = [
    entry("norm", [parts, 1], [x, scratch]),
    entry("scale", [parts, 1], [x, scratch]),
    ...steps.flatMap(({ from, suffix }) => [
      entry(`gram_${from}`, [tiles(short), tiles(short)], from === "x" ? [scratch] : [y, scratch]),
      entry(`factor${suffix}`, [tiles(short), tiles(short)], [scratch]),
      entry(`next_${from}${suffix}`, [tiles(long), tiles(short)], [y, scratch]),
    ]),
  ];
  const text = render("wgsl/orthogonalize.wgsl", {
    ...{ entry: spec.name, matrices, rows, columns, short, long, matrix, parts, products },
    ...{ stride: parts * THREADS, xAt: at.x, eps: float(newtonSchulz.eps) },
  });
  return kernel(spec, entries, [totalOver(THREADS), text], scratchBytes(words));
}

/** WGSL kernels of Muon. */
export const orthogonalize = {
  orthogonalize: wgslKernel(ops.orthogonalize, (spec) => makeOrthogonalize(spec, 1)),
  orthogonalize_experts: wgslKernel(ops.orthogonalizeExperts, (spec) => makeOrthogonalize(spec, spec.d.E)),
};
