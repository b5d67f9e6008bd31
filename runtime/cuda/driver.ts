/**
 * The CUDA driver API, as thin as it can be: one JavaScript call is one driver call, and every result is looked at.
 * Pointers and handles are the driver's own, as bigint; results come back in typed arrays that the driver fills.
 */
import { Trouble } from "../../schemas/trouble.ts";
import { koffi, openLibrary } from "./libraries.ts";

type Handle<Kind extends string> = bigint & { readonly kind: Kind };
export type DevicePointer = Handle<"memory">;
export type Stream = Handle<"stream">;
type Event = Handle<"event">;
type Module = Handle<"module">;
type Kernel = Handle<"kernel">;

export type Device = {
  readonly ordinal: number;
  readonly name: string;
  readonly uuid: string;
  readonly bytes: number;
  /** As compilers name it: 90 is compute capability 9.0. */
  readonly sm: number;
};
type Extent = readonly [x: number, y?: number, z?: number];
export type Launch = {
  readonly grid: Extent;
  readonly block: Extent;
  /** Bytes of dynamic shared memory. */
  readonly shared?: number;
  readonly stream: Stream;
};
export type Driver = {
  readonly path: string;
  /** The newest CUDA that the driver serves: "13.0". */
  readonly version: string;
  readonly devices: readonly Device[];
  /** Makes the device's primary context current in this thread. */
  readonly open: (device: Device) => Context;
};
export type Context = {
  readonly device: Device;
  readonly alloc: (bytes: number) => DevicePointer;
  readonly free: (at: DevicePointer) => void;
  /** Writes the same byte over a piece of memory; 255 makes floats NaN. */
  readonly fill: (at: DevicePointer, byte: number, bytes: number) => void;
  readonly upload: (to: DevicePointer, from: ArrayBufferView) => void;
  readonly download: (to: ArrayBufferView, from: DevicePointer) => void;
  readonly createStream: () => Stream;
  readonly destroyStream: (stream: Stream) => void;
  readonly createEvent: () => Event;
  readonly destroyEvent: (event: Event) => void;
  readonly record: (event: Event, stream: Stream) => void;
  /** Milliseconds between two events that have happened. */
  readonly elapsed: (from: Event, to: Event) => number;
  /** A module from a cubin, or from PTX that ends in a zero byte. */
  readonly load: (image: Uint8Array) => Module;
  readonly unload: (module: Module) => void;
  readonly kernel: (module: Module, name: string) => Kernel;
  readonly launch: (kernel: Kernel, how: Launch, params: Uint8Array) => void;
  /** Waits for one stream, or for the whole device. */
  readonly synchronize: (stream?: Stream) => void;
  readonly close: () => void;
};

/** The parameters as cuda.h has them; every result is a CUresult. Where cuda.h renames a function, the name that it gives. */
const prototypes = {
  cuInit: ["uint"],
  cuDriverGetVersion: ["void *"],
  cuDeviceGetCount: ["void *"],
  cuDeviceGet: ["void *", "int"],
  cuDeviceGetName: ["void *", "int", "int"],
  cuDeviceGetUuid_v2: ["void *", "int"],
  cuDeviceTotalMem_v2: ["void *", "int"],
  cuDeviceGetAttribute: ["void *", "int", "int"],
  cuDevicePrimaryCtxRetain: ["void *", "int"],
  cuDevicePrimaryCtxRelease_v2: ["int"],
  cuCtxSetCurrent: ["void *"],
  cuCtxSynchronize: [],
  cuMemAlloc_v2: ["void *", "size_t"],
  cuMemFree_v2: ["uint64_t"],
  cuMemsetD8_v2: ["uint64_t", "uchar", "size_t"],
  cuMemcpyHtoD_v2: ["uint64_t", "void *", "size_t"],
  cuMemcpyDtoH_v2: ["void *", "uint64_t", "size_t"],
  cuStreamCreate: ["void *", "uint"],
  cuStreamDestroy_v2: ["void *"],
  cuStreamSynchronize: ["void *"],
  cuEventCreate: ["void *", "uint"],
  cuEventDestroy_v2: ["void *"],
  cuEventRecord: ["void *", "void *"],
  // cuda.h of 13 names the _v2, which drivers before 12.8 lack; for elapsed time alone they mean the same
  cuEventElapsedTime: ["void *", "void *", "void *"],
  cuModuleLoadData: ["void *", "void *"],
  cuModuleUnload: ["void *"],
  cuModuleGetFunction: ["void *", "void *", "str"],
  cuLaunchKernel: ["void *", "uint", "uint", "uint", "uint", "uint", "uint", "uint", "void *", "void *", "void *"],
} as const satisfies Record<string, readonly string[]>;
type Call = keyof typeof prototypes;
type Calls = (call: Call, ...args: readonly unknown[]) => void;

