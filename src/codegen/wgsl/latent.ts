/** What latent attention moves between vectors: copies, and for what all heads share a sum over them. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernelSpec.ts";
import { alignmentsOf, partsOf } from "../slices.ts";
import { type Entry, fold, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

const copy = (use: Use): Made => {
  const { entry, text } = copies(use);
  return kernel(use, [entry], [text]);
};

export const latent = {
  split: copy,
  join: copy,
  latent_kv: copy,
  latent_kv_grad(use: Use): Made {
    const moved = copies(use);
    const summed = sumHeads(use);
    return kernel(use, [moved.entry, summed.entry], [moved.text, summed.text]);
  },
};

function copies(use: Use): { entry: Entry; text: string } {
  const parts = partsOf[use.op]!(use.d);
  const { pieces, tokens, heads } = parts;
  const width = widthOf(...alignmentsOf(parts));
  const channels = pieces.reduce((n, p) => n + p.length, 0);
  const count = (tokens * heads * channels) / width;
  const groups = Math.ceil(count / THREADS);
  const operands = [...new Set(pieces.flatMap((p) => [p.from, p.to]))];
  let begin = 0;
  const text = render("wgsl/parts.wgsl", {
    ...{ op: use.op, width, vectors: channels / width, entry: use.name, threads: THREADS, index: fold(groups).index, count },
    pieces: pieces.map((p, i) => {
      const at = begin;
      begin += p.length / width;
      const of = (n: number) => n / width;
      const test = i === 0 ? `if (part < ${begin}u)` : i === pieces.length - 1 ? "else" : `else if (part < ${begin}u)`;
      return {
        ...{ from: p.from, to: p.to, begin: at, test, source: p.shared ? `(head / ${heads}u)` : "head" },
        ...{ fromAt: of(p.fromAt), toAt: of(p.toAt), fromWidth: of(p.fromWidth), toWidth: of(p.toWidth) },
      };
    }),
  });
  const buffers = operands.map((arg) => ({ arg, type: vector(scalar(use.dtype[arg]!), width) }));
  return { entry: { entry: use.name, grid: groups, threads: THREADS, buffers }, text };
}

/** The keys' last R channels, which all heads share. */
function sumHeads(use: Use): { entry: Entry; text: string } {
  const { B, S, H, R, Y } = use.d as Readonly<Record<"B" | "S" | "H" | "R" | "Y", number>>;
  const count = B * S * R;
  const groups = Math.ceil(count / THREADS);
  const name = `${use.name}_shared`;
  const text = render("wgsl/sum_heads.wgsl", {
    ...{ shared: R, heads: H, width: Y, first: Y - R, entry: name, threads: THREADS, index: fold(groups).index, count },
    type: scalar(use.dtype.dr!),
  });
  const buffers = [
    { arg: "dk", name: "keys", type: scalar(use.dtype.dk!) },
    { arg: "dr", type: scalar(use.dtype.dr!) },
  ];
  return { entry: { entry: name, grid: groups, threads: THREADS, buffers }, text };
}
