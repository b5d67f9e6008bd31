/** Rotary position embedding in f32. Angles are integers in units of 2^-32 turns, so they are exact modulo a turn at any position. */
import { render } from "../../../templates/bindings.ts";
import { frequenciesOf, ropeDocuments, rope as ropeOp } from "../../ops/rope.ts";
import { type GeneratedKernel, operandOf, positionText, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { type Binding, bindingOf, type EntryPoint, float, foldGrid, kernel, scalar } from "./text.ts";

const THREADS = 256;

/** WGSL kernels of rotary position embedding. */
export const rope = {
  rope: wgslKernel(ropeOp, (spec) => rotate(spec)),
  rope_documents: wgslKernel(ropeDocuments, (spec) => rotate(spec, bindingOf(operandOf(spec, "documents")))),
};

/** `documents`: with it, positions are counted from the first token of a document. */
function rotate(spec: SpecOf<typeof ropeOp>, documents?: Binding): GeneratedKernel {
  const { B, S, H, C, first, width, interleaved, sign, gain, chunk, ranks } = spec.d;
  const pairs = width / 2;
  const turns = frequenciesOf(spec.d).map((frequency) => (frequency / (2 * Math.PI)) * 2 ** 32);
  const type = scalar(spec.dtype.x);
  const groups = Math.ceil((S * pairs) / THREADS);
  const entry: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS, starts: ["S"] },
    buffers: [bindingOf(operandOf(spec, "x")), bindingOf(operandOf(spec, "y")), ...(documents ? [documents] : [])],
  };
  const text = render("wgsl/rope.wgsl", {
    pairs,
    documents: documents !== undefined,
    frequencies: turns.map((t) => `${Math.round(t)}u`).join(", "),
    rests: turns.map((t) => float(t - Math.round(t))).join(", "),
    threads: THREADS,
    entry: spec.name,
    index: foldGrid(groups).index,
    count: S * pairs,
    position: positionText("index", chunk, ranks),
    radians: (2 * Math.PI) / 2 ** 32,
    gain: float(gain),
    sine: float(sign * gain),
    sequences: B,
    positions: S,
    heads: H,
    headWidth: C,
    firstChannel: first,
    step: interleaved ? 2 : 1,
    apart: interleaved ? 1 : pairs,
    passing: C - width,
    type,
  });
  return kernel(spec, [entry], [text]);
}
