/**
 * Causal attention and its gradient. In bf16, heads of 16 to 128 by 16 run on the tensor cores with asynchronous copies; all
 * else, f32 above all, in f32 arithmetic. Every sum has one order: equal inputs give equal bits.
 */

import type { Launch } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import type { Arch } from "../../target.ts";
import type { Made, Use } from "../kernel.ts";
import { type AttentionSizes, fitsHopper, forwardHopper, gradHopper, scales } from "./attentionHopper.ts";
import { source } from "./prelude.ts";

export const attention = {
  attention: (use: Use, arch: Arch): Made => forward(use, arch),
  attention_grad: (use: Use, arch: Arch): Made => (onTensorCores(use) ? gradTiles(use, arch) : gradPlain(use)),
};

function forward(use: Use, arch: Arch): Made {
  if (!onTensorCores(use)) return forwardPlain(use);
  return arch === "sm_90a" && fitsHopper(dims(use)) ? forwardHopper(use, dims(use)) : forwardTiles(use, arch);
}
const onTensorCores = ({ d, dtype }: Use): boolean => dtype.q === "bf16" && d.C! % 16 === 0 && d.C! <= 128;
const ceil = (n: number, by: number) => Math.ceil(n / by);
const dims = (use: Use): AttentionSizes => {
  const { B, S, U, G, M, C } = use.d as AttentionSizes;
  return { B, S, U, G, M, C };
};

/**
 * 128 query rows in 4 warps, so that what is read of K and V serves 32 rows; two stages of K and V. 255 registers let two
 * blocks share a multiprocessor, and so must shared memory: sm_80 has 164 KiB, the others 228. Beside the outputs of wide heads
 * there are not registers enough for the scores of 64 keys; of 48, ptxas for sm_100a spills one.
 */
function forwardTiles(use: Use, arch: Arch): Made {
  const d = dims(use);
  const keys = d.C <= 96 ? 64 : arch === "sm_90a" ? 48 : 32;
  const threads = 128;
  const tiles = render("cuda/attention_tiles.cuh", { ...d, ...scales(d.C), threads });
  const body = render("cuda/attention.cu", { name: use.name, tiles, keys, resident: 2 });
  const launch: Launch = {
    entry: use.name,
    grid: [d.B * d.G * d.M * ceil(d.S, threads), 1, 1],
    threads,
    shared: (threads + 4 * keys) * (d.C + 8) * 2,
    args: ["q", "k", "v", "o", "lse", "start(S)"],
  };
  return { source: source(use, body), launches: [launch] };
}

/** Bytes of shared memory that one block may have. */
const sharedMost: Readonly<Record<Arch, number>> = { sm_80: 163 * 1024, sm_90a: 227 * 1024, sm_100a: 227 * 1024 };
/** Multiprocessors of the largest part sold. It decides an order of work, nothing else. */
const multiprocessors: Readonly<Record<Arch, number>> = { sm_80: 108, sm_90a: 132, sm_100a: 148 };

/**
 * Five products, the query gradients added up in f32 by one key block after the other. A launch of its own for them would repeat
 * two products, and with 16 rows a warp would read 256 bytes of shared memory per m16n8k16, of which the multiprocessor reads
 * 128 a cycle and computes one in 1.5: by these counts 1.4 times the time.
 */
