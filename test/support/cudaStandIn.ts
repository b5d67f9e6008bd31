/**
 * CUDA without a GPU: the backend before stand-ins for the driver and for NCCL (test/fixtures/standIn*.c), all ranks in this
 * process. Kernels are the ops' references, run on the bytes that the parameters of a launch point at. The streams of the
 * stand-in run them late, and in random order where no event orders them.
 */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { vi } from "vitest";
import { cubinFile } from "../../runtime/cuda/kernels.ts";
import { koffi } from "../../runtime/cuda/libraries.ts";
import { bytesOf, storeValues, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import { raggedOperandOf } from "../../schemas/effects.ts";
import type { Buffer, Compute, Kernel, Launch, Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import { WEIGHTS } from "../../schemas/weightsKernel.ts";
import { weightsKernel } from "../../src/codegen/cuda/weights.ts";
import { attributeOf, neededRows, ownBlock, planLaunch, rowIndex, startOf } from "../../src/codegen/launchArgs.ts";
import { ops } from "../../src/ops/index.ts";
import { drawElements } from "../../src/ops/normalDraw.ts";
import { fixture } from "./job.ts";

const cc = process.env.CC ?? "cc";
/** The reason why there is no stand-in; empty if there is one. */
export const noCompiler: string = (() => {
  try {
    execFileSync(cc, ["--version"], { stdio: "ignore" });
    return "";
  } catch {
    return ` [skipped: no C compiler ${cc}]`;
  }
})();

export type Kernels = Readonly<Record<string, (params: DataView, launch: Pick<Launch, "grid" | "threads" | "shared">) => void>>;

/** Memory at an address. */
export const bytesAt = (at: bigint, bytes: number): ArrayBuffer => koffi().view(at, bytes);

export async function standIn({ oldNccl = false } = {}) {
  const folder = mkdtempSync(join(tmpdir(), "rankc-stand-in-"));
  const [driver, nccl] = ["standInDriver", "standInNccl"].map((name) => join(folder, `${name}.so`)) as [string, string];
  const build = (into: string, ...from: readonly string[]) => execFileSync(cc, ["-shared", "-fPIC", "-O2", "-w", "-o", into, ...from]);
  build(driver, fixture("standInDriver.c"));
  build(nccl, fixture("standInNccl.c"), driver, ...(oldNccl ? ["-DOLD"] : []));
  vi.stubEnv("RANKC_LIBCUDA", driver);
  vi.stubEnv("RANKC_LIBNCCL", nccl);
  vi.stubEnv("STAND_IN_DEVICES", "32");
  vi.resetModules();
  const { openCuda } = await import("../../runtime/cuda/backend.ts");
  const { load, proto, pointer, register } = koffi();
  const at = { driver: load(driver), nccl: load(nccl) };
  let known: Kernels = {};
  let went: unknown;
  const callback = register(
    (name: string, params: bigint, size: number, x: number, y: number, z: number, threads: number, shared: number) => {
      try {
        known[name]!(new DataView(bytesAt(params, size).slice(0)), { grid: [x, y, z], threads, shared });
      } catch (error) {
        went ??= error;
      }
    },
    pointer(proto("void", ["str", "uintptr_t", "int", "uint", "uint", "uint", "uint", "uint"])),
  );
  at.driver.func("standInOnLaunch", "void", ["void *"])(callback);
  return {
    openCuda,
    /** Sets what kernels do, by the name of their function. */
    serve: (kernels: Kernels): void => {
      known = kernels;
    },
    /** Returns what a kernel threw since the last call. */
    complaint: (): unknown => {
      const printed = went;
      went = undefined;
      return printed;
    },
    seed: at.driver.func("standInSeed", "void", ["uint"]) as (seed: number) => void,
    /** Work that waits in streams. */
    queued: at.driver.func("standInQueued", "int", []) as () => number,
    /** The communicators whose collectives have a limit of multiprocessors, of all ranks so far. */
    limited: at.nccl.func("standInLimited", "int", []) as () => number,
    /** Sets whether NCCL reports that another rank has failed. */
    failNccl: at.nccl.func("standInFail", "void", ["int"]) as (yes: number) => void,
  };
}

/** Kernel files as the stand-in takes them: the functions' names. */
export const imagesOf = (plan: Plan) => ({
  source: (file: string): string => {
    throw new Error(`${file} is not to be compiled`);
  },
  cubin: (file: string): Uint8Array => {
    const kernel = plan.kernels.find((k) => file === k.cubin?.file)!;
    return new TextEncoder().encode(`\x7fELF\n${kernel.launches.map((l) => `${l.entry}\n`).join("")}\0`);
  },
});

/** The plan with a cubin for each kernel that has none: the stand-ins compile nothing. */
export const withCubins = (plan: Plan): Plan => ({
  ...plan,
  kernels: plan.kernels.map((k) => (k.cubin || !k.source ? k : { ...k, cubin: { file: cubinFile(k, "sm_90a"), sha256: k.source.sha256 } })),
});

/** A plan for the CPU as one for CUDA, each op one launch that takes its operands, its rows and its starts; and what those launches do. */
export function asCuda(plan: Plan): { readonly plan: Plan; readonly kernels: Kernels } {
  const instructions = plan.programs.flatMap((p) =>
    instructionsOf(p).flatMap((i) => (i.kind === "compute" ? [{ i, buffers: new Map(p.buffers.map((b) => [b.id, b])) }] : [])),
  );
  const serve: Record<string, Kernels[string]> = {};
  const kernels = plan.kernels.map((k): Kernel => {
    const { i: user, buffers } = instructions.find((found) => found.i.kernel === k.id || found.i.first_kernel === k.id)!;
    const { accumulates, ...writing } = user;
    const i = user.first_kernel === k.id || accumulates === undefined ? writing : { ...writing, accumulates };
    const operands = [...Object.entries(i.reads), ...Object.entries(i.writes)].map(([name, id]) => [name, buffers.get(id)!] as const);
    const ragged = raggedOperandOf(i, buffers);
    const overflow = i.rows && buffers.has(`${i.rows}.needed`);
    const starts = Object.keys(i.dims);
    const { runtimeAttrs = [] } = ops[i.op];
    const rows = ragged && buffers.get(ragged.rows!)!;
    serve[k.id] = byReference(plan, i, operands, { ragged, rows, overflow: overflow === true, starts, runtimeAttrs });
    const launch = planLaunch({
      entry: k.id,
      grid: [1, 1, 1],
      threads: 32,
      shared: 0,
      args: [
        ...operands.map(([name]) => name),
        ...(ragged ? [rowIndex] : []),
        ...(overflow ? [neededRows] : []),
        ...starts.map(startOf),
        ...(i.blocks ? [ownBlock] : []),
        ...runtimeAttrs.map(attributeOf),
      ],
    });
    const sha256 = createHash("sha256").update(k.id).digest("hex");
    return { ...k, source: { file: `${k.id}.cu`, sha256 }, launches: [launch] };
  });
  serve[`${WEIGHTS}_draw`] = drawByReference;
  serve[`${WEIGHTS}_place`] = placeByReference;
  const sha256 = createHash("sha256").update(WEIGHTS).digest("hex");
  const weights: Kernel = {
    ...{ id: WEIGHTS, op: WEIGHTS, dtypes: "", sizes: {}, attrs: {}, uses: 1, scratch: 0, source: { file: `${WEIGHTS}.cu`, sha256 } },
    launches: weightsKernel(WEIGHTS).launches.map(planLaunch),
  };
  return { plan: { ...plan, kernels: [...kernels, weights], toolchain: { ...plan.toolchain, target: "cuda:sm_90a" } }, kernels: serve };
}

/** The parameters of a placed piece: source, the outputs of 4 and of 2 bytes an element, the mark of values that are not finite, then numbers. */
function placeByReference(params: DataView): void {
  const [source = 0n, out = 0n, out16 = 0n, bad = 0n] = [0, 8, 16, 24].map((at) => params.getBigUint64(at, true));
  const [rows = 0, columns = 0, stride = 0, rowStep = 0, columnStep = 0, low = 0, high = 0, type = 0, type16 = 0, piece = 0] = Array.from(
    { length: 10 },
    (_, n) => params.getUint32(32 + 4 * n, true),
  );
  const types = ["f32", "bf16", "f16"] as const;
  const [from, stored16] = [types[type]!, types[type16]!];
  const span = (rows - 1) * stride + columns;
  const read = valuesIn(typedMemory(from, bytesAt(source, span * bytesOf[from])));
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const value = Float32Array.of(read[row * stride + column]!);
      const at = BigInt(high * 2 ** 32 + low + row * rowStep + column * columnStep);
      const mark = new Uint32Array(bytesAt(bad, 4));
      if (!Number.isFinite(value[0])) mark[0] = Math.min(mark[0]!, piece);
      if (out) storeValues(typedMemory("f32", bytesAt(out + 4n * at, 4)), value);
      if (out16) storeValues(typedMemory(stored16, bytesAt(out16 + 2n * at, 2)), value);
    }
}

/** The parameters of a draw: tables and outputs of 4 and of 2 bytes an element, then the numbers of the shard, and the key. */
function drawByReference(params: DataView): void {
  const [table = 0n, out = 0n, table16 = 0n, out16 = 0n] = [0, 8, 16, 24].map((at) => params.getBigUint64(at, true));
  const [rows = 0, height = 0, width = 0, rowStride = 0, planeStride = 0, low = 0, high = 0, key0 = 0, key1 = 0] = Array.from(
    { length: 9 },
    (_, n) => params.getUint32(32 + 4 * n, true),
  );
  for (let row = 0; row < rows; row++) {
    const start = high * 2 ** 32 + low + Math.floor(row / height) * planeStride + (row % height) * rowStride;
    const at = row * width;
    if (out)
      drawElements(new Int32Array(bytesAt(out + BigInt(4 * at), 4 * width)), new Int32Array(bytesAt(table, 4 << 15)), [key0, key1], start);
    if (out16)
      drawElements(
        new Uint16Array(bytesAt(out16 + BigInt(2 * at), 2 * width)),
        new Uint16Array(bytesAt(table16, 2 << 15)),
        [key0, key1],
        start,
      );
  }
}

function byReference(
  plan: Plan,
  i: Compute,
  operands: readonly (readonly [string, Buffer])[],
  given: {
    ragged: Buffer | undefined;
    rows: Buffer | undefined;
    overflow: boolean;
    starts: readonly string[];
    runtimeAttrs: readonly string[];
  },
): Kernels[string] {
  const op = ops[i.op];
  const d = {
    ...i.attrs,
    ...Object.fromEntries(Object.entries(i.dims).map(([dim, [size, cut]]) => [dim, size / shardCount(plan.mesh, cut)])),
  };
  return (params) => {
    let at = 0;
    const memory = (b: Pick<Buffer, "dtype" | "shape">) => {
      const count = elementsOf(b.shape);
      const bytes = bytesAt(params.getBigUint64(8 * at++, true), count * bytesOf[b.dtype]);
      return typedMemory(b.dtype, bytes);
    };
    const after: (() => void)[] = [];
    const t = Object.fromEntries(
      operands.map(([name, b]) => {
        const own = memory(b);
        const output = name in i.writes;
        const accumulates = i.accumulates?.includes(name);
        const view = own.codec ? new Float32Array(own.words.length) : (own.words as Float32Array);
        if (own.codec && (!output || accumulates)) own.codec.decode(view, own.words);
        if (output && !accumulates) view.fill(0);
        if (own.codec && output) after.push(() => own.codec.encode(own.words, view));
        return [name, view];
      }),
    );
    const rows = given.rows ? (memory(given.rows).words as Int32Array) : new Int32Array(1);
    const needed = given.overflow ? (memory({ dtype: "i32", shape: [] }).words as Int32Array) : undefined;
    const numbers = 8 * at;
    const starts = new Map(given.starts.map((dim, n) => [dim, params.getInt32(numbers + 4 * n, true)]));
    const block = i.blocks ? params.getInt32(numbers + 4 * starts.size, true) : 0;
    const attrsAt = numbers + 4 * (starts.size + (i.blocks ? 1 : 0));
    // runtime attributes differ between the instructions that share a kernel
    const own = Object.fromEntries(given.runtimeAttrs.map((name, n) => [name, params.getUint32(attrsAt + 4 * n, true)]));
    const place = { start: (dim: string) => starts.get(dim)!, rows, block };
    if (i.rows) {
      const count = op.rows!(t, d, place, rows, given.ragged!.shape[0]!);
      if (needed && count > given.ragged!.shape[0]!) needed[0] = Math.max(needed[0]!, count);
    }
    op.cpu(t, { ...d, ...own }, place);
    for (const f of after) f();
  };
}
