/** Binds the functions of the CUDA driver API. One call here is one driver call, and every result is checked. */
import { Trouble } from "../../schemas/trouble.ts";
import { koffi, type openLibrary } from "./libraries.ts";

/** The parameters of cuda.h; every result is a CUresult. Where cuda.h renames a function, the new name. */
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
  cuStreamCreateWithPriority: ["void *", "uint", "int"],
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
  // cuda.h of CUDA 13 uses the _v2, which drivers before 12.8 lack; for elapsed times both are equal
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
/** The name of a driver function. */
export type DriverFunction = keyof typeof prototypes;

/** The functions of the driver. Each call throws if the driver returns an error: a Trouble if a person can correct it. */
export interface DriverCalls {
  readonly call: (name: DriverFunction, ...args: readonly unknown[]) => void;
  /** Returns whether the device is not ready; that is no error. */
  readonly isUnready: (name: DriverFunction, ...args: readonly unknown[]) => boolean;
  /** Returns the i32 that the function writes to its first parameter. */
  readonly int: (name: DriverFunction, ...args: readonly unknown[]) => number;
  /** Returns the handle or pointer that the function writes to its first parameter. */
  readonly handle: <Kind extends string>(name: DriverFunction, ...args: readonly unknown[]) => Handle<Kind>;
}

/** A handle or a pointer of the driver. */
export type Handle<Kind extends string> = bigint & { readonly kind: Kind };

const CUDA_ERROR_NOT_READY = 600;

/** Fixes for the CUresults that a person can correct; all others are bugs of rankc. */
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

/** Binds all functions. Throws a Trouble if the driver is too old for one of them. */
export function bindDriver({ path, handle: library }: ReturnType<typeof openLibrary>): DriverCalls {
  const bind = (name: string, params: readonly string[]) => {
    try {
      return library.func(name, "int", [...params]);
    } catch {
      throw new Trouble(
        `the NVIDIA driver (${path}) has no ${name}: it is too old`,
        "update the NVIDIA driver to one that serves CUDA 12 or later",
        3,
      );
    }
  };
  const bound = Object.fromEntries(Object.entries(prototypes).map(([name, params]) => [name, bind(name, params)])) as Record<
    DriverFunction,
    ReturnType<typeof bind>
  >;
  const { out, pointer } = koffi();
  const describe = ["cuGetErrorName", "cuGetErrorString"].map((name) => library.func(name, "int", ["int", out(pointer("str"))]));
  const fail = (name: DriverFunction, code: number): never => {
    const [symbol, text] = describe.map((by) => {
      const texts: (string | null)[] = [null];
      by(code, texts);
      return texts[0] ?? `CUresult ${code}`;
    });
    const message = `${name}: ${symbol}: ${text}`;
    throw waysOut[code] === undefined ? new Error(message) : new Trouble(message, waysOut[code], 3);
  };
  const call = (name: DriverFunction, ...args: readonly unknown[]): void => {
    const code: number = bound[name](...args);
    if (code !== 0) fail(name, code);
  };
  return {
    call,
    isUnready: (name, ...args) => {
      const code: number = bound[name](...args);
      if (code !== 0 && code !== CUDA_ERROR_NOT_READY) fail(name, code);
      return code !== 0;
    },
    int: (name, ...args) => {
      const into = new Int32Array(1);
      call(name, into, ...args);
      const [value = 0] = into;
      return value;
    },
    handle: <Kind extends string>(name: DriverFunction, ...args: readonly unknown[]) => {
      const into = new BigUint64Array(1);
      call(name, into, ...args);
      return into[0] as Handle<Kind>;
    },
  };
}
