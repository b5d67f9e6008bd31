/**
 * Causal attention and its gradient, for all keys or a shard of them. 16-bit floats with widths that are multiples of 16 use tensor cores: forward
 * up to 192 (values 128), on Hopper up to 256 (values 256) without dropout; gradients if their tiles fit in shared memory. Everything else, f32
 * included, uses f32 arithmetic. Sums have a fixed order: equal inputs give equal bits.
 */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { cudaType, type Float16, float16Types, isFloat16 } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import * as attentionOps from "../../ops/attention.ts";
import * as documentOps from "../../ops/attentionDocuments.ts";
import * as dropoutOps from "../../ops/attentionDropout.ts";
import { type AttentionGradSpec, type AttentionSizes, type AttentionSpec, attentionSizes, isReordered } from "../attentionSizes.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, scratch, scratchStart } from "../launchArgs.ts";
import { forwardHopper, gradHopper, gradTilingOfHopper } from "./attentionHopper.ts";
import { orderOf } from "./attentionOrder.ts";
import { causalMaskText, randomText, scales, startTexts } from "./attentionText.ts";
import { source } from "./text.ts";

/** CUDA kernels of attention. */
export const attention = {
  attention: cudaKernel(attentionOps.attention, forward),
  attention_grad: cudaKernel(attentionOps.attentionGrad, backward),
  attention_part: cudaKernel(attentionOps.attentionPart, forward),
  attention_part_grad: cudaKernel(attentionOps.attentionPartGrad, backward),
  attention_dropout: cudaKernel(dropoutOps.attentionDropout, forward),
  attention_dropout_grad: cudaKernel(dropoutOps.attentionDropoutGrad, backward),
  attention_dropout_part: cudaKernel(dropoutOps.attentionDropoutPart, forward),
  attention_dropout_part_grad: cudaKernel(dropoutOps.attentionDropoutPartGrad, backward),
  attention_documents: cudaKernel(documentOps.attentionDocuments, forward),
  attention_documents_grad: cudaKernel(documentOps.attentionDocumentsGrad, backward),
  attention_documents_part: cudaKernel(documentOps.attentionDocumentsPart, forward),
  attention_documents_part_grad: cudaKernel(documentOps.attentionDocumentsPartGrad, backward),
  attention_dropout_documents: cudaKernel(documentOps.attentionDropoutDocuments, forward),
  attention_dropout_documents_grad: cudaKernel(documentOps.attentionDropoutDocumentsGrad, backward),
  attention_dropout_documents_part: cudaKernel(documentOps.attentionDropoutDocumentsPart, forward),
  attention_dropout_documents_part_grad: cudaKernel(documentOps.attentionDropoutDocumentsPartGrad, backward),
};

function forward(spec: AttentionSpec, arch: Arch): GeneratedKernel {
  const half = spec.dtype.q;
  const d = attentionSizes(spec);
  if (!isFloat16(half) || !fitsTensorCores(d)) return forwardPlain(spec);
  return (arch === "sm_90a" ? forwardHopper(spec, d, half) : undefined) ?? forwardTiles(spec, d, half, arch) ?? forwardPlain(spec);
}
function backward(spec: AttentionGradSpec, arch: Arch): GeneratedKernel {
  const half = spec.dtype.q;
  const d = attentionSizes(spec);
  return (isFloat16(half) && fitsTensorCores(d) ? gradTiles(spec, d, half, arch) : undefined) ?? gradPlain(spec);
}
/** Returns whether tensor cores can run these sizes. Tiles need consecutive rows of queries. */
const fitsTensorCores = (d: AttentionSizes): boolean =>
  d.C % 16 === 0 && d.C <= 256 && d.W % 16 === 0 && d.W <= 256 && !isReordered(d, d.S);
/** Returns the first of the block sizes whose keys are consecutive in memory in any shard. */
const keysOf = <N extends number>(d: AttentionSizes, keys: readonly N[]): N | undefined =>
  isReordered(d, d.U) ? keys.find((n) => d.chunk % n === 0) : keys[0];
