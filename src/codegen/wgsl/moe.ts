/** The rows that experts work on: their index, copies of tokens and back, and the gradient of their activation. Counts stay on the device. */
import { render } from "../../../templates/bindings.ts";
import { type Made, offsetsAt, type Use } from "../kernelSpec.ts";
import { sigmoid } from "./elementwise.ts";
import { THREADS, totalOver } from "./reduce.ts";
import { type Binding, type Entry, fold, horizontal, kernel, lanesOf, scalar, scratchBytes, vector, widthOf } from "./text.ts";

/** Tokens that one invocation counts: few enough that a batch fills a device, many enough that the counts are few. */
const BLOCK = 32;
const PLACE = ["B", "S", "E"];

interface Part {
  readonly entries: readonly Entry[];
  readonly text: string;
}

/** Makes the index buffer from the map c. Scratch: a count per expert and block. */
function makeRows(use: Use): Part & { readonly words: number } {
  const { B, S, E } = use.d as Readonly<Record<"B" | "S" | "E", number>>;
  const blocks = Math.ceil((B * S) / BLOCK);
  const counts = E * blocks;
  const groups = Math.ceil(counts / THREADS);
  const c = { arg: "c", type: scalar(use.dtype.c!) };
  const scratch = { arg: "scratch+0", type: "u32" };
  const rows = { arg: "rows", type: "i32" };
  const entries: Entry[] = [
    {
      ...{ entry: `${use.name}_count`, grid: groups, threads: THREADS },
      buffers: [
        { ...c, name: "c_count" },
        { ...scratch, name: "counts" },
      ],
    },
    {
      ...{ entry: `${use.name}_place`, grid: 1, threads: THREADS },
      buffers: [{ ...scratch, name: "places" }, { ...rows, name: "index" }, ...(use.mayOverflow ? [{ arg: "needed", type: "i32" }] : [])],
    },
    {
      ...{ entry: `${use.name}_write`, grid: groups, threads: THREADS, starts: PLACE },
      buffers: [
        { ...c, name: "c_write" },
        { ...scratch, name: "placed" },
        { ...rows, name: "index_write" },
      ],
    },
  ];
  const text = render("wgsl/make_rows.wgsl", {
    ...{ entry: use.name, threads: THREADS, index: fold(groups).index, block: BLOCK, blocks, counts, experts: E, tokens: B * S },
    ...{ share: Math.ceil(counts / THREADS), offsets: offsetsAt(use.bound), bound: use.bound, overflows: use.mayOverflow, positions: S },
  });
  return { entries, text, words: counts };
}

