/** Kernels of rows of experts: the row index, permute and unpermute, and the gradient of the activation. Counts stay on the device. */
import { render } from "../../../templates/bindings.ts";
import type { SigmoidArgument } from "../../ops/gatedUnits.ts";
import { gatedUnitText, perGatedUnit } from "../gatedUnitText.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { sigmoid } from "./elementwise.ts";
import { THREADS, totalOver } from "./reduce.ts";
import {
  type Binding,
  type EntryPoint,
  float,
  foldGrid,
  horizontal,
  kernel,
  lanesOf,
  scalar,
  scratchBytes,
  vector,
  widthOf,
} from "./text.ts";

/** Tokens per invocation of the count: fewer give more parallelism, more give fewer counts to combine. */
const BLOCK = 32;
const PLACE = ["B", "S", "E"];

interface ShaderPart {
  readonly entries: readonly EntryPoint[];
  readonly text: string;
}

/** Makes the index buffer from the top-k mask c. Scratch: one count per expert and block. */
function makeRows(spec: KernelSpec): ShaderPart & { readonly words: number } {
  const { B, S, E } = spec.d as Readonly<Record<"B" | "S" | "E", number>>;
  const blocks = Math.ceil((B * S) / BLOCK);
  const counts = E * blocks;
  const groups = Math.ceil(counts / THREADS);
  const c = { arg: "c", type: scalar(spec.dtype.c!) };
  const scratch = { arg: scratchStart, type: "u32" };
  const rows = { arg: "rows", type: "i32" };
  const entries: EntryPoint[] = [
    {
      ...{ entry: `${spec.name}_count`, grid: groups, threads: THREADS },
      buffers: [
        { ...c, name: "c_count" },
        { ...scratch, name: "counts" },
      ],
    },
    {
      ...{ entry: `${spec.name}_place`, grid: 1, threads: THREADS },
      buffers: [{ ...scratch, name: "places" }, { ...rows, name: "index" }, ...(spec.mayOverflow ? [{ arg: "needed", type: "i32" }] : [])],
    },
    {
      ...{ entry: `${spec.name}_write`, grid: groups, threads: THREADS, starts: PLACE },
      buffers: [
        { ...c, name: "c_write" },
        { ...scratch, name: "placed" },
        { ...rows, name: "index_write" },
      ],
    },
  ];
  const text = render("wgsl/make_rows.wgsl", {
    ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, block: BLOCK, blocks, counts, experts: E, tokens: B * S },
    ...{ share: Math.ceil(counts / THREADS), offsets: offsetsAt(spec.bound), bound: spec.bound, overflows: spec.mayOverflow, positions: S },
  });
  return { entries, text, words: counts };
}

