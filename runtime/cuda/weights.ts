/** Weights on a CUDA device, by the plan's kernel `weights`: initial ones from tables that the host makes, and those of checkpoints. */
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { entryOf, itemOf } from "../../schemas/lookup.ts";
import type { Buffer, Kernel, Launch, Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { WEIGHTS } from "../../schemas/weightsKernel.ts";
import { normalTable } from "../../src/ops/normalDraw.ts";
import type { NormalDraw, PlacedPiece, WeightLoader } from "../backend.ts";
import { type DeviceRange, offsetPointer } from "./arenas.ts";
import { type Context, type DevicePointer, type Event, type Params, packParams, type Stream } from "./driver.ts";
import type { LoadedKernels } from "./kernels.ts";
import type { RankStreams } from "./streams.ts";

/** What the writer of weights needs of a rank. */
interface WeightParts {
  readonly plan: Plan;
  readonly context: Context;
  readonly streams: RankStreams;
  readonly kernels: LoadedKernels;
}

/** Blocks of a launch: each thread then writes several elements of a large tensor. */
const MOST_BLOCKS = 8192;

/** What profiles call this work. */
const label = { id: WEIGHTS, op: WEIGHTS, kernel: WEIGHTS };

/** Writes initial weights, and weights of checkpoints. */
export class Weights {
  readonly #parts: WeightParts;
  /** Tables on the device by standard deviation and type. */
  readonly #tables = new Map<string, DevicePointer>();

  constructor(parts: WeightParts) {
    this.#parts = parts;
  }

  /** Writes one shard to memory of different types, at most one of each size. Throws a Trouble if the plan has no kernel for it. */
  draw(ranges: readonly DeviceRange[], { key, std, box }: NormalDraw): void {
    const { streams } = this.#parts;
    const pointers = new Map<string, DevicePointer>();
    for (const { at, dtype } of ranges) {
      const suffix = dtypes[dtype].bytes === 4 ? "" : "16";
      if (pointers.has(`out${suffix}`)) throw new Error("rankc: initial weights are written to two buffers of one type");
      pointers.set(`out${suffix}`, at).set(`table${suffix}`, this.#table(std, dtype));
    }
    const numbers = {
      ...{ rows: box.rows, height: box.height, width: box.width, row_stride: box.rowStride, plane_stride: box.planeStride },
      ...{ base_low: box.base % 2 ** 32, base_high: Math.floor(box.base / 2 ** 32), key0: key[0], key1: key[1] },
    };
    const bound = this.#bind("draw", pointers, numbers);
    const blocks = Math.min(MOST_BLOCKS, Math.ceil((box.rows * box.width) / bound.launch.threads));
    streams.run({ reads: [], writes: ranges.map(({ span }) => span) }, label, (stream) => this.#issue(bound, [blocks], stream));
  }

  /** Opens a loader; `place` returns the memory of a buffer. */
  openLoader(place: (b: Buffer) => DeviceRange, happens: (event: Event) => Promise<void>): WeightLoader {
    const { context, streams } = this.#parts;
    const blocks = Array.from({ length: BLOCKS }, () => ({
      ...{ pinned: context.pin(BLOCK_BYTES), at: context.alloc(BLOCK_BYTES), done: context.createEvent("order") },
      isUsed: false,
    }));
    const bad = context.alloc(4);
    context.upload(bad, Uint32Array.of(NONE));
    return {
      ...{ blocks: BLOCKS, blockBytes: BLOCK_BYTES },
      free: async (n) => {
        const block = itemOf(blocks, n, "block");
        if (block.isUsed) await happens(block.done);
        return { bytes: new Uint8Array(block.pinned.bytes), address: block.pinned.at };
      },
      place: (n, bytes, pieces) => {
        const block = itemOf(blocks, n, "block");
        block.isUsed = true;
        const targets = pieces.map(({ target }) => target.map(place));
        streams.run({ reads: [], writes: targets.flat().map(({ span }) => span) }, label, (stream) => {
          context.copyIn(block.at, block.pinned.at, bytes, stream);
          for (const [i, piece] of pieces.entries())
            this.#place(offsetPointer(block.at, piece.offset), piece, targets[i] ?? [], bad, stream);
          context.record(block.done, stream);
        });
      },
      async finish() {
        for (const { isUsed, done } of blocks) if (isUsed) await happens(done);
        const found = new Uint32Array(1);
        context.download(found, bad);
        return found[0] === NONE ? undefined : found[0];
      },
      close() {
        // copies of a load that failed may still read the blocks
        context.synchronize(streams.compute.stream);
        for (const { pinned, at, done } of blocks) {
          context.unpin(pinned);
          context.free(at);
          context.destroyEvent(done);
        }
        context.free(bad);
      },
    };
  }

  #place(source: DevicePointer, { piece, id }: PlacedPiece, targets: readonly DeviceRange[], bad: DevicePointer, stream: Stream): void {
    const pointers = new Map<string, DevicePointer>([
      ["source", source],
      ["bad", bad],
    ]);
    for (const { at, dtype } of targets) pointers.set(dtypes[dtype].bytes === 4 ? "out" : "out16", at);
    const half = targets.find(({ dtype }) => dtypes[dtype].bytes === 2);
    const { rows, columns, stride, to, rowStep, columnStep } = piece;
    const bound = this.#bind("place", pointers, {
      ...{ rows, columns, stride, row_step: rowStep, column_step: columnStep, to_low: to % 2 ** 32, to_high: Math.floor(to / 2 ** 32) },
      ...{ type: typeCode(piece.tensor.dtype), type16: half ? typeCode(dtypes[half.dtype].safetensors) : 0, piece: id },
    });
    const grid = [Math.ceil(columns / TILE), Math.min(MOST_BLOCKS, Math.ceil(rows / TILE))] as const;
    this.#issue(bound, grid, stream);
  }

  /** Frees the tables. */
  close(): void {
    for (const table of this.#tables.values()) this.#parts.context.free(table);
    this.#tables.clear();
  }

  #table(std: number, dtype: Dtype): DevicePointer {
    const { context } = this.#parts;
    const known = this.#tables.get(`${std} ${dtype}`);
    if (known !== undefined) return known;
    const words = normalTable(std, dtype);
    const at = context.alloc(words.byteLength);
    this.#tables.set(`${std} ${dtype}`, at);
    context.upload(at, words);
    return at;
  }

  /** Binds a launch of the plan's kernel to its arguments by name; a pointer that is not given is null. */
  #bind(name: string, pointers: ReadonlyMap<string, DevicePointer>, numbers: Readonly<Record<string, number>>): BoundLaunch {
    const kernel = this.#parts.plan.kernels.find(({ op }) => op === WEIGHTS);
    const launch = kernel?.launches.find(({ entry }) => entry.endsWith(`_${name}`));
    if (!kernel || !launch)
      throw new Trouble(
        `the plan has no kernel ${WEIGHTS}_${name}, which writes weights`,
        "compile the job again with this version of rankc",
      );
    const all = new Map(Object.entries(numbers));
    const args = launch.args.map((arg) => {
      if (arg.kind === "operand") return pointers.get(arg.name) ?? 0n;
      if (arg.kind === "attribute") return entryOf(all, arg.name, "number of the kernel") | 0;
      throw new Error(`rankc: the kernel ${kernel.id} takes an argument of kind ${arg.kind}`);
    });
    return { kernel, launch, params: packParams(...args) };
  }

  #issue({ kernel, launch, params }: BoundLaunch, grid: readonly [number, number?], stream: Stream): void {
    const { context, kernels } = this.#parts;
    context.launch(kernels.entry(kernel, launch), { grid, block: [launch.threads], stream }, params);
  }
}

interface BoundLaunch {
  readonly kernel: Kernel;
  readonly launch: Launch;
  readonly params: Params;
}

/** Blocks of host memory of a load: as many reads are under way. */
const BLOCKS = 8;
const BLOCK_BYTES = 2 ** 24;
/** The value of `bad` while all values are finite. */
const NONE = 2 ** 32 - 1;
/** Rows and columns that a block of threads moves. */
const TILE = 32;

const codes: Readonly<Record<string, number>> = { F32: 0, BF16: 1, F16: 2 };
/** Returns the number of an element type in the kernel; `name`: that of safetensors. */
function typeCode(name: string): number {
  const code = codes[name];
  if (code === undefined) throw new Error(`rankc: no kernel converts weights of type ${name}`);
  return code;
}