/** An entry that does `line` for every `width` elements (of `vectors · width`) of each row. */
function eachRow(use: Use, { entry = use.name, vectors = 1, width = 1, buffers, line }: EachRow): Part {
  const groups = Math.ceil((use.bound * vectors) / THREADS);
  const choice = line.includes("choice");
  const text = render("wgsl/rows.wgsl", {
    ...{ op: use.op, entry, threads: THREADS, index: fold(groups).index, width, vectors },
    ...{ positions: use.d.S!, experts: use.d.E!, choice, line },
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

function fill(entry: string, buffer: Binding, count: number, value: string): Part {
  const groups = Math.ceil(count / THREADS);
  const text = render("wgsl/fill.wgsl", { entry, threads: THREADS, index: fold(groups).index, buffer: buffer.name!, count, value });
  return { entries: [{ entry, grid: groups, threads: THREADS, buffers: [buffer] }], text };
}

const joined = (use: Use, parts: readonly Part[], words = 0): Made =>
  kernel(
    use,
    parts.flatMap((p) => p.entries),
    parts.map((p) => p.text),
    scratchBytes(words),
  );

/** Before its copies, the index where this op makes it. */
function withRows(use: Use, copies: Part): Made {
  if (!use.makesRows) return joined(use, [copies]);
  const rows = makeRows(use);
  return joined(use, [rows, copies], rows.words);
}

function permute(use: Use): Made {
  const width = widthOf(use.d.D!);
  const vectors = use.d.D! / width;
  const [from, to] = [vector(scalar(use.dtype.x!), width), vector(scalar(use.dtype.r!), width)];
  return withRows(
    use,
    eachRow(use, {
      ...{ vectors, width, line: `r[i] = ${to}(x[token * ${vectors}u + i % ${vectors}u]);` },
      buffers: [
        { arg: "x", type: from },
        { arg: "r", type: to },
      ],
    }),
  );
}

function pack(use: Use): Made {
  const [from, to] = [scalar(use.dtype.p!), scalar(use.dtype.r!)];
  return withRows(
    use,
    eachRow(use, {
      line: `r[row] = ${to}(p[choice]);`,
      buffers: [
        { arg: "p", type: from },
        { arg: "r", type: to },
      ],
    }),
  );
}

function packGrad(use: Use): Made {
  const type = scalar(use.dtype.dp!);
  const copies = eachRow(use, {
    line: `dp[choice] = ${type}(dy[row]);`,
    buffers: [
      { arg: "dy", type: scalar(use.dtype.dy!) },
      { arg: "dp", type },
    ],
  });
  return joined(use, [fill(`${use.name}_clear`, { arg: "dp", name: "cleared", type }, use.size.dp!, "0.0"), copies]);
}

/** First the row of every (b,s,e), or −1; then each token adds up its rows by expert. Holds for rows in any order. */
function unpermute(use: Use): Made {
  const { B, S, D, E } = use.d as Readonly<Record<"B" | "S" | "D" | "E", number>>;
  const width = widthOf(D);
  const vectors = D / width;
  const choices = B * S * E;
  const count = B * S * vectors;
  const groups = Math.ceil(count / THREADS);
  const inverse = { arg: "scratch+0", type: "i32" };
  const scatter = eachRow(use, { entry: `${use.name}_find`, line: "found[choice] = i32(row);", buffers: [{ ...inverse, name: "found" }] });
  const sum: Part = {
    entries: [
      {
        ...{ entry: use.name, grid: groups, threads: THREADS },
        buffers: [
          { arg: "r", type: vector(scalar(use.dtype.r!), width) },
          { ...inverse, name: "row_of" },
          { arg: "x", type: vector(scalar(use.dtype.x!), width) },
        ],
      },
    ],
    text: render("wgsl/unpermute.wgsl", {
      ...{ entry: use.name, threads: THREADS, index: fold(groups).index, width, vectors, count, experts: E },
      ...{ vector: vector("f32", width), type: vector(scalar(use.dtype.x!), width) },
    }),
  };
  return joined(use, [fill(`${use.name}_clear`, { ...inverse, name: "cleared" }, choices, "-1"), scatter, sum], choices);
}

function swigluRowsGrad(use: Use): Made {
  const F = use.d.F!;
  const width = widthOf(F);
  const vectors = F / width;
  const lanes = lanesOf(vectors, THREADS);
  const groups = Math.ceil((use.bound * lanes) / THREADS);
  const type = (name: string) => vector(scalar(use.dtype[name]!), name === "p" || name === "dp" ? 1 : width);
  const entry: Entry = {
    ...{ entry: use.name, grid: groups, threads: THREADS },
    buffers: [...["gate", "up", "p", "dy", "dgate", "dup", "dp"].map((arg) => ({ arg, type: type(arg) })), { arg: "rows", type: "i32" }],
  };
  const text = render("wgsl/swiglu_rows_grad.wgsl", {
    ...{ entry: use.name, threads: THREADS, index: fold(groups).index, lanes, perGroup: THREADS / lanes, vectors, sigmoid },
    ...{ vector: vector("f32", width), sum: horizontal("sum", width), dgate: type("dgate"), dup: type("dup"), dp: type("dp") },
  });
  return kernel(use, [entry], [totalOver(lanes), text]);
}

function gatedGrad(use: Use): Made {
  const C = use.d.C!;
  const width = widthOf(C);
  const vectors = C / width;
  const blocks = use.size.gate!;
  const lanes = lanesOf(vectors, THREADS);
  const groups = Math.ceil((blocks * lanes) / THREADS);
  const type = (name: string) => vector(scalar(use.dtype[name]!), name.endsWith("gate") ? 1 : width);
  const entry: Entry = {
    ...{ entry: use.name, grid: groups, threads: THREADS },
    buffers: ["x", "gate", "dy", "dx", "dgate"].map((arg) => ({ arg, type: type(arg) })),
  };
  const text = render("wgsl/gated_grad.wgsl", {
    ...{ entry: use.name, threads: THREADS, index: fold(groups).index, lanes, perGroup: THREADS / lanes, vectors, blocks },
    ...{ vector: vector("f32", width), sum: horizontal("sum", width), dx: type("dx"), dgate: type("dgate") },
  });
  return kernel(use, [entry], [totalOver(lanes), text]);
}

export const moe = { gated_grad: gatedGrad, permute, unpermute, pack, pack_grad: packGrad, swiglu_rows_grad: swigluRowsGrad };
