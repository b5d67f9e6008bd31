/** Kernels of latent attention: copies between vectors of channels, and a sum over heads for channels that all heads share. */
import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { join, latentKv, latentKvGrad, split } from "../../ops/latent.ts";
import { invariant } from "../../ops/op.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec, operandOf, type SpecOf } from "../kernelSpec.ts";
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
import { source, vectorOf } from "./text.ts";

const copy = (spec: KernelSpec, arch: Arch, slices: SliceCopy): GeneratedKernel => {
  const { body, launch } = copySlices(spec, arch, slices);
  return { source: source(spec, body), launches: [launch] };
};

/** CUDA kernels of latent attention. */
export const latent = {
  split: cudaKernel(split, (spec, arch) => copy(spec, arch, splitSlices(spec.d))),
  join: cudaKernel(join, (spec, arch) => copy(spec, arch, joinSlices(spec.d))),
  latent_kv: cudaKernel(latentKv, (spec, arch) => copy(spec, arch, latentKvSlices(spec.d))),
  latent_kv_grad: cudaKernel(latentKvGrad, (spec, arch) => {
    const copies = copySlices(spec, arch, latentKvGradSlices(spec.d));
    const sum = sumHeads(spec);
    return { source: source(spec, `${copies.body}\n${sum.body}`), launches: [copies.launch, sum.launch] };
  }),
};

const THREADS = 256;

function copySlices(spec: KernelSpec, arch: Arch, all: SliceCopy) {
  const { tokens, heads } = all;
  const operands = operandsOfSlices(all).map((name) => operandOf(spec, name));
  const [type, ...others] = new Set(operands.map((o) => o.dtype));
  invariant(type !== undefined && others.length === 0, `${spec.op} copies between operands of different types`);
  const { placed: slices, channels } = placed(all);
  const vector = Math.min(...alignmentsOf(all).map((n) => vectorOf(n, [type])));
  const total = (tokens * heads * channels) / vector;
  let unroll = 4;
  while (unroll > 1 && total < THREADS * unroll * 4 * cudaArchs[arch].multiprocessors) unroll /= 2;
  const isOutput = (name: string) => slices.some((s) => s.to === name);
  const body = render("cuda/copy_slices.cu", {
    ...{ name: spec.name, vector, unroll, threads: THREADS, heads, vectors: channels / vector, type: cudaType(type), end: total },
    index: total + THREADS * unroll < 2 ** 31 ? "u32" : "u64",
    params: operands.map(({ name }) => `${isOutput(name) ? "" : "const "}${cudaType(type)}* ${name}`).join(", "),
    slices: slices.map(({ from, to, fromAt, toAt, fromWidth, toWidth, begin, end, shared }) => ({
      ...{ from, to, fromAt, toAt, fromWidth, toWidth, begin },
      source: shared ? "(head / HEADS)" : "head",
      test: end === channels ? "else" : `${begin === 0 ? "" : "else "}if (channel < ${end})`,
    })),
  });
  const grid: [number, number, number] = [Math.ceil(total / (THREADS * unroll)), 1, 1];
  return { body, launch: { entry: spec.name, grid, threads: THREADS, shared: 0, args: operands.map((o) => o.name) } };
}

/** Sums the last R channels of all keys, which the heads share. */
function sumHeads(spec: SpecOf<typeof latentKvGrad>) {
  const { B, S, H, R, Y } = spec.d;
  const entry = `${spec.name}_shared`;
  const types = [spec.dtype.dk, spec.dtype.dr] as const;
  const vector = Math.min(...[R, Y, Y - R].filter((n) => n > 0).map((n) => vectorOf(n, types)));
  const lanes = R / vector;
  const strands = Math.max(1, Math.min(H, Math.floor(THREADS / lanes)));
  const threads = Math.ceil((lanes * strands) / 32) * 32;
  invariant(threads <= 1024, `a block cannot sum ${R} shared channels`);
  const body = render("cuda/sum_heads.cu", {
    ...{ name: entry, vector, lanes, strands, threads, heads: H, width: R, first: Y - R, stride: Y },
    ...{ type: cudaType(types[0]), out: cudaType(types[1]) },
  });
  const grid: [number, number, number] = [B * S, 1, 1];
  return { body, launch: { entry, grid, threads, shared: 0, args: ["dk", "dr"] } };
}
