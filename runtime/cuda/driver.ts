/**
 * A thin layer over the CUDA driver API: one method is one driver call or few, and every result is checked (driverCalls.ts). Pointers and
 * handles are those of the driver, as bigint; results return in typed arrays that the driver fills.
 */
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { bindDriver, type DriverCalls, type Handle } from "./driverCalls.ts";
import { koffi, openLibrary } from "./libraries.ts";

/** An address in device memory. */
export type DevicePointer = Handle<"memory">;
/** A stream of the driver. */
export type Stream = Handle<"stream">;
/** An event of the driver. */
export type Event = Handle<"event">;
type Module = Handle<"module">;
/** A kernel of a loaded module. */
export type KernelFunction = Handle<"kernel">;
/** An instantiated graph. */
export type ExecutableGraph = Handle<"graph">;
/** Page-locked host memory, which asynchronous copies read and write. */
export type Pinned = { readonly at: bigint; readonly bytes: ArrayBuffer };

/** A device, with its memory in bytes. */
export type CudaDevice = {
  readonly ordinal: number;
  readonly name: string;
  readonly uuid: string;
  readonly bytes: number;
  /** Compute capability as compilers name it: 90 is 9.0. */
  readonly sm: number;
};
type Extent = readonly [x: number, y?: number, z?: number];
/** Grid, thread block, shared memory and stream of a launch. */
export type KernelLaunch = {
  readonly grid: Extent;
  readonly block: Extent;
  /** Bytes of dynamic shared memory. */
  readonly shared?: number;
  readonly stream: Stream;
};
/** A tile of a tensor that hardware copies: the arguments of cuTensorMapEncodeTiled. Innermost dim first; `strides` in bytes, of all other dims. */
export type Tiled = {
  readonly at: DevicePointer;
  readonly dtype: Dtype;
  readonly sizes: readonly number[];
  readonly strides: readonly number[];
  readonly box: readonly number[];
  readonly swizzle: "none" | "32B" | "64B" | "128B";
};
/** The loaded driver. */
export type Driver = {
  readonly path: string;
  /** The newest CUDA version that the driver supports: "13.0". */
  readonly version: string;
  readonly devices: readonly CudaDevice[];
  /** Makes the primary context of the device current in this thread. */
  readonly open: (device: CudaDevice) => Context;
};
/** An open device. Calls throw an error with the name of the driver function. */
export type Context = {
  readonly device: CudaDevice;
  /** The limit of dynamic shared memory of a block, in bytes, after `allowShared`. */
  readonly sharedLimit: number;
  readonly alloc: (bytes: number) => DevicePointer;
  readonly free: (at: DevicePointer) => void;
  /** Sets all bytes of a range; 255 makes floats NaN. */
  readonly fill: (at: DevicePointer, byte: number, bytes: number) => void;
  readonly upload: (to: DevicePointer, from: ArrayBufferView) => void;
  readonly download: (to: ArrayBufferView, from: DevicePointer) => void;
  /** Returns the free and the total device memory in bytes. */
  readonly memory: () => { readonly free: number; readonly total: number };
  readonly pin: (bytes: number) => Pinned;
  readonly unpin: (memory: Pinned) => void;
  /** Copies in the order of the stream. Pinned memory is read when the copy executes, other memory before this call returns. */
  readonly copyIn: (to: DevicePointer, from: bigint | ArrayBufferView, bytes: number, stream: Stream) => void;
  readonly copyOut: (toPinned: bigint, from: DevicePointer, bytes: number, stream: Stream) => void;
  readonly copy: (to: DevicePointer, from: DevicePointer, bytes: number, stream: Stream) => void;
  readonly fillIn: (at: DevicePointer, byte: number, bytes: number, stream: Stream) => void;
  /** Thread blocks of an urgent stream that are ready start before those of other streams. */
  readonly createStream: (urgency?: "urgent") => Stream;
  readonly destroyStream: (stream: Stream) => void;
  readonly createEvent: (use?: "timing" | "order") => Event;
  readonly destroyEvent: (event: Event) => void;
  readonly record: (event: Event, stream: Stream) => void;
  /** Later work of the stream waits for the work that the event was last recorded after. */
  readonly wait: (stream: Stream, event: Event) => void;
  readonly happened: (event: Event) => boolean;
  /** Returns the milliseconds between two completed events. */
  readonly elapsed: (from: Event, to: Event) => number;
  /** Begins a capture: calls of this thread to the stream, and to streams that wait for it, are recorded instead of executed. */
  readonly beginCapture: (stream: Stream) => void;
  readonly endCapture: (stream: Stream) => ExecutableGraph;
  readonly replay: (graph: ExecutableGraph, stream: Stream) => void;
  readonly destroyGraph: (graph: ExecutableGraph) => void;
  /** Loads a module from a cubin, or from PTX that ends in a zero byte. */
  readonly load: (image: Uint8Array) => Module;
  readonly unload: (module: Module) => void;
  readonly kernel: (module: Module, name: string) => KernelFunction;
  /** Returns the static shared memory of a kernel in bytes. */
  readonly sharedOf: (kernel: KernelFunction) => number;
  /** Allows launches with so many bytes of dynamic shared memory; the default limit is 48 KiB. */
  readonly allowShared: (kernel: KernelFunction, bytes: number) => void;
  readonly launch: (kernel: KernelFunction, how: KernelLaunch, params: Params) => void;
  /** Returns the 128 bytes of a CUtensorMap, a kernel parameter. */
  readonly encodeTiled: (tiled: Tiled) => Uint8Array;
  /** Waits for one stream, or for the whole device. */
  readonly synchronize: (stream?: Stream) => void;
  readonly close: () => void;
};

