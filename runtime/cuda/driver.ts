/**
 * The CUDA driver API, as thin as it can be: one JavaScript call is one driver call, and every result is looked at.
 * Pointers and handles are the driver's own, as bigint; results come back in typed arrays that the driver fills.
 */
import { dtypes } from "../../schemas/dtypes.ts";
import type { Dtype } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { koffi, openLibrary } from "./libraries.ts";

type Handle<Kind extends string> = bigint & { readonly kind: Kind };
export type DevicePointer = Handle<"memory">;
export type Stream = Handle<"stream">;
export type Event = Handle<"event">;
type Module = Handle<"module">;
export type KernelFunction = Handle<"kernel">;
/** A captured graph, ready to be launched. */
export type ExecutableGraph = Handle<"graph">;
/** Page-locked memory of the host: what copies read and write while the host goes on. */
export type Pinned = { readonly at: bigint; readonly bytes: ArrayBuffer };

export type CudaDevice = {
  readonly ordinal: number;
  readonly name: string;
  readonly uuid: string;
  readonly bytes: number;
  /** As compilers name it: 90 is compute capability 9.0. */
  readonly sm: number;
};
type Extent = readonly [x: number, y?: number, z?: number];
export type KernelLaunch = {
  readonly grid: Extent;
  readonly block: Extent;
  /** Bytes of dynamic shared memory. */
  readonly shared?: number;
  readonly stream: Stream;
};
/** A tile copied by hardware, as cuTensorMapEncodeTiled takes it: innermost dim first; `strides`, in bytes, of every dim but that. */
export type Tiled = {
  readonly at: DevicePointer;
  readonly dtype: Dtype;
  readonly sizes: readonly number[];
  readonly strides: readonly number[];
  readonly box: readonly number[];
  readonly swizzle: "none" | "32B" | "64B" | "128B";
};
export type Driver = {
  readonly path: string;
  /** The newest CUDA that the driver serves: "13.0". */
  readonly version: string;
  readonly devices: readonly CudaDevice[];
  /** Makes the device's primary context current in this thread. */
  readonly open: (device: CudaDevice) => Context;
};
export type Context = {
  readonly device: CudaDevice;
  /** Bytes of shared memory that one block may have, if it asks. */
  readonly sharedLimit: number;
  readonly alloc: (bytes: number) => DevicePointer;
  readonly free: (at: DevicePointer) => void;
  /** Writes the same byte over a piece of memory; 255 makes floats NaN. */
  readonly fill: (at: DevicePointer, byte: number, bytes: number) => void;
  readonly upload: (to: DevicePointer, from: ArrayBufferView) => void;
  readonly download: (to: ArrayBufferView, from: DevicePointer) => void;
  /** What is free on the device now, and all it has. */
  readonly memory: () => { readonly free: number; readonly total: number };
  readonly pin: (bytes: number) => Pinned;
  readonly unpin: (memory: Pinned) => void;
  /** In the stream's order. Pinned memory is read when the copy runs; any other before this returns. */
  readonly copyIn: (to: DevicePointer, from: bigint | ArrayBufferView, bytes: number, stream: Stream) => void;
  readonly copyOut: (toPinned: bigint, from: DevicePointer, bytes: number, stream: Stream) => void;
  readonly copy: (to: DevicePointer, from: DevicePointer, bytes: number, stream: Stream) => void;
  readonly fillIn: (at: DevicePointer, byte: number, bytes: number, stream: Stream) => void;
  readonly createStream: () => Stream;
  readonly destroyStream: (stream: Stream) => void;
  readonly createEvent: (use?: "timing" | "order") => Event;
  readonly destroyEvent: (event: Event) => void;
  readonly record: (event: Event, stream: Stream) => void;
  /** The stream goes no further before what the event was last recorded after is done. */
  readonly wait: (stream: Stream, event: Event) => void;
  readonly happened: (event: Event) => boolean;
  /** Milliseconds between two events that have happened. */
  readonly elapsed: (from: Event, to: Event) => number;
  /** From here on, this thread's calls into the stream, and into those that wait for it, are kept rather than run. */
  readonly beginCapture: (stream: Stream) => void;
  readonly endCapture: (stream: Stream) => ExecutableGraph;
  readonly replay: (graph: ExecutableGraph, stream: Stream) => void;
  readonly destroyGraph: (graph: ExecutableGraph) => void;
  /** A module from a cubin, or from PTX that ends in a zero byte. */
  readonly load: (image: Uint8Array) => Module;
  readonly unload: (module: Module) => void;
  readonly kernel: (module: Module, name: string) => KernelFunction;
  /** Bytes of shared memory that the kernel has of itself. */
  readonly sharedOf: (kernel: KernelFunction) => number;
  /** Lets launches ask for that many bytes of dynamic shared memory; without it they get 48 KiB. */
  readonly allowShared: (kernel: KernelFunction, bytes: number) => void;
  readonly launch: (kernel: KernelFunction, how: KernelLaunch, params: Params) => void;
  /** The 128 bytes that a kernel takes as a CUtensorMap. */
  readonly encodeTiled: (tiled: Tiled) => Uint8Array;
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
  cuMemGetInfo_v2: ["void *", "void *"],
  cuMemHostAlloc: ["void *", "size_t", "uint"],
  cuMemFreeHost: ["void *"],
  cuMemcpyHtoDAsync_v2: ["uint64_t", "void *", "size_t", "void *"],
  cuMemcpyDtoHAsync_v2: ["void *", "uint64_t", "size_t", "void *"],
  cuMemcpyDtoDAsync_v2: ["uint64_t", "uint64_t", "size_t", "void *"],
  cuMemsetD8Async: ["uint64_t", "uchar", "size_t", "void *"],
  cuStreamCreate: ["void *", "uint"],
  cuStreamDestroy_v2: ["void *"],
  cuStreamSynchronize: ["void *"],
  cuEventCreate: ["void *", "uint"],
  cuEventDestroy_v2: ["void *"],
  cuEventRecord: ["void *", "void *"],
  cuEventQuery: ["void *"],
  cuStreamWaitEvent: ["void *", "void *", "uint"],
  cuStreamBeginCapture_v2: ["void *", "int"],
  cuStreamEndCapture: ["void *", "void *"],
  cuGraphInstantiateWithFlags: ["void *", "void *", "uint64_t"],
  cuGraphDestroy: ["void *"],
  cuGraphLaunch: ["void *", "void *"],
  cuGraphExecDestroy: ["void *"],
  // cuda.h of 13 names the _v2, which drivers before 12.8 lack; for elapsed time alone they mean the same
  cuEventElapsedTime: ["void *", "void *", "void *"],
  cuModuleLoadData: ["void *", "void *"],
  cuModuleUnload: ["void *"],
  cuModuleGetFunction: ["void *", "void *", "str"],
  cuFuncGetAttribute: ["void *", "int", "void *"],
  cuFuncSetAttribute: ["void *", "int", "int"],
  cuTensorMapEncodeTiled: [
    ...["void *", "int", "uint", "uint64_t", "void *", "void *", "void *", "void *"],
    ...["int", "int", "int", "int"],
  ],
  cuLaunchKernel: ["void *", "uint", "uint", "uint", "uint", "uint", "uint", "uint", "void *", "void *", "void *"],
} as const satisfies Record<string, readonly string[]>;
type Call = keyof typeof prototypes;
/** `unready`: that the device is not done is an answer too, and then false. */
type Calls = { (call: Call, ...args: readonly unknown[]): void; readonly unready: (call: Call, ...args: readonly unknown[]) => boolean };

