/** Root-mean-square norms: one pass over memory, a row in the registers of some threads of one block. And sums down columns. */
import { cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaGenerator, GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { attributeOf, scratchStart } from "../launchArgs.ts";
import type { Arch } from "../targetNames.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

export const norm: Readonly<Record<string, CudaGenerator>> = {
  rmsnorm: (spec) => normalize(spec, spec.d.D!),
  head_norm: (spec) => normalize(spec, spec.d.C!),
  rmsnorm_grad: (spec, arch) => normalizeGrad(spec, spec.d.D!, arch),
  head_norm_grad: (spec, arch) => normalizeGrad(spec, spec.d.C!, arch),
  bias_grad: biasGrad,
};

/** How the elements of a row are shared out. */
export interface Shares {
  /** Elements moved at once. */
  readonly vector: number;
  /** Threads that share a row: a power of two. */
  readonly lanes: number;
  /** Vectors of each. */
  readonly items: number;
  /** Per block: as many as a row's, or some rows'. */
  readonly threads: number;
}
/** Up to 32 lanes where a vector each is enough; longer rows have up to `most` vectors a thread. */
export function shareRow(width: number, vector: number, most: number): Shares {
  const vectors = width / vector;
  const lanes = Math.min(1024, 2 ** Math.ceil(Math.log2(vectors <= 32 ? vectors : Math.max(32, vectors / most))));
  return { vector, lanes, items: Math.ceil(vectors / lanes), threads: lanes > 32 ? lanes : 256 };
}

function normalize(spec: KernelSpec, width: number): GeneratedKernel {
  const { x, gain, y } = spec.dtype as Record<string, "f32">;
  const rows = spec.size.x! / width;
  const shares = shareRow(width, vectorOf(width, [x!, gain!, y!]), 4);
  const body = render("cuda/norm.cu", {
    ...{ name: spec.name, ...shares, width, rows, inverse: f32(1 / width), eps: f32(spec.d.eps!) },
    ...{ x: cudaType(x!), gain: cudaType(gain!), y: cudaType(y!) },
  });
  const grid = [Math.ceil(rows / (shares.threads / shares.lanes)), 1, 1] as [number, number, number];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid, threads: shares.threads, shared: 0, args: ["x", "gain", "y"] }],
  };
}

function normalizeGrad(spec: KernelSpec, width: number, arch: Arch): GeneratedKernel {
  const { x, gain, dy, dx, dgain } = spec.dtype as Record<string, "f32">;
  const rows = spec.size.x! / width;
  const shares = shareRow(width, vectorOf(width, [x!, gain!, dy!, dx!]), 2);
  const groups = shares.threads / shares.lanes;
  // 1024 threads of 64 registers fill a multiprocessor: what the compiler is told to keep to, and one wave of blocks. For Blackwell it
  // needs more of them where a thread has 16 values of a row
  const together = arch === "sm_100a" && shares.vector * shares.items >= 16 ? 512 : 1024;
  const resident = Math.max(1, together / shares.threads);
  const blocks = Math.min(Math.ceil(rows / groups), cudaArchs[arch].multiprocessors * resident);
  const body = render("cuda/norm_grad.cu", {
    ...{ name: spec.name, ...shares, resident, width, rows, grid: blocks, inverse: f32(1 / width), eps: f32(spec.d.eps!) },
    ...{ x: cudaType(x!), gain: cudaType(gain!), dy: cudaType(dy!), dx: cudaType(dx!) },
  });
  const sum = sumColumns(spec, { rows: blocks, width, to: "dgain", type: cudaType(dgain!) });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: blocks * width * bytesOf.f32,
    launches: [
      { entry: spec.name, grid: [blocks, 1, 1], threads: shares.threads, shared: 0, args: ["x", "gain", "dy", "dx", scratchStart] },
      sum.launch,
    ],
  };
}

/** Columns side by side in a block, rows in as many blocks as keep the device busy. */
function biasGrad(spec: KernelSpec, arch: Arch): GeneratedKernel {
  const width = spec.d.N!;
  const rows = spec.size.dy! / width;
  const vector = vectorOf(width, [spec.dtype.dy!]);
  const [lanes, strands] = [32, 8];
  const columns = Math.ceil(width / (lanes * vector));
  const blocks = Math.max(1, Math.min(Math.ceil(rows / (4 * strands)), Math.ceil((4 * cudaArchs[arch].multiprocessors) / columns)));
  const depth = Math.ceil(rows / blocks);
  const depths = Math.ceil(rows / depth);
  const body = render("cuda/bias_grad.cu", { name: spec.name, vector, lanes, strands, width, rows, depth, type: cudaType(spec.dtype.dy!) });
  const sum = sumColumns(spec, { rows: depths, width, to: "dbias", type: cudaType(spec.dtype.dbias!) });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: depths * width * bytesOf.f32,
    launches: [
      { entry: spec.name, grid: [columns, depths, 1], threads: lanes * strands, shared: 0, args: ["dy", scratchStart] },
      sum.launch,
    ],
  };
}

interface ColumnSums {
  readonly rows: number;
  readonly width: number;
  readonly to: string;
  readonly type: string;
  /** The attribute that says which row of `to` takes the sums; the first if not said. */
  readonly row?: string;
}
/** The launch that ends a reduction over blocks: each left a row at the beginning of the scratch arena. */
export function sumColumns(spec: KernelSpec, { rows, width, to, type, row }: ColumnSums) {
  const entry = `${spec.name}_sum`;
  const grid: [number, number, number] = [Math.ceil(width / 32), 1, 1];
  return {
    body: render("cuda/column_reduce.cu", { name: entry, rows, width, type, adds: spec.accumulates.has(to), row: row !== undefined }),
    launch: { entry, grid, threads: 1024, shared: 0, args: [scratchStart, to, ...(row === undefined ? [] : [attributeOf(row)])] },
  };
}