let opened: Driver | undefined;

/** Returns the initialized driver of this machine. Throws a Trouble if there is no driver or no device. */
export function driver(): Driver {
  return (opened ??= openDriver());
}

function openDriver(): Driver {
  const library = openLibrary("cuda");
  const calls = bindDriver(library);
  const { call, int } = calls;
  // streams share hardware queues, 8 by default: work that waits for another rank could then block unrelated work behind it
  process.env.CUDA_DEVICE_MAX_CONNECTIONS ??= "32";
  call("cuInit", 0);
  const version = int("cuDriverGetVersion");
  return {
    path: library.path,
    version: `${Math.floor(version / 1000)}.${(version % 1000) / 10}`,
    devices: Array.from({ length: int("cuDeviceGetCount") }, (_, ordinal) => readDevice(calls, ordinal)),
    open: (device) =>
      openContext(
        calls,
        device,
        int("cuDeviceGet", device.ordinal),
        int("cuDeviceGetAttribute", sharedOptin, int("cuDeviceGet", device.ordinal)),
      ),
  };
}

function readDevice({ call, int }: DriverCalls, ordinal: number): CudaDevice {
  const device = int("cuDeviceGet", ordinal);
  const name = new Uint8Array(256);
  call("cuDeviceGetName", name, name.length, device);
  const uuid = new Uint8Array(16);
  call("cuDeviceGetUuid_v2", uuid, device);
  const bytes = new BigUint64Array(1);
  call("cuDeviceTotalMem_v2", bytes, device);
  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
  const [major, minor] = [int("cuDeviceGetAttribute", 75, device), int("cuDeviceGetAttribute", 76, device)];
  return {
    ordinal,
    name: Buffer.from(name.subarray(0, name.indexOf(0))).toString(),
    uuid: `GPU-${Buffer.from(uuid)
      .toString("hex")
      .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-")}`,
    bytes: Number(bytes[0]),
    sm: major * 10 + minor,
  };
}

/** CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
const sharedOptin = 97;
/** The stream is not ordered with the legacy default stream. */
const CU_STREAM_NON_BLOCKING = 1;
/** Lower numbers are more urgent; the driver raises this one to the lowest that the device has. */
const HIGHEST_PRIORITY = -100;
/** Other threads may call the driver during a capture. An event without a time costs less, and suffices to order streams. */
const [CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_EVENT_DISABLE_TIMING] = [1, 2];
const [CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = [1, 8];
/** CUtensorMapSwizzle. No interleave; 128 bytes per promotion to the L2; zeros out of bounds. */
const tensorMapSwizzles: Record<Tiled["swizzle"], number> = { none: 0, "32B": 1, "64B": 2, "128B": 3 };
const [CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE] = [0, 2, 0];
const tensorMapBytes = 128;
/** Limits of kernel parameters: bytes, by the driver since sm_70, and number. */
const [paramLimit, mostParams] = [32_764, 256];

function openContext(calls: DriverCalls, device: CudaDevice, cuDevice: number, sharedLimit: number): Context {
  const { call, handle } = calls;
  call("cuCtxSetCurrent", handle("cuDevicePrimaryCtxRetain", cuDevice));
  const { free, ...launches } = launchCalls(calls);
  return {
    device,
    sharedLimit,
    ...memoryCalls(calls),
    ...streamCalls(calls),
    ...graphCalls(calls),
    ...moduleCalls(calls),
    ...launches,
    close: () => {
      call("cuDevicePrimaryCtxRelease_v2", cuDevice);
      free();
    },
  };
}

type MemoryCall = "alloc" | "free" | "fill" | "upload" | "download" | "memory" | "pin" | "unpin" | "copyIn" | "copyOut" | "copy" | "fillIn";
const memoryCalls = ({ call, handle }: DriverCalls): Pick<Context, MemoryCall> => ({
  alloc: (bytes) => handle("cuMemAlloc_v2", bytes),
  free: (at) => call("cuMemFree_v2", at),
  fill: (at, byte, bytes) => call("cuMemsetD8_v2", at, byte, bytes),
  upload: (to, from) => call("cuMemcpyHtoD_v2", to, from, from.byteLength),
  download: (to, from) => call("cuMemcpyDtoH_v2", to, from, to.byteLength),
  memory: () => {
    const [free, total] = [new BigUint64Array(1), new BigUint64Array(1)];
    call("cuMemGetInfo_v2", free, total);
    return { free: Number(free[0]), total: Number(total[0]) };
  },
  pin: (bytes) => {
    const at = handle("cuMemHostAlloc", bytes, 0);
    return { at, bytes: koffi().view(at, bytes) };
  },
  unpin: ({ at }) => call("cuMemFreeHost", at),
  copyIn: (to, from, bytes, stream) => call("cuMemcpyHtoDAsync_v2", to, from, bytes, stream),
  copyOut: (to, from, bytes, stream) => call("cuMemcpyDtoHAsync_v2", to, from, bytes, stream),
  copy: (to, from, bytes, stream) => call("cuMemcpyDtoDAsync_v2", to, from, bytes, stream),
  fillIn: (at, byte, bytes, stream) => call("cuMemsetD8Async", at, byte, bytes, stream),
});

type StreamCall =
  | "createStream"
  | "destroyStream"
  | "createEvent"
  | "destroyEvent"
  | "record"
  | "wait"
  | "happened"
  | "elapsed"
  | "synchronize";
const streamCalls = ({ call, isUnready, handle }: DriverCalls): Pick<Context, StreamCall> => ({
  createStream: (urgency) => handle("cuStreamCreateWithPriority", CU_STREAM_NON_BLOCKING, urgency ? HIGHEST_PRIORITY : 0),
  destroyStream: (stream) => call("cuStreamDestroy_v2", stream),
  createEvent: (use = "timing") => handle("cuEventCreate", use === "timing" ? 0 : CU_EVENT_DISABLE_TIMING),
  destroyEvent: (event) => call("cuEventDestroy_v2", event),
  record: (event, stream) => call("cuEventRecord", event, stream),
  wait: (stream, event) => call("cuStreamWaitEvent", stream, event, 0),
  happened: (event) => !isUnready("cuEventQuery", event),
  elapsed: (from, to) => {
    const into = new Float32Array(1);
    call("cuEventElapsedTime", into, from, to);
    const [milliseconds = 0] = into;
    return milliseconds;
  },
  synchronize: (stream) => (stream === undefined ? call("cuCtxSynchronize") : call("cuStreamSynchronize", stream)),
});

/** CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY, since CUDA 11.7: without it all kernels of a graph have the priority of the stream that launches it. */
const [USE_NODE_PRIORITY, WITH_PRIORITIES] = [8, 11_070];

const graphCalls = ({ call, handle, int }: DriverCalls): Pick<Context, "beginCapture" | "endCapture" | "replay" | "destroyGraph"> => ({
  beginCapture: (stream) => call("cuStreamBeginCapture_v2", stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
  endCapture: (stream) => {
    const into = new BigUint64Array(1);
    call("cuStreamEndCapture", stream, into);
    const [graph = 0n] = into;
    try {
      return handle("cuGraphInstantiateWithFlags", graph, int("cuDriverGetVersion") >= WITH_PRIORITIES ? USE_NODE_PRIORITY : 0);
    } finally {
      call("cuGraphDestroy", graph);
    }
  },
  replay: (graph, stream) => call("cuGraphLaunch", graph, stream),
  destroyGraph: (graph) => call("cuGraphExecDestroy", graph),
});

const moduleCalls = ({ call, int, handle }: DriverCalls): Pick<Context, "load" | "unload" | "kernel" | "sharedOf" | "allowShared"> => ({
  load: (image) => handle("cuModuleLoadData", image),
  unload: (module) => call("cuModuleUnload", module),
  kernel: (module, name) => handle("cuModuleGetFunction", module, name),
  sharedOf: (kernel) => int("cuFuncGetAttribute", CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel),
  allowShared: (kernel, bytes) => call("cuFuncSetAttribute", kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes),
});

/** Launches of kernels, and descriptors of tiles. `free` releases the host memory that they use. */
function launchCalls({ call }: DriverCalls): Pick<Context, "encodeTiled" | "launch"> & { readonly free: () => void } {
  // The driver reads each parameter through a pointer, so parameters are in memory that V8 does not move. The driver also accepts one
  // packed buffer, but copies it to an address that is no multiple of 64: a CUtensorMap there is an illegal instruction (driver 580).
  const { alloc, free, view } = koffi();
  const place: bigint = alloc("uint64_t", 4096);
  const packed = new Uint8Array(view(place, paramLimit));
  const pointers = new BigUint64Array(mostParams);
  // the driver writes the descriptor to a multiple of 64 bytes
  const loose: bigint = alloc("uint8_t", tensorMapBytes + 63);
  const aligned = ((loose + 63n) / 64n) * 64n;
  return {
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
    free: () => {
      free(place);
      free(loose);
    },
  };
}

/** Packed kernel parameters, and the offset of each. */
export type Params = { readonly bytes: Uint8Array; readonly at: readonly number[] };

/** Packs kernel parameters: pointers (bigint) and ints (number) aligned to their size, bytes (a CUtensorMap) to 64. */
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
