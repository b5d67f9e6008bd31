/** Kernels of latent attention: copies between vectors of channels, and a sum over heads for channels that all heads share. */
import { render } from "../../../templates/bindings.ts";
import { join, latentKv, latentKvGrad, split } from "../../ops/latent.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import {
  alignmentsOf,
  joinSlices,
  latentKvGradSlices,
  latentKvSlices,
  operandsOfSlices,
  placed,
  type SliceCopy,
  splitSlices,
} from "../slices.ts";
import { bindingOf, type EntryPoint, foldGrid, kernel, scalar, widthOf } from "./text.ts";

const THREADS = 256;

const copy = (spec: KernelSpec, slices: SliceCopy): GeneratedKernel => {
  const { entry, text } = copySlices(spec, slices);
  return kernel(spec, [entry], [text]);
};

/** WGSL kernels of latent attention. */
export const latent = {
  split: wgslKernel(split, (spec) => copy(spec, splitSlices(spec.d))),
  join: wgslKernel(join, (spec) => copy(spec, joinSlices(spec.d))),
  latent_kv: wgslKernel(latentKv, (spec) => copy(spec, latentKvSlices(spec.d))),
  latent_kv_grad: wgslKernel(latentKvGrad, (spec) => {
    const copies = copySlices(spec, latentKvGradSlices(spec.d));
    const sum = sumHeads(spec);
    return kernel(spec, [copies.entry, sum.entry], [copies.text, sum.text]);
  }),
};

function copySlices(spec: KernelSpec, all: SliceCopy): { entry: EntryPoint; text: string } {
  const { tokens, heads } = all;
  const width = widthOf(...alignmentsOf(all));
  const { placed: slices, channels } = placed(all);
  const count = (tokens * heads * channels) / width;
  const groups = Math.ceil(count / THREADS);
  const of = (n: number) => n / width;
  const text = render("wgsl/copy_slices.wgsl", {
    ...{ op: spec.op, width, vectors: of(channels), entry: spec.name, threads: THREADS, index: foldGrid(groups).index, count },
    slices: slices.map((s) => ({
      ...{ from: s.from, to: s.to, begin: of(s.begin), source: s.shared ? `(head / ${heads}u)` : "head" },
      ...{ fromAt: of(s.fromAt), toAt: of(s.toAt), fromWidth: of(s.fromWidth), toWidth: of(s.toWidth) },
      test: s.begin === 0 ? `if (part < ${of(s.end)}u)` : s.end === channels ? "else" : `else if (part < ${of(s.end)}u)`,
    })),
  });
  const buffers = operandsOfSlices(all).map((name) => bindingOf(operandOf(spec, name), width));
  return { entry: { entry: spec.name, grid: groups, threads: THREADS, buffers }, text };
}

/** Sums the last R channels of all keys, which the heads share. */
function sumHeads(spec: SpecOf<typeof latentKvGrad>): { entry: EntryPoint; text: string } {
  const { B, S, H, R, Y } = spec.d;
  const count = B * S * R;
  const groups = Math.ceil(count / THREADS);
  const name = `${spec.name}_shared`;
  const text = render("wgsl/sum_heads.wgsl", {
    ...{ shared: R, heads: H, width: Y, first: Y - R, entry: name, threads: THREADS, index: foldGrid(groups).index, count },
    type: scalar(spec.dtype.dr),
  });
  const buffers = [bindingOf(operandOf(spec, "dk"), 1, "keys"), bindingOf(operandOf(spec, "dr"))];
  return { entry: { entry: name, grid: groups, threads: THREADS, buffers }, text };
}
