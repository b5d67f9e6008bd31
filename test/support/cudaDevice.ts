/** Runs generated CUDA sources on this machine's first GPU, as the runtime does: compiled by NVRTC, launched through the driver. */
import { type Context, type CudaDevice, type DevicePointer, driver, packParams } from "../../runtime/cuda/driver.ts";
import { compileBeside, nvrtcVersion } from "../../runtime/cuda/nvrtc.ts";
import { type Arch, archs } from "../../schemas/devices.ts";
import { listedName } from "../../schemas/tensorLists.ts";
import type { KernelArg } from "../../src/codegen/launchArgs.ts";
import type { Buffers, Executor } from "./contract.ts";
import { type Compiled, initial, unpack } from "./cudaEmulator.ts";

export interface Gpu {
  readonly name: string;
  readonly arch: Arch;
  readonly context: Context;
}

/** The GPU, or the reason why there is none. */
export function firstGpu(): Gpu | string {
  try {
    const device = driver().devices[0];
    if (!device) return "no GPU";
    nvrtcVersion();
    const arch = archOf(device);
    return arch ? { name: device.name, arch, context: driver().open(device) } : `no kernels for compute capability ${device.sm / 10}`;
  } catch (error) {
    return error instanceof Error ? error.message.split("\n")[0]!.replace(/; tried:$/, "") : String(error);
  }
}
const archOf = ({ sm }: CudaDevice): Arch | undefined =>
  archs.find((a) => a === `sm_${sm}a` || a === `sm_${sm}`) ?? (Math.floor(sm / 10) === 8 ? "sm_80" : undefined);

/** What lies behind every buffer and must stay as it is. */
const ZONE = 256;
const zone = 0xc5;

export function cudaDevice({ name, arch, context }: Gpu, kernels: readonly Compiled[]): Executor {
  const op = kernels[0]!.use.op;
  const text = kernels.map((k) => k.made.source).join("\n");
  let image: Promise<Uint8Array> | undefined;
  let module: ReturnType<Context["load"]> | undefined;
  const stream = context.createStream();
  return {
    name,
    async run(made, use, data, starts) {
      const loaded = (module ??= context.load(await (image ??= compileBeside(text, { arch, name: op, options: ["--std=c++17"] }))));
      const placed = new Map<string, { at: DevicePointer; bytes: number }>();
      const place = (buffer: string, bytes: number, holds?: Uint8Array) => {
        const at = context.alloc(bytes + ZONE);
        placed.set(buffer, { at, bytes });
        context.fill(at, 0xff, bytes + ZONE);
        context.fill((at + BigInt(bytes)) as DevicePointer, zone, ZONE);
        if (holds) context.upload(at, holds);
      };
      try {
        for (const buffer of Object.keys(data)) {
          const bytes = initial(buffer, data, use);
          place(buffer, bytes.byteLength, bytes);
        }
        place("scratch", made.scratch ?? 0);
        for (const l of made.launches) {
          const entry = context.kernel(loaded, l.entry);
          if (context.sharedOf(entry) + l.shared > 48 << 10) context.allowShared(entry, l.shared);
          const params = packParams(...l.args.map((arg) => parameter(context, arg, (b) => placed.get(b)!.at, starts)));
          context.launch(entry, { grid: l.grid, block: [l.threads], shared: l.shared, stream }, params);
          context.synchronize(stream);
        }
        const after: Buffers = {};
        for (const [buffer, { at, bytes }] of placed) {
          const own = Buffer.alloc(bytes + ZONE);
          context.download(own, at);
          if (own.subarray(bytes).some((b) => b !== zone)) throw new Error(`${use.name} writes beyond ${buffer}, which has ${bytes} bytes`);
          if (buffer !== "scratch") after[buffer] = unpack(own.subarray(0, bytes), buffer, use);
        }
        return after;
      } finally {
        for (const { at } of placed.values()) context.free(at);
      }
    },
  };
}

function parameter(
  context: Context,
  arg: KernelArg,
  at: (buffer: string) => DevicePointer,
  starts: Readonly<Record<string, number>>,
): bigint | number | Uint8Array {
  if (typeof arg === "string") return at(arg);
  switch (arg.kind) {
    case "tensor_map":
      return context.encodeTiled({ ...arg, at: at(arg.tensor) });
    case "tensors": {
      const names = Array.from({ length: arg.count }, (_, n) => listedName(arg.name, n));
      return new Uint8Array(BigUint64Array.from(names, at).buffer);
    }
    case "rows":
    case "needed":
      return at(arg.kind);
    case "scratch":
      return at("scratch") + BigInt(arg.offset);
    case "start":
      return starts[arg.dim]!;
    case "block":
      return starts.block!;
    case "attribute":
      return starts[arg.name]!;
    default:
      return arg satisfies never;
  }
}