/** Returns an entry that executes `line` for each vector of `width` elements of each row; a row has `vectors` vectors. */
function eachRow(spec: KernelSpec, { entry = spec.name, vectors = 1, width = 1, buffers, line }: EachRow): ShaderPart {
  const groups = Math.ceil((spec.bound * vectors) / THREADS);
  const choice = line.includes("choice");
  const text = render("wgsl/rows.wgsl", {
    ...{ op: spec.op, entry, threads: THREADS, index: foldGrid(groups).index, width, vectors },
    ...{ positions: spec.d.S!, experts: spec.d.E!, choice, line },
  });
  const all = [...buffers, { arg: "rows", type: "i32" }];
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

function fill(entry: string, buffer: Binding, count: number, value: string): ShaderPart {
  const groups = Math.ceil(count / THREADS);
  const text = render("wgsl/fill.wgsl", { entry, threads: THREADS, index: foldGrid(groups).index, buffer: buffer.name!, count, value });
  return { entries: [{ entry, grid: groups, threads: THREADS, buffers: [buffer] }], text };
}

const joined = (spec: KernelSpec, parts: readonly ShaderPart[], words = 0): GeneratedKernel =>
  kernel(
    spec,
    parts.flatMap((p) => p.entries),
    parts.map((p) => p.text),
    scratchBytes(words),
  );

/** Prepends the kernels of the row index if the op makes it. */
function withRows(spec: KernelSpec, copies: ShaderPart): GeneratedKernel {
  if (!spec.makesRows) return joined(spec, [copies]);
  const rows = makeRows(spec);
  return joined(spec, [rows, copies], rows.words);
}

function permute(spec: KernelSpec): GeneratedKernel {
  const width = widthOf(spec.d.D!);
  const vectors = spec.d.D! / width;
  const [from, to] = [vector(scalar(spec.dtype.x!), width), vector(scalar(spec.dtype.r!), width)];
  return withRows(
    spec,
    eachRow(spec, {
      ...{ vectors, width, line: `r[i] = ${to}(x[token * ${vectors}u + i % ${vectors}u]);` },
      buffers: [
        { arg: "x", type: from },
        { arg: "r", type: to },
      ],
    }),
  );
}

function pack(spec: KernelSpec): GeneratedKernel {
  const [from, to] = [scalar(spec.dtype.p!), scalar(spec.dtype.r!)];
  return withRows(
    spec,
    eachRow(spec, {
      line: `r[row] = ${to}(p[choice]);`,
      buffers: [
        { arg: "p", type: from },
        { arg: "r", type: to },
      ],
    }),
  );
}

function packGrad(spec: KernelSpec): GeneratedKernel {
  const type = scalar(spec.dtype.dp!);
  const copies = eachRow(spec, {
    line: `dp[choice] = ${type}(dy[row]);`,
    buffers: [
      { arg: "dy", type: scalar(spec.dtype.dy!) },
      { arg: "dp", type },
    ],
  });
  return joined(spec, [fill(`${spec.name}_clear`, { arg: "dp", name: "cleared", type }, spec.size.dp!, "0.0"), copies]);
}

/** First writes the row of each (b,s,e), or −1; then each token sums its rows in the order of experts. Rows may be in any order. */
function unpermute(spec: KernelSpec): GeneratedKernel {
  const { B, S, D, E } = spec.d as Readonly<Record<"B" | "S" | "D" | "E", number>>;
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
        buffers: [
          { arg: "r", type: vector(scalar(spec.dtype.r!), width) },
          { ...inverse, name: "row_of" },
          { arg: "x", type: vector(scalar(spec.dtype.x!), width) },
        ],
      },
    ],
    text: render("wgsl/unpermute.wgsl", {
      ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, width, vectors, count, experts: E },
      ...{ vector: vector("f32", width), type: vector(scalar(spec.dtype.x!), width) },
    }),
  };
  return joined(spec, [fill(`${spec.name}_clear`, { ...inverse, name: "cleared" }, choices, "-1"), scatter, sum], choices);
}

function gatedRowsGrad(unit: SigmoidArgument, spec: KernelSpec): GeneratedKernel {
  const F = spec.d.F!;
  const width = widthOf(F);
  const vectors = F / width;
  const lanes = lanesOf(vectors, THREADS);
  const groups = Math.ceil((spec.bound * lanes) / THREADS);
  const type = (name: string) => vector(scalar(spec.dtype[name]!), name === "p" || name === "dp" ? 1 : width);
  const entry: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS },
    buffers: [...["gate", "up", "p", "dy", "dgate", "dup", "dp"].map((arg) => ({ arg, type: type(arg) })), { arg: "rows", type: "i32" }],
  };
  const text = render("wgsl/gated_rows_grad.wgsl", {
    ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, lanes, perGroup: THREADS / lanes, vectors, sigmoid },
    ...gatedUnitText(unit, "g", float),
    ...{ vector: vector("f32", width), sum: horizontal("sum", width), dgate: type("dgate"), dup: type("dup"), dp: type("dp") },
  });
  return kernel(spec, [entry], [totalOver(lanes), text]);
}

function sigmoidGateGrad(spec: KernelSpec): GeneratedKernel {
  const C = spec.d.C!;
  const width = widthOf(C);
  const vectors = C / width;
  const blocks = spec.size.gate!;
  const lanes = lanesOf(vectors, THREADS);
  const groups = Math.ceil((blocks * lanes) / THREADS);
  const type = (name: string) => vector(scalar(spec.dtype[name]!), name.endsWith("gate") ? 1 : width);
  const entry: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS },
    buffers: ["x", "gate", "dy", "dx", "dgate"].map((arg) => ({ arg, type: type(arg) })),
  };
  const text = render("wgsl/sigmoid_gate_grad.wgsl", {
    ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, lanes, perGroup: THREADS / lanes, vectors, blocks },
    ...{ vector: vector("f32", width), sum: horizontal("sum", width), dx: type("dx"), dgate: type("dgate") },
  });
  return kernel(spec, [entry], [totalOver(lanes), text]);
}

export const moe = {
  ...{ sigmoid_gate_grad: sigmoidGateGrad, permute, unpermute, pack, pack_grad: packGrad },
  ...perGatedUnit("rowsGrad", (unit) => (spec: KernelSpec) => gatedRowsGrad(unit, spec)),
};
