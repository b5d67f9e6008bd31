/** Rotary position embedding in one pass over memory. Angles have f32 precision at positions below 2^24. */

import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { frequenciesOf, ropeDocuments, rope as ropeOp } from "../../ops/rope.ts";
import { cudaKernel, type GeneratedKernel, positionText, type SpecOf } from "../kernelSpec.ts";
import { startOf } from "../launchArgs.ts";
import { f32, source, vectorOf } from "./text.ts";

/** CUDA kernels of rotary position embedding. */
export const rope = {
  rope: cudaKernel(ropeOp, (spec) => rotate(spec)),
  rope_documents: cudaKernel(ropeDocuments, (spec) => rotate(spec, true)),
};

const THREADS = 256;

/** `documents`: whether positions are counted from the first token of a document. */
function rotate(spec: SpecOf<typeof ropeOp>, documents = false): GeneratedKernel {
  const { B, S, H, C, first, width, interleaved, sign, gain, chunk, ranks } = spec.d;
  const pairs = width / 2;
  const types = [spec.dtype.x, spec.dtype.y];
  // every vector begins at a multiple of its length within a head
  const vector = Math.min(...[pairs, first, C].filter((n) => n > 0).map((n) => vectorOf(n, types)));
  const parts = pairs / vector;
  // a thread uses its angles for four heads if a token has as many; the threads of a token fit into a block
  const strands = Math.max(1, Math.min(Math.ceil(H / 4), Math.floor(THREADS / parts)));
  const threads = Math.max(THREADS, Math.ceil(parts / 32) * 32);
  const body = render("cuda/rope.cu", {
    ...{ name: spec.name, vector, pairs, parts, strands, heads: H, deep: Math.ceil(H / strands), threads },
    ...{ width: C, first: first, interleaved: String(Boolean(interleaved)) },
    ...{ x: cudaType(spec.dtype.x), y: cudaType(spec.dtype.y), tokens: B * S, sequence: S },
    documents,
    ...{ position: positionText("index", chunk, ranks), gain: f32(gain), sine: f32(sign * gain) },
    frequencies: frequenciesOf(spec.d)
      .map((frequency) => {
        const turns = frequency / (2 * Math.PI);
        const high = Math.fround(turns);
        return `{${f32(high)}, ${f32(turns - high)}}`;
      })
      .join(", "),
  });
  const grid: [number, number, number] = [Math.ceil((B * S) / Math.floor(threads / (parts * strands))), 1, 1];
  const args = ["x", "y", ...(documents ? ["documents"] : []), startOf("S")];
  return { source: source(spec, body), launches: [{ entry: spec.name, grid, threads, shared: 0, args }] };
}