const ceil = (n: number, by: number) => Math.ceil(n / by);

/** Returns the common beginning of the forward and gradient kernels on tensor cores. */
const tilesText = (d: AttentionSizes, half: Float16, threads: number): string =>
  render("cuda/attention_tiles.cuh", {
    ...d,
    ...scales(d),
    ...float16Types[half],
    threads,
    causalMask: causalMaskText(d),
    random: randomText(d),
  });

/**
 * Each warp has 32 query rows, so that every load of K and V serves 32 rows; K and V have two stages. With 255 registers a multiprocessor holds 8
 * warps, in two thread blocks if shared memory allows it. The outputs of wide heads leave too few registers for the scores of 64 keys; with 48 keys,
 * ptxas spills one register for sm_100a, and for sm_90a with dropout.
 */
function forwardTiles(spec: KernelSpec, d: AttentionSizes, half: Float16, arch: Arch): GeneratedKernel | undefined {
  const { B, S, G, M, C, W } = d;
  if (C > 192 || W > 128) return undefined;
  const keys = keysOf(d, W <= 96 ? [64, 32, 16] : arch === "sm_90a" && !d.drops ? [48, 32, 16] : [32, 16]);
  if (!keys) return undefined;
  const { sharedPerBlock, sharedPerMultiprocessor } = cudaArchs[arch];
  const shared = (rows: number) => 2 * Math.max(rows * (C + 8) + 2 * keys * (C + W + 16), rows * (W + 8));
  const resident = 2 * (shared(128) + 1024) <= sharedPerMultiprocessor * 1024 ? 2 : 1;
  // architectures with 100 KiB of shared memory hold one block of four warps of the widest heads
  const threads = resident === 2 || shared(256) > sharedPerBlock * 1024 ? 128 : 256;
  const { args, ...texts } = startTexts(d);
  const tiles = tilesText(d, half, threads);
  const body = render("cuda/attention.cu", { name: spec.name, tiles, keys, resident, ...texts, ...float16Types[half] });
  const launch: GeneratedLaunch = {
    entry: spec.name,
    grid: [B * G * M * ceil(S, threads), 1, 1],
    threads,
    shared: shared(threads),
    args: ["q", "k", "v", "o", "lse", ...args],
  };
  return { source: source(spec, body), launches: [launch] };
}

/**
 * Five products per tile; key blocks add to the f32 gradients of queries one after the other. A separate launch for the gradients of queries would
 * repeat two products. With 16 rows per warp it would read 256 bytes of shared memory per m16n8k16; a multiprocessor reads 128 bytes per cycle and
 * computes one such product in 1.5 cycles. By these counts it would take 1.4 times as long.
 */