function gradTiles(use: Use, arch: Arch): Made {
  const d = dims(use);
  const { B, S, U, G, M, C } = d;
  const [threads, rows, H] = [256, 64, G * M];
  const hopper = arch === "sm_90a" && C === 128;
  const padded = (keys: number) => 4 * keys * (C + 8) + 8 * rows * (C + 8) + 4 * rows * (keys + 8) + 16 * rows + 16;
  const keys = hopper || padded(128) <= sharedMost[arch] ? 128 : 64;
  const [queryBlocks, keyBlocks] = [ceil(S, rows), ceil(U, keys)];
  const wave = Math.min(keyBlocks, ceil(multiprocessors[arch], B * G));
  const lanes = 2 ** Math.ceil(Math.log2(C / 8));
  const name = use.name;
  const tiles = render("cuda/attention_tiles.cuh", { ...d, ...scales(C), threads });
  const order = render("cuda/attention_order.cuh", { name, keys, wave, lanes, vectors: arch !== "sm_80" });
  const main = hopper
    ? gradHopper(d, (more) => render("cuda/attention_grad_wgmma.cu", { name, tiles, order, ...more }))
    : { body: render("cuda/attention_grad.cu", { name, tiles, order }), threads, shared: padded(keys), args: ["q", "k", "v", "dy"] };
  const tilesOfQueries = B * H * queryBlocks;
  const [sums, lse2, delta, counters, scratch] = offsets([
    4 * tilesOfQueries * rows * C,
    4 * tilesOfQueries * rows,
    4 * tilesOfQueries * rows,
    4 * tilesOfQueries + 4,
  ]);
  const at = (offset: number) => `scratch+${offset}`;
  const launches: Launch[] = [
    {
      entry: `${use.name}_rows`,
      grid: [ceil(tilesOfQueries * rows * lanes, threads), 1, 1],
      threads,
      shared: 0,
      args: ["o", "lse", "dy", at(lse2!), at(delta!), at(counters!)],
    },
    {
      entry: use.name,
      grid: [B * G * ceil(keyBlocks, wave) * wave, 1, 1],
      threads: main.threads,
      shared: main.shared,
      args: [...main.args, at(lse2!), at(delta!), at(sums!), at(counters!), "dk", "dv", "start(S)"],
    },
    { entry: `${use.name}_queries`, grid: [tilesOfQueries, 1, 1], threads, shared: rows * (C + 8) * 2, args: [at(sums!), "dq"] },
  ];
  return { source: source(use, main.body), launches, scratch: scratch! };
}

/** Where parts of these many bytes begin, one after the other on multiples of 256; last, where the next would. */
function offsets(bytes: readonly number[]): number[] {
  const at = [0];
  for (const n of bytes) at.push(at.at(-1)! + ceil(n, 256) * 256);
  return at;
}

/** What both plain kernels begin with, and how many blocks share the columns of one result. */
function plain(use: Use) {
  const d = dims(use);
  const width = Math.min(d.C, 128);
  const type = use.dtype.q === "bf16" ? "bf16" : "float";
  const common = render("cuda/attention_plain.cuh", { ...d, ...scales(d.C), type, width });
  return { d, common, threads: 256, tile: 64, slices: ceil(d.C, width) };
}

function forwardPlain(use: Use): Made {
  const { d, common, threads, tile, slices } = plain(use);
  const body = render("cuda/attention_plain.cu", { name: use.name, common });
  const grid: Launch["grid"] = [slices * d.B * d.G * d.M * ceil(d.S, tile), 1, 1];
  return {
    source: source(use, body),
    launches: [{ entry: use.name, grid, threads, shared: 0, args: ["q", "k", "v", "o", "lse", "start(S)"] }],
  };
}

function gradPlain(use: Use): Made {
  const { d, common, threads, tile, slices } = plain(use);
  const { B, S, U, G, M } = d;
  const body = render("cuda/attention_plain_grad.cu", { name: use.name, common });
  const reads = ["q", "k", "v", "dy", "lse", "scratch+0"];
  const launch = (entry: string, blocks: number, args: string[]): Launch => ({
    entry: `${use.name}_${entry}`,
    grid: [blocks, 1, 1],
    threads,
    shared: 0,
    args,
  });
  return {
    source: source(use, body),
    launches: [
      launch("rows", ceil(B * S * G * M, threads / 32), ["o", "dy", "scratch+0"]),
      launch("keys", slices * B * G * ceil(U, tile), [...reads, "dk", "dv", "start(S)"]),
      launch("queries", slices * B * G * M * ceil(S, tile), [...reads, "dq", "start(S)"]),
    ],
    scratch: 4 * B * S * G * M,
  };
}