/** CUresults that the person at the machine can put right; all others are mistakes of ours. */
const waysOut: Readonly<Record<number, string>> = {
  2: "use a smaller plan, or more ranks; nvidia-smi shows who else holds the device's memory",
  34: "this libcuda is the toolkit's stub: set RANKC_LIBCUDA to the driver's own libcuda.so.1",
  36: "update the NVIDIA driver",
  46: "another process holds the device for itself: nvidia-smi shows which",
  100: "see that nvidia-smi lists a GPU and that CUDA_VISIBLE_DEVICES does not hide it; a container needs the GPUs passed in",
  101: "see that CUDA_VISIBLE_DEVICES names devices that nvidia-smi lists",
  209: "the kernels were compiled for another architecture: compile for this device, with a CUDA that its driver serves",
  214: "the device's memory is damaged: nvidia-smi -q shows its ECC errors; reset or replace it",
  222: "the compiler is newer than the driver: update the driver, or set RANKC_LIBNVRTC to an older NVRTC",
  802: "the system's GPUs are not ready: on NVSwitch machines start nvidia-fabricmanager",
  803: "the driver's kernel module and its library are of different versions: restart the machine",
  804: "the forward-compatible libcuda does not serve this device: use the driver's own",
};

let opened: Driver | undefined;

/** The driver of this machine, initialised. Throws a Trouble where there is none, or no device. */
export function driver(): Driver {
  return (opened ??= openDriver());
}

function openDriver(): Driver {
  const { path, handle } = openLibrary("cuda");
  const bind = (name: string, params: readonly string[]) => {
    try {
      return handle.func(name, "int", [...params]);
    } catch {
      throw new Trouble(
        `the NVIDIA driver (${path}) has no ${name}: it is too old`,
        "update the NVIDIA driver to one that serves CUDA 12 or later",
        3,
      );
    }
  };
  const bound = Object.fromEntries(Object.entries(prototypes).map(([name, params]) => [name, bind(name, params)])) as Record<
    Call,
    ReturnType<typeof bind>
  >;
  const { out, pointer } = koffi();
  const describe = ["cuGetErrorName", "cuGetErrorString"].map((name) => handle.func(name, "int", ["int", out(pointer("str"))]));
  const call: Calls = (name, ...args) => {
    const code: number = bound[name](...args);
    if (code === 0) return;
    const [symbol, text] = describe.map((by) => {
      const said: (string | null)[] = [null];
      by(code, said);
      return said[0] ?? `CUresult ${code}`;
    });
    const message = `${name}: ${symbol}: ${text}`;
    throw waysOut[code] === undefined ? new Error(message) : new Trouble(message, waysOut[code], 3);
  };
  call("cuInit", 0);
  const int = (name: Call, ...args: readonly unknown[]): number => {
    const into = new Int32Array(1);
    call(name, into, ...args);
    return into[0]!;
  };
  const version = int("cuDriverGetVersion");
  return {
    path,
    version: `${Math.floor(version / 1000)}.${(version % 1000) / 10}`,
    devices: Array.from({ length: int("cuDeviceGetCount") }, (_, ordinal) => readDevice(call, int, ordinal)),
    open: (device) => openContext(call, device, int("cuDeviceGet", device.ordinal)),
  };
}