function gradTiles(spec: KernelSpec, d: AttentionSizes, half: Float16, arch: Arch): GeneratedKernel | undefined {
  const { B, S, U, G, M, C, W, part } = d;
  const hopper = arch === "sm_90a" ? gradTilingOfHopper(d) : undefined;
  const [threads, rows, H] = [256, hopper?.rows ?? 64, G * M];
  const padded = (keys: number, stages: 1 | 2) => 2 * (keys + stages * rows) * (C + W + 16) + 4 * rows * (keys + 8) + 16 * rows + 16;
  const hasRoom = (keys: number, stages: 1 | 2) => padded(keys, stages) <= cudaArchs[arch].sharedPerBlock * 1024;
  // registers hold the gradients of 128 keys and values if both are at most 128 wide (96 with dropout)
  const fits = (keys: number) => hasRoom(keys, 2) && (keys === 64 || C + W <= (d.drops ? 192 : 256));
  const blocks = hopper ? [hopper.keys] : ([128, 64] as const).filter(fits);
  // with 100 KiB of shared memory, 64 keys of heads of 128 leave room for one tile of queries
  const isTight = blocks.length === 0 && C + W <= 256 && hasRoom(64, 1);
  const stages = isTight ? 1 : 2;
  const keys = keysOf(d, isTight ? [64] : blocks);
  if (!keys) return undefined;
  const [queryBlocks, keyBlocks] = [ceil(S, rows), ceil(U, keys)];
  const { wave, alternating, split } = orderOf(d, {
    rows,
    keys,
    multiprocessors: cudaArchs[arch].multiprocessors,
    splits: hopper !== undefined,
  });
  const lanes = 2 ** Math.ceil(Math.log2(W / 8));
  const name = spec.name;
  const { args, ...texts } = startTexts(d);
  const tiles = tilesText(d, half, threads);
  const orderText = render("cuda/attention_order.cuh", {
    ...{ name, keys, rows, lanes, rowsEach: ROWS_EACH, vectors: cudaArchs[arch].vectorReductions, ...float16Types[half] },
    ...{ wave, alternating: `${alternating}`, split, ...texts },
  });
  const items = B * G * split * ceil(keyBlocks, wave) * wave;
  const common = { name, tiles, order: orderText, part, ...texts, ...float16Types[half], queryParams: part ? `, ${texts.params}` : "" };
  const main = hopper
    ? gradHopper(d, half, hopper, { ...common, split: split > 1 }, items, spec.sharesDevice === true)
    : {
        body: render("cuda/attention_grad.cu", { ...common, stages }),
        threads,
        shared: padded(keys, stages),
        args: ["q", "k", "v", "dy"],
        dtypes: {},
        blocks: items,
      };
  const grid = { rows, keys, lanes, queryTiles: B * H * queryBlocks, keyBlocks, blocks: main.blocks, split };
  return { source: source({ name, dtype: { ...spec.dtype, ...main.dtypes } }, main.body), ...gradLaunches(name, d, grid, main, args) };
}

/** Rows whose sums of o·dy a thread of the first launch computes: their loads overlap, and their results are one store. */
const ROWS_EACH = 4;

/** The tiles of a gradient on tensor cores, and how its thread blocks share them. */
interface GradGrid {
  /** Queries and keys of a tile. */
  readonly rows: number;
  readonly keys: number;
  /** Threads of the first launch that share a row. */
  readonly lanes: number;
  readonly queryTiles: number;
  readonly keyBlocks: number;
  /** Thread blocks of the launch of the products. */
  readonly blocks: number;
  /** Thread blocks that share the query heads of a key head (attentionOrder.ts). */
  readonly split: number;
}

/** Returns the launches of a gradient on tensor cores: sums of rows, the products, conversion of the gradients of queries, then sums over `split`. */
function gradLaunches(
  name: string,
  d: AttentionSizes,
  { rows, keys, lanes, queryTiles, keyBlocks, blocks, split }: GradGrid,
  main: Pick<GeneratedLaunch, "threads" | "shared" | "args">,
  args: readonly KernelArg[],
): Pick<GeneratedKernel, "launches" | "scratch"> {
  const { B, U, G, C, W, part } = d;
  const threads = 256;
  const { at, end } = offsets({
    sums: 4 * queryTiles * rows * C,
    lse2: 4 * queryTiles * rows,
    delta: 4 * queryTiles * rows,
    counters: 4 * queryTiles + 4,
    keyParts: split > 1 ? 4 * split * B * G * keyBlocks * keys * (C + W) : 0,
    ends: d.documents ? 4 * B * U : 0,
  });
  const launches: GeneratedLaunch[] = [
    {
      entry: `${name}_rows`,
      grid: [ceil((queryTiles * rows * lanes) / ROWS_EACH, threads), 1, 1],
      threads,
      shared: 0,
      args: ["o", "lse", "dy", scratch(at.lse2), scratch(at.delta), scratch(at.counters)],
    },
    {
      entry: name,
      grid: [blocks, 1, 1],
      threads: main.threads,
      shared: main.shared,
      args: [
        ...main.args,
        scratch(at.lse2),
        scratch(at.delta),
        scratch(at.sums),
        scratch(at.counters),
        ...(split > 1 ? [scratch(at.keyParts)] : ["dk", "dv"]),
        ...(d.documents ? [scratch(at.ends)] : []),
        ...args,
      ],
    },
    {
      entry: `${name}_queries`,
      grid: [queryTiles, 1, 1],
      threads,
      shared: rows * (C + 8) * 2,
      args: [scratch(at.sums), "dq", ...(part ? args : [])],
    },
  ];
  if (d.documents)
    launches.unshift({
      entry: `${name}_ends`,
      grid: [ceil(B * U, threads), 1, 1],
      threads,
      shared: 0,
      args: [scratch(at.ends), ...args],
    });
  if (split > 1)
    launches.push({
      entry: `${name}_keys`,
      grid: [B * G * keyBlocks, 1, 1],
      threads,
      shared: keys * (Math.max(C, W) + 8) * 2,
      args: [scratch(at.keyParts), "dk", "dv", ...args],
    });
  return { launches, scratch: end };
}