const CUDA_ERROR_NOT_READY = 600;

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
  const fail = (name: Call, code: number): never => {
    const [symbol, text] = describe.map((by) => {
      const said: (string | null)[] = [null];
      by(code, said);
      return said[0] ?? `CUresult ${code}`;
    });
    const message = `${name}: ${symbol}: ${text}`;
    throw waysOut[code] === undefined ? new Error(message) : new Trouble(message, waysOut[code], 3);
  };
  const call: Calls = Object.assign(
    (name: Call, ...args: readonly unknown[]): void => {
      const code: number = bound[name](...args);
      if (code !== 0) fail(name, code);
    },
    {
      unready: (name: Call, ...args: readonly unknown[]): boolean => {
        const code: number = bound[name](...args);
        if (code !== 0 && code !== CUDA_ERROR_NOT_READY) fail(name, code);
        return code !== 0;
      },
    },
  );
  // streams share hardware queues, 8 unless told: then what waits for another rank may hold up what merely stands behind it
  process.env.CUDA_DEVICE_MAX_CONNECTIONS ??= "32";
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
    open: (device) =>
      openContext(
        call,
        device,
        int("cuDeviceGet", device.ordinal),
        int("cuDeviceGetAttribute", sharedOptin, int("cuDeviceGet", device.ordinal)),
      ),
  };
}

