/** Kernels of rows of experts: the row index, permute and unpermute, and the combine weights of rows. Counts stay on the device. */
import { render } from "../../../templates/bindings.ts";
import { pack, packGrad, permute, unpermute } from "../../ops/moe.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { neededRows, rowIndex, scratchStart } from "../launchArgs.ts";
import { THREADS } from "./reduce.ts";
import { type Binding, bindingOf, type EntryPoint, foldGrid, kernel, scalar, scratchBytes, vector, widthOf } from "./text.ts";

/** Tokens that one invocation counts: fewer give more parallelism, more give fewer counts to combine. */
const BLOCK = 32;
const PLACE = ["B", "S", "E"];

type RowsSpec = KernelSpec<"c", "B" | "S" | "E">;

interface ShaderPart {
  readonly entries: readonly EntryPoint[];
  readonly text: string;
}

/** Makes the index buffer from the top-k mask c. Scratch: one count per expert and block. */
function makeRows(spec: RowsSpec): ShaderPart & { readonly words: number } {
  const { B, S, E } = spec.d;
  const blocks = Math.ceil((B * S) / BLOCK);
  const counts = E * blocks;
  const groups = Math.ceil(counts / THREADS);
  const mask = operandOf<"c">(spec, "c");
  const scratch = { arg: scratchStart, type: "u32" };
  const rows = { arg: rowIndex, type: "i32" };
  const entries: EntryPoint[] = [
    {
      ...{ entry: `${spec.name}_count`, grid: groups, threads: THREADS },
      buffers: [bindingOf(mask, 1, "c_count"), { ...scratch, name: "counts" }],
    },
    {
      ...{ entry: `${spec.name}_place`, grid: 1, threads: THREADS },
      buffers: [
        { ...scratch, name: "places" },
        { ...rows, name: "index" },
        ...(spec.mayOverflow ? [{ arg: neededRows, type: "i32" }] : []),
      ],
    },
    {
      ...{ entry: `${spec.name}_write`, grid: groups, threads: THREADS, starts: PLACE },
      buffers: [bindingOf(mask, 1, "c_write"), { ...scratch, name: "placed" }, { ...rows, name: "index_write" }],
    },
  ];
  const text = render("wgsl/make_rows.wgsl", {
    ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, block: BLOCK, blocks, counts, experts: E, tokens: B * S },
    ...{ share: Math.ceil(counts / THREADS), offsets: offsetsAt(spec.bound), bound: spec.bound, overflows: spec.mayOverflow, positions: S },
  });
  return { entries, text, words: counts };
}

/** Returns an entry that executes `line` for each vector of `width` elements of each row; a row has `vectors` vectors. */
export function eachRow(
  spec: KernelSpec<string, "S" | "E">,
  { entry = spec.name, vectors = 1, width = 1, buffers, line }: EachRow,
): ShaderPart {
  const groups = Math.ceil((spec.bound * vectors) / THREADS);
  const choice = line.includes("choice");
  const text = render("wgsl/rows.wgsl", {
    ...{ op: spec.op, entry, threads: THREADS, index: foldGrid(groups).index, width, vectors },
    ...{ positions: spec.d.S, experts: spec.d.E, choice, line },
  });
  const all = [...buffers, { arg: rowIndex, type: "i32" }];
  return {
    entries: [{ entry, grid: groups, threads: THREADS, buffers: all, starts: choice ? PLACE : ["B", "S"], uniform: "place" }],
    text,
  };
}
interface EachRow {
  readonly entry?: string;
  readonly vectors?: number;
  readonly width?: number;
  readonly buffers: readonly Binding[];
  readonly line: string;
}

/** Returns an entry that sets `count` elements to a value. */
export function fill(entry: string, buffer: Binding & { readonly name: string }, count: number, value: string): ShaderPart {
  const groups = Math.ceil(count / THREADS);
  const text = render("wgsl/fill.wgsl", { entry, threads: THREADS, index: foldGrid(groups).index, buffer: buffer.name, count, value });
  return { entries: [{ entry, grid: groups, threads: THREADS, buffers: [buffer] }], text };
}

