/** Initial weights on a CUDA device: the plan's kernel `weights`, with tables that the host makes. */
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { entryOf } from "../../schemas/lookup.ts";
import { type Kernel, type Launch, type Plan, WEIGHTS } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { normalTable } from "../../src/ops/normalDraw.ts";
import type { NormalDraw } from "../backend.ts";
import type { DeviceRange } from "./arenas.ts";
import { type Context, type DevicePointer, packParams } from "./driver.ts";
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

/** Writes initial weights. */
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
    const numbers = new Map(
      Object.entries({
        ...{ rows: box.rows, height: box.height, width: box.width, row_stride: box.rowStride, plane_stride: box.planeStride },
        ...{ base_low: box.base % 2 ** 32, base_high: Math.floor(box.base / 2 ** 32), key0: key[0], key1: key[1] },
      }),
    );
    const { kernel, launch } = this.#launch("draw");
    const params = packParams(
      ...launch.args.map((arg) => {
        if (arg.kind === "operand") return pointers.get(arg.name) ?? 0n;
        if (arg.kind === "attribute") return entryOf(numbers, arg.name, "number of the kernel") | 0;
        throw new Error(`rankc: the kernel ${kernel.id} takes an argument of kind ${arg.kind}`);
      }),
    );
    const blocks = Math.min(MOST_BLOCKS, Math.ceil((box.rows * box.width) / launch.threads));
    const label = { id: WEIGHTS, op: WEIGHTS, kernel: kernel.id };
    streams.run({ reads: [], writes: ranges.map(({ span }) => span) }, label, (stream) =>
      this.#parts.context.launch(this.#parts.kernels.entry(kernel, launch), { grid: [blocks], block: [launch.threads], stream }, params),
    );
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

  #launch(name: string): { readonly kernel: Kernel; readonly launch: Launch } {
    const kernel = this.#parts.plan.kernels.find(({ op }) => op === WEIGHTS);
    const launch = kernel?.launches.find(({ entry }) => entry.endsWith(`_${name}`));
    if (!kernel || !launch)
      throw new Trouble(
        `the plan has no kernel ${WEIGHTS}_${name}, which writes weights`,
        "compile the job again with this version of rankc",
      );
    return { kernel, launch };
  }
}