function readDevice(call: Calls, int: (name: Call, ...args: readonly unknown[]) => number, ordinal: number): CudaDevice {
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

/** CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
const sharedOptin = 97;
/** Streams are not ordered with the legacy default stream. */
const CU_STREAM_NON_BLOCKING = 1;
/** Other threads may go on calling the driver; and an event that only orders streams costs less without a clock. */
const [CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_EVENT_DISABLE_TIMING] = [1, 2];
const [CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = [1, 8];
/** CUtensorMapSwizzle. No interleave; 128 bytes at once into the L2; zeros out of bounds. */
const tensorMapSwizzles: Record<Tiled["swizzle"], number> = { none: 0, "32B": 1, "64B": 2, "128B": 3 };
const [CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE] = [0, 2, 0];
const tensorMapBytes = 128;
/** Bytes of a kernel's parameters: the driver's limit since sm_70; and how many there may be. */
const [paramLimit, mostParams] = [32_764, 256];

function openContext(call: Calls, device: CudaDevice, cuDevice: number, sharedLimit: number): Context {
  const handle = <Kind extends string>(name: Call, ...args: readonly unknown[]): Handle<Kind> => {
    const into = new BigUint64Array(1);
    call(name, into, ...args);
    return into[0] as Handle<Kind>;
  };
  call("cuCtxSetCurrent", handle("cuDevicePrimaryCtxRetain", cuDevice));

  // The driver follows a pointer to each parameter: they lead to memory that V8 does not move. As one packed buffer it takes them
  // too, but lays them out from a place that is no multiple of 64: a CUtensorMap there is an illegal instruction (driver 580).
  const { alloc, free, view } = koffi();
  const place: bigint = alloc("uint64_t", 4096);
  const packed = new Uint8Array(view(place, paramLimit));
  const pointers = new BigUint64Array(mostParams);
  // the driver wants the descriptor it writes at a multiple of 64 bytes
  const loose: bigint = alloc("uint8_t", tensorMapBytes + 63);
  const aligned = ((loose + 63n) / 64n) * 64n;

  return {
    device,
    sharedLimit,
    alloc: (bytes) => handle("cuMemAlloc_v2", bytes),
    free: (at) => call("cuMemFree_v2", at),
    fill: (at, byte, bytes) => call("cuMemsetD8_v2", at, byte, bytes),
    upload: (to, from) => call("cuMemcpyHtoD_v2", to, from, from.byteLength),
    download: (to, from) => call("cuMemcpyDtoH_v2", to, from, to.byteLength),
    createStream: () => handle("cuStreamCreate", CU_STREAM_NON_BLOCKING),
    destroyStream: (stream) => call("cuStreamDestroy_v2", stream),
    memory: () => {
      const [free, total] = [new BigUint64Array(1), new BigUint64Array(1)];
      call("cuMemGetInfo_v2", free, total);
      return { free: Number(free[0]), total: Number(total[0]) };
    },
    pin: (bytes) => {
      const at = handle("cuMemHostAlloc", bytes, 0);
      return { at, bytes: view(at, bytes) };
    },
    unpin: ({ at }) => call("cuMemFreeHost", at),
    copyIn: (to, from, bytes, stream) => call("cuMemcpyHtoDAsync_v2", to, from, bytes, stream),
    copyOut: (to, from, bytes, stream) => call("cuMemcpyDtoHAsync_v2", to, from, bytes, stream),
    copy: (to, from, bytes, stream) => call("cuMemcpyDtoDAsync_v2", to, from, bytes, stream),
    fillIn: (at, byte, bytes, stream) => call("cuMemsetD8Async", at, byte, bytes, stream),
    createEvent: (use = "timing") => handle("cuEventCreate", use === "timing" ? 0 : CU_EVENT_DISABLE_TIMING),
    destroyEvent: (event) => call("cuEventDestroy_v2", event),
    record: (event, stream) => call("cuEventRecord", event, stream),
    wait: (stream, event) => call("cuStreamWaitEvent", stream, event, 0),
    happened: (event) => !call.unready("cuEventQuery", event),
    beginCapture: (stream) => call("cuStreamBeginCapture_v2", stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
    endCapture: (stream) => {
      const into = new BigUint64Array(1);
      call("cuStreamEndCapture", stream, into);
      const graph = into[0]!;
      try {
        return handle("cuGraphInstantiateWithFlags", graph, 0);
      } finally {
        call("cuGraphDestroy", graph);
      }
    },
    replay: (graph, stream) => call("cuGraphLaunch", graph, stream),
    destroyGraph: (graph) => call("cuGraphExecDestroy", graph),
    elapsed: (from, to) => {
      const milliseconds = new Float32Array(1);
      call("cuEventElapsedTime", milliseconds, from, to);
      return milliseconds[0]!;
    },
    load: (image) => handle("cuModuleLoadData", image),
    unload: (module) => call("cuModuleUnload", module),
    kernel: (module, name) => handle("cuModuleGetFunction", module, name),
    sharedOf: (kernel) => {
      const into = new Int32Array(1);
      call("cuFuncGetAttribute", into, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel);
      return into[0]!;
    },
    allowShared: (kernel, bytes) => call("cuFuncSetAttribute", kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes),
    encodeTiled: ({ at, dtype, sizes, strides, box, swizzle }) => {
      const wide = (all: readonly number[]) => BigUint64Array.from(all, BigInt);
      const [type, how] = [dtypes[dtype].tensorMap, tensorMapSwizzles[swizzle]];
      const steps = new Uint32Array(sizes.length).fill(1);
      call(
        ...(["cuTensorMapEncodeTiled", aligned, type, sizes.length, at, wide(sizes), wide(strides), Uint32Array.from(box), steps] as const),
        ...[CU_TENSOR_MAP_INTERLEAVE_NONE, how, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE],
      );
      return new Uint8Array(view(aligned, tensorMapBytes)).slice();
    },
    launch: (kernel, { grid, block, shared = 0, stream }, params) => {
      packed.set(params.bytes);
      for (const [i, at] of params.at.entries()) pointers[i] = place + BigInt(at);
      const [gx, gy = 1, gz = 1] = grid;
      const [bx, by = 1, bz = 1] = block;
      call("cuLaunchKernel", kernel, gx, gy, gz, bx, by, bz, shared, stream, pointers, null);
    },
    synchronize: (stream) => (stream === undefined ? call("cuCtxSynchronize") : call("cuStreamSynchronize", stream)),
    close: () => {
      call("cuDevicePrimaryCtxRelease_v2", cuDevice);
      free(place);
      free(loose);
    },
  };
}

/** A kernel's parameters side by side, and where each begins. */
export type Params = { readonly bytes: Uint8Array; readonly at: readonly number[] };

/** A kernel's parameters as it reads them: a pointer (bigint) and an int (number) aligned to their size, bytes (a CUtensorMap) to 64. */
export function packParams(...params: readonly (bigint | number | Uint8Array)[]): Params {
  const most = params.reduce<number>((sum, param) => sum + (param instanceof Uint8Array ? param.length + 63 : 8), 0);
  const bytes = new DataView(new ArrayBuffer(most));
  const starts: number[] = [];
  let end = 0;
  const place = (alignment: number, size: number): number => {
    const from = Math.ceil(end / alignment) * alignment;
    end = from + size;
    starts.push(from);
    return from;
  };
  for (const param of params) {
    if (typeof param === "bigint") bytes.setBigUint64(place(8, 8), param, true);
    else if (typeof param === "number") bytes.setInt32(place(4, 4), param, true);
    else new Uint8Array(bytes.buffer).set(param, place(64, param.length));
  }
  return { bytes: new Uint8Array(bytes.buffer, 0, end), at: starts };
}