function readDevice(call: Calls, int: (name: Call, ...args: readonly unknown[]) => number, ordinal: number): Device {
  const device = int("cuDeviceGet", ordinal);
  const name = new Uint8Array(256);
  call("cuDeviceGetName", name, name.length, device);
  const uuid = new Uint8Array(16);
  call("cuDeviceGetUuid_v2", uuid, device);
  const bytes = new BigUint64Array(1);
  call("cuDeviceTotalMem_v2", bytes, device);
  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
  const [major, minor] = [75, 76].map((attribute) => int("cuDeviceGetAttribute", attribute, device));
  return {
    ordinal,
    name: Buffer.from(name.subarray(0, name.indexOf(0))).toString(),
    uuid: `GPU-${Buffer.from(uuid)
      .toString("hex")
      .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-")}`,
    bytes: Number(bytes[0]),
    sm: major! * 10 + minor!,
  };
}

/** Streams are not ordered with the legacy default stream. */
const CU_STREAM_NON_BLOCKING = 1;
/** What cuLaunchKernel takes of a packed block of parameters; the driver's limit is 4 KiB before sm_70 and 32,764 bytes since. */
const [PARAM_END, PARAM_POINTER, PARAM_SIZE] = [0n, 1n, 2n];
const paramLimit = 32_764;

function openContext(call: Calls, device: Device, cuDevice: number): Context {
  const handle = <Kind extends string>(name: Call, ...args: readonly unknown[]): Handle<Kind> => {
    const into = new BigUint64Array(1);
    call(name, into, ...args);
    return into[0] as Handle<Kind>;
  };
  call("cuCtxSetCurrent", handle("cuDevicePrimaryCtxRetain", cuDevice));

  // the driver follows pointers inside `extra`: they lead to memory that V8 does not move
  const { alloc, free, view } = koffi();
  const block: bigint = alloc("uint64_t", 1 + 4096);
  const size = new BigUint64Array(view(block, 8));
  const packed = new Uint8Array(view(block + 8n, paramLimit));
  const extra = new BigUint64Array([PARAM_POINTER, block + 8n, PARAM_SIZE, block, PARAM_END]);

  return {
    device,
    alloc: (bytes) => handle("cuMemAlloc_v2", bytes),
    free: (at) => call("cuMemFree_v2", at),
    fill: (at, byte, bytes) => call("cuMemsetD8_v2", at, byte, bytes),
    upload: (to, from) => call("cuMemcpyHtoD_v2", to, from, from.byteLength),
    download: (to, from) => call("cuMemcpyDtoH_v2", to, from, to.byteLength),
    createStream: () => handle("cuStreamCreate", CU_STREAM_NON_BLOCKING),
    destroyStream: (stream) => call("cuStreamDestroy_v2", stream),
    createEvent: () => handle("cuEventCreate", 0),
    destroyEvent: (event) => call("cuEventDestroy_v2", event),
    record: (event, stream) => call("cuEventRecord", event, stream),
    elapsed: (from, to) => {
      const milliseconds = new Float32Array(1);
      call("cuEventElapsedTime", milliseconds, from, to);
      return milliseconds[0]!;
    },
    load: (image) => handle("cuModuleLoadData", image),
    unload: (module) => call("cuModuleUnload", module),
    kernel: (module, name) => handle("cuModuleGetFunction", module, name),
    launch: (kernel, { grid, block, shared = 0, stream }, params) => {
      packed.set(params);
      size[0] = BigInt(params.length);
      const [gx, gy = 1, gz = 1] = grid;
      const [bx, by = 1, bz = 1] = block;
      call("cuLaunchKernel", kernel, gx, gy, gz, bx, by, bz, shared, stream, null, extra);
    },
    synchronize: (stream) => (stream === undefined ? call("cuCtxSynchronize") : call("cuStreamSynchronize", stream)),
    close: () => {
      call("cuDevicePrimaryCtxRelease_v2", cuDevice);
      free(block);
    },
  };
}

/** A kernel's parameters as it reads them: each aligned to its own size. A pointer is a bigint, an int a number. */
export function packParams(...params: readonly (bigint | number)[]): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(params.length * 8));
  let at = 0;
  for (const param of params) {
    if (typeof param === "bigint") {
      at = Math.ceil(at / 8) * 8;
      bytes.setBigUint64(at, param, true);
      at += 8;
    } else {
      bytes.setInt32(at, param, true);
      at += 4;
    }
  }
  return new Uint8Array(bytes.buffer, 0, at);
}
