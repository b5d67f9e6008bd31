/** What latent attention moves between vectors: copies, and for what all heads share a sum over them. One pass over memory. */
import { cudaArchs } from "../../../schemas/devices.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import type { CudaGenerator, GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { alignmentsOf, type SliceCopy, sliceCopies } from "../slices.ts";
import type { Arch } from "../targetNames.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

const copy = (spec: KernelSpec, arch: Arch): GeneratedKernel => {
  const { body, launch } = copies(spec, arch, sliceCopies[spec.op]!(spec.d));
  return { source: source(spec, body), launches: [launch] };
};

export const latent: Readonly<Record<string, CudaGenerator>> = {
  split: copy,
  join: copy,
  latent_kv: copy,
  latent_kv_grad(spec, arch) {
    const moved = copies(spec, arch, sliceCopies.latent_kv_grad!(spec.d));
    const summed = sumHeads(spec);
    return { source: source(spec, `${moved.body}\n${summed.body}`), launches: [moved.launch, summed.launch] };
  },
};

const THREADS = 256;

function copies(spec: KernelSpec, arch: Arch, parts: SliceCopy) {
  const { slices, tokens, heads } = parts;
  const operands = [...new Set(slices.flatMap((p) => [p.from, p.to]))];
  const type = spec.dtype[slices[0]!.from]!;
  invariant(
    operands.every((name) => spec.dtype[name] === type),
    `${spec.op} copies: all types are one`,
  );
  const vector = Math.min(...alignmentsOf(parts).map((n) => vectorOf(n, [type])));
  const channels = slices.reduce((n, p) => n + p.length, 0);
  const total = (tokens * heads * channels) / vector;
  let unroll = 4;
  while (unroll > 1 && total < THREADS * unroll * 4 * cudaArchs[arch].multiprocessors) unroll /= 2;
  let begin = 0;
  const body = render("cuda/copy_slices.cu", {
    ...{ name: spec.name, vector, unroll, threads: THREADS, heads, vectors: channels / vector, type: cudaType(type), end: total },
    index: total + THREADS * unroll < 2 ** 31 ? "u32" : "u64",
    params: operands.map((name) => `${slices.some((p) => p.to === name) ? "" : "const "}${cudaType(type)}* ${name}`).join(", "),
    slices: slices.map((p, i) => {
      const at = begin;
      begin += p.length;
      const last = i === slices.length - 1;
      return {
        ...{ from: p.from, to: p.to, fromAt: p.fromAt, toAt: p.toAt, fromWidth: p.fromWidth, toWidth: p.toWidth, begin: at },
        source: p.shared ? "(head / HEADS)" : "head",
        test: last ? "else" : `${i === 0 ? "" : "else "}if (channel < ${begin})`,
      };
    }),
  });
  const grid: [number, number, number] = [Math.ceil(total / (THREADS * unroll)), 1, 1];
  return { body, launch: { entry: spec.name, grid, threads: THREADS, shared: 0, args: operands } };
}

/** The keys' last R channels, which all heads share. */
function sumHeads(spec: KernelSpec) {
  const { B, S, H, R, Y } = spec.d as Readonly<Record<"B" | "S" | "H" | "R" | "Y", number>>;
  const entry = `${spec.name}_shared`;
  const type = spec.dtype.dk!;
  const vector = Math.min(...[R, Y, Y - R].filter((n) => n > 0).map((n) => vectorOf(n, [type, spec.dtype.dr!])));
  const lanes = R / vector;
  const strands = Math.max(1, Math.min(H, Math.floor(THREADS / lanes)));
  const threads = Math.ceil((lanes * strands) / 32) * 32;
  invariant(threads <= 1024, `${R} channels that heads share`);
  const body = render("cuda/sum_heads.cu", {
    ...{ name: entry, vector, lanes, strands, threads, heads: H, width: R, first: Y - R, stride: Y },
    ...{ type: cudaType(type), out: cudaType(spec.dtype.dr!) },
  });
  const grid: [number, number, number] = [B * S, 1, 1];
  return { body, launch: { entry, grid, threads, shared: 0, args: ["dk", "dr"] } };
}