/** Returns the offsets of consecutive parts of these sizes in bytes, aligned to 256, and the end. */
function offsets<Part extends string>(
  bytes: Readonly<Record<Part, number>>,
): { readonly at: Readonly<Record<Part, number>>; readonly end: number } {
  const at: Record<Part, number> = { ...bytes };
  let end = 0;
  for (const part in bytes) {
    at[part] = end;
    end += ceil(bytes[part], 256) * 256;
  }
  return { at, end };
}

/** Returns the common beginning of both f32 kernels. Thread blocks compute 128 columns of a result; `columns`: the width of the widest result. */
function plain(spec: AttentionSpec | AttentionGradSpec, columns: number) {
  const d = attentionSizes(spec);
  const slices = ceil(columns, 128);
  const type = cudaType(spec.dtype.q);
  const common = render("cuda/attention_plain.cuh", {
    ...d,
    ...scales(d),
    type,
    slices,
    causalMask: causalMaskText(d),
    random: randomText(d),
  });
  return { d, common, threads: 256, tile: 64, slices, ...startTexts(d) };
}

function forwardPlain(spec: AttentionSpec): GeneratedKernel {
  const { d, common, threads, tile, slices, args, ...texts } = plain(spec, spec.d.W);
  const body = render("cuda/attention_plain.cu", { name: spec.name, common, ...texts });
  const grid: GeneratedLaunch["grid"] = [slices * d.B * d.G * d.M * ceil(d.S, tile), 1, 1];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid, threads, shared: 0, args: ["q", "k", "v", "o", "lse", ...args] }],
  };
}

function gradPlain(spec: AttentionGradSpec): GeneratedKernel {
  const { d, common, threads, tile, slices, args, ...texts } = plain(spec, Math.max(spec.d.C, spec.d.W));
  const { B, S, U, G, M, C } = d;
  const body = render("cuda/attention_plain_grad.cu", { name: spec.name, common, ...texts });
  const reads = ["q", "k", "v", "dy", "lse", scratchStart];
  const launch = (entry: string, blocks: number, args: readonly KernelArg[]): GeneratedLaunch => ({
    entry: `${spec.name}_${entry}`,
    grid: [blocks, 1, 1],
    threads,
    shared: 0,
    args,
  });
  return {
    source: source(spec, body),
    launches: [
      launch("rows", ceil(B * S * G * M, threads / 32), ["o", "dy", scratchStart]),
      launch("keys", slices * B * G * ceil(U, tile), [...reads, "dk", "dv", ...args]),
      launch("queries", ceil(C, 128) * B * G * M * ceil(S, tile), [...reads, "dq", ...args]),
    ],
    scratch: 4 * B * S * G * M,
  };
}
