import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { newtonSchulz } from "../../ops/newtonSchulz.ts";
import * as ops from "../../ops/optimizer.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, scratch } from "../launchArgs.ts";
import { distinct, newtonSchulzSteps, orthogonalizeSizes } from "../orthogonalizeSizes.ts";
import { f32, source } from "./text.ts";

const TILE = 64;

function makeOrthogonalize(spec: KernelSpec<"x" | "y", "K" | "N">, matrices: number): GeneratedKernel {
  const { rows, columns, short, long, parts, at, words } = orthogonalizeSizes(spec, matrices);
  const steps = newtonSchulzSteps(spec);
  const body = render("cuda/orthogonalize.cu", {
    ...{ name: spec.name, tile: TILE, matrices, rows, columns, short, long, parts, x: cudaType(spec.dtype.x) },
    ...{ alongShort: rows < columns ? columns : 1, alongLong: rows < columns ? 1 : columns },
    steps: distinct(steps, ({ suffix }) => suffix).map(({ a, b, c, suffix }) => ({ a: f32(a), b: f32(b), c: f32(c), suffix })),
    eps: f32(newtonSchulz.eps),
  });
  const inScratch = (word: number): KernelArg => scratch(word * bytesOf.f32);
  const launch = (entry: string, threads: number, down: number, across: number, args: readonly KernelArg[]): GeneratedLaunch => ({
    ...{ entry: `${spec.name}_${entry}`, grid: [across, down, matrices], threads, shared: 0, args },
  });
  const tiles = (n: number): number => Math.ceil(n / TILE);
  const product = (entry: string, width: number, args: readonly KernelArg[]): GeneratedLaunch =>
    launch(entry, (TILE / 4) ** 2, tiles(short), tiles(width), args);
  const of = { x: inScratch(at.x), y: "y" };
  return {
    source: source(spec, body),
    scratch: words * bytesOf.f32,
    launches: [
      launch("norm", 256, 1, parts, ["x", inScratch(at.parts)]),
      launch("scale", 256, 1, parts, ["x", inScratch(at.parts), of.x]),
      ...steps.flatMap(({ from, to, suffix }) => [
        product("gram", short, [of[from], inScratch(at.gram)]),
        product(`factor${suffix}`, short, [inScratch(at.gram), inScratch(at.factor)]),
        product(`next${suffix}`, long, [of[from], inScratch(at.factor), of[to]]),
      ]),
    ],
  };
}

/** CUDA kernels of Muon. */
export const orthogonalize = {
  orthogonalize: cudaKernel(ops.orthogonalize, (spec) => makeOrthogonalize(spec, 1)),
  orthogonalize_experts: cudaKernel(ops.orthogonalizeExperts, (spec) => makeOrthogonalize(spec, spec.d.E)),
};
