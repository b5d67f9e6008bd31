/** Rotary positions: one pass over memory; angles to f32's precision at any position below 2^24. */
import { render } from "../../../templates/bindings.ts";
import type { CudaMaker, Made, Use } from "../kernel.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

export const rope: Readonly<Record<string, CudaMaker>> = { rope: makeRope };

const THREADS = 256;

function makeRope(use: Use): Made {
  const { B, S, H, C, theta, sign } = use.d;
  const half = C! / 2;
  const vector = vectorOf(half, [use.dtype.x!, use.dtype.y!]);
  const parts = half / vector;
  // four heads share a thread's angles where a token has enough of them; a token's threads fit a block
  const strands = Math.max(1, Math.min(Math.ceil(H! / 4), Math.floor(THREADS / parts)));
  const threads = Math.max(THREADS, Math.ceil(parts / 32) * 32);
  const body = render("cuda/rope.cu", {
    ...{ name: use.name, vector, half, parts, strands, heads: H!, deep: Math.ceil(H! / strands), threads },
    ...{ x: cudaType(use.dtype.x!), y: cudaType(use.dtype.y!), tokens: B! * S!, sequence: S!, sign: f32(sign!) },
    frequencies: Array.from({ length: half }, (_, c) => {
      const turns = theta! ** ((-2 * c) / C!) / (2 * Math.PI);
      const high = Math.fround(turns);
      return `{${f32(high)}, ${f32(turns - high)}}`;
    }).join(", "),
  });
  const grid: [number, number, number] = [Math.ceil((B! * S!) / Math.floor(threads / (parts * strands))), 1, 1];
  return { source: source(use, body), launches: [{ entry: use.name, grid, threads, shared: 0, args: ["x", "y", "start(S)"] }] };
}