/** Returns the kernel of some parts, with a scratch of `words` 32-bit words. */
export const joined = (spec: KernelSpec, parts: readonly ShaderPart[], words = 0): GeneratedKernel =>
  kernel(
    spec,
    parts.flatMap((p) => p.entries),
    parts.map((p) => p.text),
    scratchBytes(words),
  );

/** Prepends the kernels of the row index if the op makes it. */
export function withRows(spec: RowsSpec, copies: ShaderPart): GeneratedKernel {
  if (!spec.makesRows) return joined(spec, [copies]);
  const rows = makeRows(spec);
  return joined(spec, [rows, copies], rows.words);
}

/** Copies the vector of each token to its rows. */
function copyToRows(spec: SpecOf<typeof permute>): GeneratedKernel {
  const width = widthOf(spec.d.D);
  const vectors = spec.d.D / width;
  const [x, r] = [operandOf(spec, "x"), operandOf(spec, "r")];
  return withRows(
    spec,
    eachRow(spec, {
      ...{ vectors, width, line: `r[i] = ${vector(scalar(r.dtype), width)}(x[token * ${vectors}u + i % ${vectors}u]);` },
      buffers: [bindingOf(x, width), bindingOf(r, width)],
    }),
  );
}

/** Gathers the combine weight of each row. */
function gatherWeights(spec: SpecOf<typeof pack>): GeneratedKernel {
  const [p, r] = [operandOf(spec, "p"), operandOf(spec, "r")];
  return withRows(
    spec,
    eachRow(spec, {
      line: `r[row] = ${scalar(r.dtype)}(p[choice]);`,
      buffers: [bindingOf(p), bindingOf(r)],
    }),
  );
}

/** Writes the gradient of each combine weight; weights without a row have 0. */
function scatterGradients(spec: SpecOf<typeof packGrad>): GeneratedKernel {
  const type = scalar(spec.dtype.dp);
  const copies = eachRow(spec, {
    line: `dp[choice] = ${type}(dy[row]);`,
    buffers: [bindingOf(operandOf(spec, "dy")), bindingOf(operandOf(spec, "dp"))],
  });
  return joined(spec, [fill(`${spec.name}_clear`, { arg: "dp", name: "cleared", type }, spec.size.dp, "0.0"), copies]);
}

/** First writes the row of each (b,s,e), or −1; then each token sums its rows in the order of experts. Rows may be in any order. */
function sumRows(spec: SpecOf<typeof unpermute>): GeneratedKernel {
  const { B, S, D, E } = spec.d;
  const width = widthOf(D);
  const vectors = D / width;
  const choices = B * S * E;
  const count = B * S * vectors;
  const groups = Math.ceil(count / THREADS);
  const inverse = { arg: scratchStart, type: "i32" };
  const scatter = eachRow(spec, {
    entry: `${spec.name}_find`,
    line: "found[choice] = i32(row);",
    buffers: [{ ...inverse, name: "found" }],
  });
  const sum: ShaderPart = {
    entries: [
      {
        ...{ entry: spec.name, grid: groups, threads: THREADS },
        buffers: [bindingOf(operandOf(spec, "r"), width), { ...inverse, name: "row_of" }, bindingOf(operandOf(spec, "x"), width)],
      },
    ],
    text: render("wgsl/unpermute.wgsl", {
      ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, width, vectors, count, experts: E },
      ...{ vector: vector("f32", width), type: vector(scalar(spec.dtype.x), width) },
    }),
  };
  return joined(spec, [fill(`${spec.name}_clear`, { ...inverse, name: "cleared" }, choices, "-1"), scatter, sum], choices);
}

/** WGSL kernels of dispatch and combine. */
export const moe = {
  permute: wgslKernel(permute, copyToRows),
  unpermute: wgslKernel(unpermute, sumRows),
  pack: wgslKernel(pack, gatherWeights),
  pack_grad: wgslKernel(packGrad, scatterGradients),
};
/** The kernels of rows; those of lists (dispatch.ts) are the same with other sizes. */
export const rowKernels = { copyToRows, sumRows, gatherWeights, scatterGradients };
