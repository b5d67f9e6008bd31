/** Rotary positions: one pass over memory; angles to f32's precision at any position below 2^24. */
import { render } from "../../../templates/bindings.ts";
import { frequenciesOf } from "../../ops/rope.ts";
import { type CudaGenerator, type GeneratedKernel, type KernelSpec, positionText } from "../kernelSpec.ts";
import { startOf } from "../launchArgs.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

export const rope: Readonly<Record<string, CudaGenerator>> = { rope: makeRope };

const THREADS = 256;

function makeRope(spec: KernelSpec): GeneratedKernel {
  const { B, S, H, C, first, width, interleaved, sign, gain, chunk, ranks } = spec.d;
  const pairs = width! / 2;
  const types = [spec.dtype.x!, spec.dtype.y!];
  // vectors begin at multiples of their length within a head, whatever they hold
  const vector = Math.min(...[pairs, first!, C!].filter((n) => n > 0).map((n) => vectorOf(n, types)));
  const parts = pairs / vector;
  // four heads share a thread's angles where a token has enough of them; a token's threads fit a block
  const strands = Math.max(1, Math.min(Math.ceil(H! / 4), Math.floor(THREADS / parts)));
  const threads = Math.max(THREADS, Math.ceil(parts / 32) * 32);
  const body = render("cuda/rope.cu", {
    ...{ name: spec.name, vector, pairs, parts, strands, heads: H!, deep: Math.ceil(H! / strands), threads },
    ...{ width: C!, first: first!, interleaved: String(Boolean(interleaved)) },
    ...{ x: cudaType(spec.dtype.x!), y: cudaType(spec.dtype.y!), tokens: B! * S!, sequence: S! },
    ...{ position: positionText("index", chunk!, ranks!), gain: f32(gain!), sine: f32(sign! * gain!) },
    frequencies: frequenciesOf(spec.d)
      .map((frequency) => {
        const turns = frequency / (2 * Math.PI);
        const high = Math.fround(turns);
        return `{${f32(high)}, ${f32(turns - high)}}`;
      })
      .join(", "),
  });
  const grid: [number, number, number] = [Math.ceil((B! * S!) / Math.floor(threads / (parts * strands))), 1, 1];
  return { source: source(spec, body), launches: [{ entry: spec.name, grid, threads, shared: 0, args: ["x", "y", startOf("S")] }] };
}
