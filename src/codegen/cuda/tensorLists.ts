/**
 * Kernels of tensor lists (schemas/tensorLists.ts): one launch for all tensors. A block has elements of one tensor, which it finds in a table of
 * first blocks; the addresses of the tensors are parameters of the launch. A tensor begins at a multiple of 256 bytes, so vectors are aligned, and the
 * elements behind its last whole vector are computed one by one.
 */
import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType, type Dtype } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type GeneratedKernel, type KernelSpec, listOf } from "../kernelSpec.ts";
import { scratchStart, tensorList } from "../launchArgs.ts";
import { type CudaElementwise, unrollOf } from "./elementwise.ts";
import { addPartials, type Sum } from "./reduce.ts";
import { f32, source, widestVector } from "./text.ts";

const THREADS = 256;

/** How the elements of a list are divided among blocks. */
interface ListShape {
  /** Elements of each tensor. */
  readonly sizes: readonly number[];
  /** Elements per memory access. */
  readonly width: number;
  readonly unroll: number;
  /** Vectors of a block. */
  readonly vectors: number;
}

/** Returns the declarations that find the tensor of a block, the number of blocks, and whether a tensor ends within a vector. */
function listText({ sizes, width, unroll, vectors }: ListShape) {
  const firstBlocks: number[] = [];
  let blocks = 0;
  for (const size of sizes) {
    firstBlocks.push(blocks);
    blocks += Math.max(1, Math.ceil(Math.floor(size / width) / vectors));
  }
  invariant(blocks < 2 ** 31, () => `${blocks} blocks of a list of tensors`);
  const largest = Math.max(...sizes);
  const body = render("cuda/tensor_list.cuh", {
    ...{ count: sizes.length, width, unroll, threads: THREADS, unit: `${vectors} vectors a block` },
    index: largest / width + 2 * vectors < 2 ** 31 ? "u32" : "u64",
    sizeType: largest < 2 ** 32 ? "u32" : "u64",
    ...{ firstBlocks: firstBlocks.join(", "), sizes: sizes.join(", "), half: 2 ** Math.floor(Math.log2(sizes.length)) },
  });
  return { body, blocks, hasRest: sizes.some((size) => size % width !== 0) };
}

/** Generates the kernel of an elementwise op for a list of tensors: element by element the arithmetic of `makeElementwise`. */
export function makeElementwiseList(spec: KernelSpec, arch: Arch, f: CudaElementwise): GeneratedKernel {
  const { streams, outputs, scalars = [], element = [], once = [] } = f;
  invariant(f.width === undefined && !f.indexed?.length && !f.row?.length && !f.functions, `${spec.op} has rows, which a list has not`);
  const width = widestVector([...streams, ...outputs].map((o) => o.dtype));
  const sizes = listOf(spec, outputs[0].name).map(({ size }) => size);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const unroll = unrollOf(streams, { vectors: total / width, width, multiprocessors: cudaArchs[arch].multiprocessors });
  const list = listText({ sizes, width, unroll, vectors: THREADS * unroll });
  const inputs = streams.filter((o) => !outputs.some((w) => w.name === o.name));
  const typed = ({ name, dtype }: { readonly name: string; readonly dtype: Dtype }) => ({ name, type: cudaType(dtype) });
  const pointers = [...inputs.map((o) => ({ ...typed(o), type: `const ${cudaType(o.dtype)}` })), ...outputs.map(typed)];
  const body = render("cuda/elementwise_list.cu", {
    ...{ name: spec.name, list: list.body, width, unroll, hasRest: list.hasRest, pointers },
    params: [
      ...pointers.map(({ name, type }) => `const __grid_constant__ Pointers<${type}> ${name}List`),
      ...scalars.map((o) => `const ${cudaType(o.dtype)}* __restrict__ ${o.name}At`),
    ].join(", "),
    ...{ scalars: scalars.map((o) => o.name), once: [...once], element: [...element], inputs: streams.map(typed) },
    outputs: outputs.map((o, n) => {
      const same = outputs.slice(0, n).find((earlier) => earlier.value === o.value);
      return { ...typed(o), value: same ? `${same.name}Out[j]` : o.value };
    }),
  });
  const args = [...pointers.map(({ name }) => tensorList(name, sizes.length)), ...scalars.map((o) => o.name)];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid: [list.blocks, 1, 1], threads: THREADS, shared: 0, args }],
  };
}

/** Blocks of a sum for each multiprocessor: several waves, because blocks end at different times. */
const BLOCKS_EACH = 32;

/** Generates the kernel that adds a term of all elements of a list of tensors to a scalar. */
export function makeSumList(spec: KernelSpec, arch: Arch, { over, to, factor, term, indexed }: Sum): GeneratedKernel {
  invariant(indexed.length === 0, `${spec.op} reads more than one tensor of a list`);
  const width = widestVector([over.dtype]);
  const sizes = listOf(spec, over.name).map(({ size }) => size);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const unroll = 4;
  const round = THREADS * unroll;
  const vectors = round * Math.max(1, Math.ceil(total / width / (round * BLOCKS_EACH * cudaArchs[arch].multiprocessors)));
  const list = listText({ sizes, width, unroll, vectors });
  const body = render("cuda/sum_list.cu", {
    ...{ name: spec.name, list: list.body, type: cudaType(over.dtype), vectors, term, factor: f32(factor), hasRest: list.hasRest },
  });
  const last = addPartials(spec, list.blocks, to);
  return {
    source: source(spec, `${body}\n${last.body}`),
    scratch: list.blocks * bytesOf.f32,
    launches: [
      {
        ...{ entry: spec.name, grid: [list.blocks, 1, 1], threads: THREADS, shared: 0 },
        args: [tensorList(over.name, sizes.length), scratchStart],
      },
      last.launch,
    ],
  };
}
