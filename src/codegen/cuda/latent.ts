/** What latent attention moves between vectors: copies, and for what all heads share a sum over them. One pass over memory. */
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import type { CudaMaker, Made, Use } from "../kernelSpec.ts";
import { alignmentsOf, type Parts, partsOf } from "../slices.ts";
import type { Arch } from "../targetNames.ts";
import { cudaType, processors, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

const copy = (use: Use, arch: Arch): Made => {
  const { body, launch } = copies(use, arch, partsOf[use.op]!(use.d));
  return { source: source(use, body), launches: [launch] };
};

export const latent: Readonly<Record<string, CudaMaker>> = {
  split: copy,
  join: copy,
  latent_kv: copy,
  latent_kv_grad(use, arch) {
    const moved = copies(use, arch, partsOf.latent_kv_grad!(use.d));
    const summed = sumHeads(use);
    return { source: source(use, `${moved.body}\n${summed.body}`), launches: [moved.launch, summed.launch] };
  },
};

const THREADS = 256;

function copies(use: Use, arch: Arch, parts: Parts) {
  const { pieces, tokens, heads } = parts;
  const operands = [...new Set(pieces.flatMap((p) => [p.from, p.to]))];
  const type = use.dtype[pieces[0]!.from]!;
  invariant(
    operands.every((name) => use.dtype[name] === type),
    `${use.op} copies: all types are one`,
  );
  const vector = Math.min(...alignmentsOf(parts).map((n) => vectorOf(n, [type])));
  const channels = pieces.reduce((n, p) => n + p.length, 0);
  const total = (tokens * heads * channels) / vector;
  let unroll = 4;
  while (unroll > 1 && total < THREADS * unroll * 4 * processors[arch]) unroll /= 2;
  let begin = 0;
  const body = render("cuda/parts.cu", {
    ...{ name: use.name, vector, unroll, threads: THREADS, heads, vectors: channels / vector, type: cudaType(type), end: total },
    index: total + THREADS * unroll < 2 ** 31 ? "u32" : "u64",
    params: operands.map((name) => `${pieces.some((p) => p.to === name) ? "" : "const "}${cudaType(type)}* ${name}`).join(", "),
    pieces: pieces.map((p, i) => {
      const at = begin;
      begin += p.length;
      const last = i === pieces.length - 1;
      return {
        ...{ from: p.from, to: p.to, fromAt: p.fromAt, toAt: p.toAt, fromWidth: p.fromWidth, toWidth: p.toWidth, begin: at },
        source: p.shared ? "(head / HEADS)" : "head",
        test: last ? "else" : `${i === 0 ? "" : "else "}if (channel < ${begin})`,
      };
    }),
  });
  const grid: [number, number, number] = [Math.ceil(total / (THREADS * unroll)), 1, 1];
  return { body, launch: { entry: use.name, grid, threads: THREADS, shared: 0, args: operands } };
}

/** The keys' last R channels, which all heads share. */
function sumHeads(use: Use) {
  const { B, S, H, R, Y } = use.d as Readonly<Record<"B" | "S" | "H" | "R" | "Y", number>>;
  const entry = `${use.name}_shared`;
  const type = use.dtype.dk!;
  const vector = Math.min(...[R, Y, Y - R].filter((n) => n > 0).map((n) => vectorOf(n, [type, use.dtype.dr!])));
  const lanes = R / vector;
  const strands = Math.max(1, Math.min(H, Math.floor(THREADS / lanes)));
  const threads = Math.ceil((lanes * strands) / 32) * 32;
  invariant(threads <= 1024, `${R} channels that heads share`);
  const body = render("cuda/sum_heads.cu", {
    ...{ name: entry, vector, lanes, strands, threads, heads: H, width: R, first: Y - R, stride: Y },
    ...{ type: cudaType(type), out: cudaType(use.dtype.dr!) },
  });
  const grid: [number, number, number] = [B * S, 1, 1];
  return { body, launch: { entry, grid, threads, shared: 0, args: ["dk", "dr"] } };
}
