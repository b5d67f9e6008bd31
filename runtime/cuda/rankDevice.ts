/** Memory and kernels of one rank on a CUDA device. Calls are issued to the compute stream. */
import { encoded, storeValues, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Buffer, Compute } from "../../schemas/plan.ts";
import type { CopyPiece, HostBlock, HostData, NormalDraw, RankDevice, StagingArea, WeightLoader } from "../backend.ts";
import type { CudaArenas } from "./arenas.ts";
import type { Context, Pinned } from "./driver.ts";
import type { Steps } from "./graph.ts";
import type { Bound } from "./launches.ts";
import { copyPieces, openStaging } from "./staging.ts";
import type { RankStreams } from "./streams.ts";
import type { Waits } from "./waits.ts";
import type { Weights } from "./weights.ts";

/** What the rank device uses. */
export interface RankDeviceParts {
  readonly context: Context;
  readonly streams: RankStreams;
  readonly arenas: CudaArenas;
  readonly steps: Steps;
  readonly waits: Waits;
  readonly weights: Weights;
  /** Binds an op to its kernel and its buffers in one activation copy; `first`: to `first_kernel`. */
  readonly bind: (i: Compute, copy: number, first: boolean) => Bound;
}

/** The launches of one op: by activation copy, of `kernel` and of `first_kernel`. */
interface BoundCopies {
  readonly usual: Bound[];
  readonly first: Bound[];
}

/** The rank device of a CUDA process. */
export class CudaRankDevice implements RankDevice {
  readonly #parts: RankDeviceParts;
  readonly #bound = new Map<Compute, BoundCopies>();
  /** Pinned memory for reads that no read uses. */
  readonly #idle: Pinned[] = [];

  constructor(parts: RankDeviceParts) {
    this.#parts = parts;
  }

  zeroGradients(): void {
    const { context, streams, arenas, steps } = this.#parts;
    const { at, bytes, span } = arenas.zeroed;
    if (steps.mode === "replay" || bytes === 0) return;
    streams.run({ reads: [], writes: [span] }, undefined, (s) => context.fillIn(at, 0, bytes, s));
  }

  compute(i: Compute, copy: number, first = false): void {
    const { streams, steps, bind } = this.#parts;
    if (steps.mode === "replay") return;
    const bound = this.#bound.get(i) ?? { usual: [], first: [] };
    this.#bound.set(i, bound);
    const isFirst = first && i.first_kernel !== undefined;
    const { touch, issue, kernel } = (bound[isFirst ? "first" : "usual"][copy] ??= bind(i, copy, isFirst));
    streams.run(touch, { id: i.id, op: i.op, kernel }, issue);
  }

  write(buffer: Buffer, copy: number, data: HostData): void {
    const { context, streams, arenas, steps } = this.#parts;
    const { at, bytes, span, count } = arenas.place(buffer.id, copy);
    if (data.length !== count) throw new Error(`rankc: ${data.length} values are written to ${buffer.id}, which holds ${count}`);
    const mode = steps.mode;
    const staged = mode && steps.write(buffer, copy, bytes);
    if (staged) storeValues(typedMemory(buffer.dtype, staged.memory, staged.offset, count), data);
    if (mode === "replay") return;
    const source = staged?.source ?? { kind: "host", at: encoded(buffer.dtype, data).words };
    streams.run({ reads: [], writes: [span] }, undefined, (s) =>
      source.kind === "host" ? context.copyIn(at, source.at, bytes, s) : context.copy(at, source.at, bytes, s),
    );
  }

  draw(buffers: readonly Buffer[], draw: NormalDraw): void {
    const { arenas, weights } = this.#parts;
    weights.draw(
      buffers.map(({ id }) => arenas.place(id, 0)),
      draw,
    );
  }

  openLoader(): WeightLoader {
    const { arenas, weights, waits } = this.#parts;
    return weights.openLoader(
      ({ id }) => arenas.place(id, 0),
      (event) => waits.happens(event),
    );
  }

  async read(buffer: Buffer, copy: number): Promise<HostData> {
    const { context, streams, arenas, steps, waits } = this.#parts;
    if (steps.mode === "capture" || steps.mode === "replay")
      throw new Error(`rankc: ${buffer.id} is read within a step that is a graph: open with graph: false`);
    const { at, bytes, span, count } = arenas.place(buffer.id, copy);
    const pinned = this.#borrow(bytes);
    const copied = context.createEvent("order");
    streams.run({ reads: [span], writes: [] }, undefined, (s) => {
      context.copyOut(pinned.at, at, bytes, s);
      context.record(copied, s);
    });
    await waits.happens(copied);
    context.destroyEvent(copied);
    const memory = typedMemory(buffer.dtype, pinned.bytes, 0, count);
    const data = memory.codec ? valuesIn(memory) : memory.words.slice();
    this.#idle.push(pinned);
    return data;
  }

  async copyOut(pieces: readonly CopyPiece[], { address }: HostBlock): Promise<void> {
    const { context, streams, waits } = this.#parts;
    if (typeof address !== "bigint") throw new Error("rankc: the state is copied to pinned memory");
    copyPieces(this.#parts, pieces, ({ at, bytes }, from, stream) => context.copyOut(address + BigInt(at), from, bytes, stream));
    const copied = context.createEvent("order");
    context.record(copied, streams.compute.stream);
    await waits.happens(copied);
    context.destroyEvent(copied);
  }

  openStaging(most: number, unit: number): StagingArea | undefined {
    return openStaging(this.#parts, most, unit);
  }

  /** Frees the pinned memory of reads, and the tables of initial weights. */
  close(): void {
    this.#parts.weights.close();
    for (const memory of this.#idle) this.#parts.context.unpin(memory);
  }

  /** Returns pinned memory of at least this size; the caller returns it to `#idle`. */
  #borrow(bytes: number): Pinned {
    const at = this.#idle.findIndex((p) => p.bytes.byteLength >= bytes);
    const [found] = at >= 0 ? this.#idle.splice(at, 1) : [];
    return found ?? this.#parts.context.pin(Math.max(bytes, 4096));
  }
}
