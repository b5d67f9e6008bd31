/** What latent attention moves between vectors: copies, and for what all heads share a sum over them. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { alignmentsOf, sliceCopies } from "../slices.ts";
import { type EntryPoint, foldGrid, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

const copy = (spec: KernelSpec): GeneratedKernel => {
  const { entry, text } = copies(spec);
  return kernel(spec, [entry], [text]);
};

export const latent = {
  split: copy,
  join: copy,
  latent_kv: copy,
  latent_kv_grad(spec: KernelSpec): GeneratedKernel {
    const moved = copies(spec);
    const summed = sumHeads(spec);
    return kernel(spec, [moved.entry, summed.entry], [moved.text, summed.text]);
  },
};

function copies(spec: KernelSpec): { entry: EntryPoint; text: string } {
  const parts = sliceCopies[spec.op]!(spec.d);
  const { slices, tokens, heads } = parts;
  const width = widthOf(...alignmentsOf(parts));
  const channels = slices.reduce((n, p) => n + p.length, 0);
  const count = (tokens * heads * channels) / width;
  const groups = Math.ceil(count / THREADS);
  const operands = [...new Set(slices.flatMap((p) => [p.from, p.to]))];
  let begin = 0;
  const text = render("wgsl/copy_slices.wgsl", {
    ...{ op: spec.op, width, vectors: channels / width, entry: spec.name, threads: THREADS, index: foldGrid(groups).index, count },
    slices: slices.map((p, i) => {
      const at = begin;
      begin += p.length / width;
      const of = (n: number) => n / width;
      const test = i === 0 ? `if (part < ${begin}u)` : i === slices.length - 1 ? "else" : `else if (part < ${begin}u)`;
      return {
        ...{ from: p.from, to: p.to, begin: at, test, source: p.shared ? `(head / ${heads}u)` : "head" },
        ...{ fromAt: of(p.fromAt), toAt: of(p.toAt), fromWidth: of(p.fromWidth), toWidth: of(p.toWidth) },
      };
    }),
  });
  const buffers = operands.map((arg) => ({ arg, type: vector(scalar(spec.dtype[arg]!), width) }));
  return { entry: { entry: spec.name, grid: groups, threads: THREADS, buffers }, text };
}

/** The keys' last R channels, which all heads share. */
function sumHeads(spec: KernelSpec): { entry: EntryPoint; text: string } {
  const { B, S, H, R, Y } = spec.d as Readonly<Record<"B" | "S" | "H" | "R" | "Y", number>>;
  const count = B * S * R;
  const groups = Math.ceil(count / THREADS);
  const name = `${spec.name}_shared`;
  const text = render("wgsl/sum_heads.wgsl", {
    ...{ shared: R, heads: H, width: Y, first: Y - R, entry: name, threads: THREADS, index: foldGrid(groups).index, count },
    type: scalar(spec.dtype.dr!),
  });
  const buffers = [
    { arg: "dk", name: "keys", type: scalar(spec.dtype.dk!) },
    { arg: "dr", type: scalar(spec.dtype.dr!) },
  ];
  return { entry: { entry: name, grid: groups, threads: THREADS, buffers }, text };
}
