/**
 * Runs generated CUDA sources on the CPU: compiled by g++ behind test/cuda-emulator, called by koffi. Every kernel runs twice,
 * forwards and backwards through its blocks and threads, or in more orders: all must leave the same bits, in every buffer.
 */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { koffi } from "../../runtime/cuda/libraries.ts";
import { bytesOf, encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { TensorMap } from "../../schemas/plan.ts";
import { listedName, tensorOf } from "../../schemas/tensorLists.ts";
import type { GeneratedKernel, KernelSpec } from "../../src/codegen/kernelSpec.ts";
import type { KernelArg } from "../../src/codegen/launchArgs.ts";
import { ops } from "../../src/ops/index.ts";
import { root } from "./checkout.ts";
import { type Buffers, type Executor, startIn } from "./contract.ts";
import { isFull } from "./tiers.ts";

export interface Compiled {
  readonly use: KernelSpec;
  readonly made: GeneratedKernel;
}

const headers = ["emulator.hpp", "hopper.hpp", "intrinsics.hpp"].map((file) => join(root, "test/cuda-emulator", file));
// the few kernels of the fast tier take longer to compile than to run
const options = [
  "-std=c++20",
  isFull ? "-O1" : "-Og",
  "-march=native",
  "-w",
  "-shared",
  "-fPIC",
  "-fno-gnu-unique",
  "-fvisibility=hidden",
  "-x",
  "c++",
];
const cache = join(root, "node_modules/.cache/rankc-cuda-emulator");

/** Returns the reason why this machine has no emulator; undefined if it has one. */
export async function emulatorMissing(): Promise<string | undefined> {
  return await run("g++", ["--version"]).then(
    () => undefined,
    () => "g++ is missing",
  );
}
const run = promisify(execFile);

export interface Emulator extends Executor {
  /** Compiles what is not compiled yet; `run` does it too. */
  prepare(): Promise<void>;
}

/**
 * Compiles kernels together on first use; the library is kept below node_modules. `orders`: 0 is forwards, 1
 * backwards, any other the seed of an order by chance.
 */
export function cudaEmulator(kernels: readonly Compiled[], orders: readonly number[] = [0, 1]): Emulator {
  let library: Promise<Library> | undefined;
  const get = () => (library ??= compile(kernels).then(open));
  return {
    name: "emulated CUDA",
    prepare: async () => void (await get()),
    async run(made, use, data, starts) {
      const compiled = await get();
      const [first, ...others] = orders.map((order) => runOn(compiled, made, use, data, starts, order));
      for (const [name, bytes] of Object.entries(first!))
        for (const other of others)
          if (Buffer.compare(bytes, other[name]!) !== 0) throw new Error(`${use.name}: ${name} depends on the order of threads or blocks`);
      return Object.fromEntries(Object.keys(data).map((name) => [name, unpack(first![name]!, name, use)]));
    },
  };
}

/** The path of a library that holds these kernels. */
async function compile(group: readonly Compiled[]): Promise<string> {
  const entries = group.flatMap(({ made }) => [...new Set(made.launches.map((l) => l.entry))].map((entry) => ({ made, entry })));
  const text = [
    `#include ${JSON.stringify(headers[0])}`,
    ...group.map((k) => k.made.source),
    ...group.flatMap(({ made }) => namespacesOf(made.source).map((name) => `using namespace ${name};`)),
    "const emulator::Entry emulator::entries[] = {",
    ...entries.map(({ made, entry }) => `  emulator::entry<${entry}>("${entry}", ${clusterOf(made, entry)}),`),
    "  {}};",
  ].join("\n");
  const digest = createHash("sha256");
  for (const part of [text, options.join(" "), cpus()[0]?.model ?? "", ...headers.map((h) => readFileSync(h, "utf8"))]) digest.update(part);
  const path = join(cache, `${group[0]!.use.op}-${digest.digest("hex").slice(0, 16)}`);
  if (existsSync(`${path}.so`)) return `${path}.so`;
  mkdirSync(cache, { recursive: true });
  const own = `${path}.${process.pid}`;
  writeFileSync(`${own}.cu`, text);
  await run("g++", [...options, "-o", `${own}.so`, `${own}.cu`], { maxBuffer: 1 << 26 }).catch((error) => {
    throw new Error(`g++ refuses ${own}.cu:\n${String(error.stderr).slice(0, 4000)}`);
  });
  renameSync(`${own}.cu`, `${path}.cu`);
  renameSync(`${own}.so`, `${path}.so`);
  return `${path}.so`;
}

/** The namespaces of a source: several where it is made of the sources of several kernels. */
export const namespacesOf = (source: string): string[] => [...source.matchAll(/^namespace (\w+_ns) \{/gm)].map(([, name = ""]) => name);

/** Blocks in a cluster of an entry, which stands in its source: `__cluster_dims__(2, 1, 1)`. */
const clusterOf = ({ source }: GeneratedKernel, entry: string): number =>
  Number(new RegExp(`__cluster_dims__\\((\\d+)[^{]*\\b${entry}\\(`).exec(source)?.[1] ?? 1);

type Library = ReturnType<typeof open>;
function open(path: string) {
  const library = koffi().load(path);
  const alloc = library.func("emulatorAlloc", "uint64_t", ["uint64_t"]);
  return {
    alloc: (bytes: number) => BigInt(alloc(bytes)),
    freeAll: library.func("emulatorFreeAll", "str", []) as () => string | null,
    launch: library.func("emulatorLaunch", "str", ["str", "void *", "uint32_t", "uint32_t", "void *", "uint32_t", "uint32_t"]),
  };
}

/** Bytes of an argument, as emulator.hpp takes them. */
export const SLOT = 4096;

interface Placed {
  readonly at: bigint;
  readonly bytes: Buffer;
}

function runOn(
  library: Library,
  made: GeneratedKernel,
  use: KernelSpec,
  data: Readonly<Buffers>,
  starts: Readonly<Record<string, number>>,
  order: number,
): Record<string, Buffer> {
  const placed = new Map<string, Placed>();
  const place = (name: string, length: number): Placed => {
    const at = library.alloc(length);
    const buffer = { at, bytes: Buffer.from(koffi().view(at, length)) };
    placed.set(name, buffer);
    return buffer;
  };
  try {
    for (const name of Object.keys(data)) {
      const bytes = initial(name, data, use);
      place(name, bytes.length).bytes.set(bytes);
    }
    place("scratch", made.scratch ?? 0).bytes.fill(0xff);
    for (const launch of made.launches) {
      const args = Buffer.alloc(launch.args.length * SLOT);
      for (const [i, arg] of launch.args.entries()) packArg(args.subarray(i * SLOT), arg, placed, starts, use);
      const wrong = library.launch(
        launch.entry,
        Uint32Array.from(launch.grid),
        launch.threads,
        launch.shared,
        args,
        launch.args.length,
        order,
      );
      if (wrong) throw new Error(`${launch.entry}: ${wrong} (buffers: ${[...placed.keys()].join(", ")})`);
    }
    return Object.fromEntries([...placed].filter(([name]) => name !== "scratch").map(([name, { bytes }]) => [name, Buffer.from(bytes)]));
  } finally {
    const wrong = library.freeAll();
    // biome-ignore lint/correctness/noUnsafeFinally: nothing else is thrown where this is: a launch that fails writes nothing more
    if (wrong) throw new Error(`${use.name}: ${wrong} (buffers: ${[...placed.keys()].join(", ")})`);
  }
}

function packArg(
  to: Buffer,
  arg: KernelArg,
  placed: ReadonlyMap<string, Placed>,
  starts: Readonly<Record<string, number>>,
  use: KernelSpec,
): void {
  const at = (name: string): bigint => {
    const buffer = placed.get(name);
    if (!buffer) throw new Error(`${use.name}: a launch names ${name}, which is no operand`);
    return buffer.at;
  };
  if (typeof arg === "string") to.writeBigUInt64LE(at(arg));
  else if (arg.kind === "tensors") for (let n = 0; n < arg.count; n++) to.writeBigUInt64LE(at(listedName(arg.name, n)), 8 * n);
  else if (arg.kind === "tensor_map") packTensorMap(to, arg, at(arg.tensor));
  else if (arg.kind === "rows" || arg.kind === "needed") to.writeBigUInt64LE(at(arg.kind));
  else if (arg.kind === "scratch") to.writeBigUInt64LE(at("scratch") + BigInt(arg.offset));
  else to.writeInt32LE(startIn(starts, arg) | 0);
}
/** As emulator.hpp lays it out. */
function packTensorMap(to: Buffer, { dtype, sizes, strides, box, swizzle }: TensorMap, at: bigint): void {
  to.writeBigUInt64LE(at);
  for (const [i, x] of [sizes.length, bytesOf[dtype], swizzle === "none" ? 0 : Number.parseInt(swizzle, 10)].entries())
    to.writeUInt32LE(x, 8 + 4 * i);
  for (const [i, x] of sizes.entries()) to.writeBigUInt64LE(BigInt(x), 24 + 8 * i);
  for (const [i, x] of strides.entries()) to.writeBigUInt64LE(BigInt(x), 64 + 8 * i);
  for (const [i, x] of box.entries()) to.writeUInt32LE(x, 104 + 4 * i);
}

// -- buffers as a device holds them; shared with the run on a real one

/** Returns the bytes of a buffer before the kernel runs: 0xFF in outputs that the kernel writes and does not read. */
export function initial(name: string, data: Readonly<Buffers>, use: KernelSpec): Uint8Array {
  const values = data[name]!;
  if (isMadeAnew(name, use)) return new Uint8Array(values.length * bytesOf[typeOf(name, use)]).fill(0xff);
  const { words } = encoded(typeOf(name, use), values);
  return new Uint8Array(words.buffer, words.byteOffset, words.byteLength);
}
const typeOf = (name: string, use: KernelSpec) => use.dtype[tensorOf(name).name] ?? "i32";
function isMadeAnew(listed: string, use: KernelSpec): boolean {
  if (listed === "rows") return use.makesRows;
  const { name } = tensorOf(listed);
  return name in use.dtype && outputs(use).includes(name) && !use.accumulates.has(name);
}
const outputs = (use: KernelSpec): string[] => ops[use.op].outputs.map((o) => o.name);

export function unpack(bytes: Buffer, name: string, use: KernelSpec): Float32Array | Int32Array {
  return valuesIn(typedMemory(typeOf(name, use), new Uint8Array(bytes).buffer));
}
