/** Rotary position embedding in one pass over memory. Angles have f32 precision at positions below 2^24. */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType, type Dtype } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { headNormRope, headNormRopeGrad } from "../../ops/fused.ts";
import { frequenciesOf, ropeDocuments, rope as ropeOp } from "../../ops/rope.ts";
import { cudaKernel, type GeneratedKernel, operandOf, positionText, type SpecOf } from "../kernelSpec.ts";
import { scratchStart, startOf } from "../launchArgs.ts";
import { sumColumns } from "./reduce.ts";
import { f32, source, vectorOf } from "./text.ts";

/** CUDA kernels of rotary position embedding. */
export const rope = {
  rope: cudaKernel(ropeOp, (spec) => rotate(spec)),
  rope_documents: cudaKernel(ropeDocuments, (spec) => rotate(spec, true)),
  head_norm_rope: cudaKernel(headNormRope, (spec, arch) => normalizeHeads(spec, arch, { ...spec.dtype, dy: spec.dtype.y }, false)),
  head_norm_rope_grad: cudaKernel(headNormRopeGrad, (spec, arch) => normalizeHeads(spec, arch, { ...spec.dtype, y: spec.dtype.dx }, true)),
};

const THREADS = 256;
/** Threads of the gradient that a multiprocessor runs together: of up to 128 registers. */
const RESIDENT = 512;

type Embedding = Parameters<typeof frequenciesOf>[0];
/** Returns the text of angles and pairs: `vector` pairs of a head at a time. */
const anglesText = (d: Embedding & Readonly<Record<"interleaved" | "sign" | "gain", number>>, vector: number): string =>
  render("cuda/rope_angles.cuh", {
    ...{ vector, pairs: d.width / 2, interleaved: String(Boolean(d.interleaved)), gain: f32(d.gain), sine: f32(d.sign * d.gain) },
    frequencies: frequenciesOf(d)
      .map((frequency) => {
        const turns = frequency / (2 * Math.PI);
        const high = Math.fround(turns);
        return `{${f32(high)}, ${f32(turns - high)}}`;
      })
      .join(", "),
  });

/** `documents`: whether positions are counted from the first token of a document. */
function rotate(spec: SpecOf<typeof ropeOp>, documents = false): GeneratedKernel {
  const { B, S, H, C, first, width, chunk, ranks } = spec.d;
  const pairs = width / 2;
  const types = [spec.dtype.x, spec.dtype.y];
  // every vector begins at a multiple of its length within a head
  const vector = Math.min(...[pairs, first, C].filter((n) => n > 0).map((n) => vectorOf(n, types)));
  const parts = pairs / vector;
  // a thread uses its angles for four heads if a token has as many; the threads of a token fit into a block
  const strands = Math.max(1, Math.min(Math.ceil(H / 4), Math.floor(THREADS / parts)));
  const threads = Math.max(THREADS, Math.ceil(parts / 32) * 32);
  const body = render("cuda/rope.cu", {
    ...{ name: spec.name, vector, parts, strands, heads: H, deep: Math.ceil(H / strands), threads },
    ...{ width: C, first, angles: anglesText(spec.d, vector) },
    ...{ x: cudaType(spec.dtype.x), y: cudaType(spec.dtype.y), tokens: B * S, sequence: S },
    documents,
    position: positionText("index", chunk, ranks),
  });
  const grid: [number, number, number] = [Math.ceil((B * S) / Math.floor(threads / (parts * strands))), 1, 1];
  const args = ["x", "y", ...(documents ? ["documents"] : []), startOf("S")];
  return { source: source(spec, body), launches: [{ entry: spec.name, grid, threads, shared: 0, args }] };
}

/** A norm of each head and its rotation; `grad`: their gradient, which has the opposite sign of the angles among its attributes. */
function normalizeHeads(
  spec: SpecOf<typeof headNormRope> | SpecOf<typeof headNormRopeGrad>,
  arch: Arch,
  { x, weight, dy, y }: Readonly<Record<"x" | "weight" | "dy" | "y", Dtype>>,
  grad: boolean,
): GeneratedKernel {
  const { B, S, H, C, eps, offset, chunk, ranks } = spec.d;
  const vector = vectorOf(C / 2, [x, weight, dy, y]);
  const parts = C / 2 / vector;
  const lanes = 2 ** Math.ceil(Math.log2(parts));
  const threads = Math.max(THREADS, lanes);
  // a thread uses its angles for four heads; the heads of a token have a power of two of strands, so that blocks have whole tokens
  const strands = lanes > 32 ? 1 : Math.min(2 ** Math.ceil(Math.log2(Math.ceil(H / 4))), threads / lanes);
  const tokens = B * S;
  const perBlock = lanes > 32 ? 1 : threads / lanes / strands;
  const resident = Math.max(1, Math.floor(RESIDENT / threads));
  const blocks = Math.ceil(tokens / perBlock);
  const grid = grad ? Math.min(blocks, cudaArchs[arch].multiprocessors * resident) : blocks;
  const body = render("cuda/head_rope.cu", {
    ...{ name: spec.name, vector, parts, lanes, strands, heads: H, deep: Math.ceil(H / strands), threads: lanes > 32 ? lanes : threads },
    ...{ angles: anglesText({ ...spec.d, width: C }, vector), grad, grid, resident, tokens, sequence: S },
    ...{ inverse: f32(1 / C), eps: f32(eps), offset: offset ? `${f32(offset)} + ` : "", position: positionText("index", chunk, ranks) },
    ...{ x: cudaType(x), weight: cudaType(weight), dy: cudaType(dy), y: cudaType(y) },
  });
  const launch = { entry: spec.name, grid: [grid, 1, 1] as [number, number, number], threads: lanes > 32 ? lanes : threads, shared: 0 };
  if (!grad) return { source: source(spec, body), launches: [{ ...launch, args: ["x", "weight", "y", startOf("S")] }] };
  const sum = sumColumns(spec, { rows: grid, width: C, to: operandOf<string>(spec, "dweight") });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: grid * C * bytesOf.f32,
    launches: [{ ...launch, args: ["x", "weight", "dy", "dx", scratchStart, startOf("S")] }, sum.launch],
  };
}
