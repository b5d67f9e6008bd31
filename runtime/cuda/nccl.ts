/** NCCL: collectives between GPUs, one communicator per process and group. Its calls go into streams of the current context. */
import { Trouble } from "../../schemas/trouble.ts";
import type { DevicePointer, Stream } from "./driver.ts";
import { koffi, openLibrary } from "./libraries.ts";

export type Communicator = {
  /** Sums float32 over all ranks; `from` and `to` may be the same memory. */
  readonly allReduce: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream) => void;
  readonly close: () => void;
};

type Nccl = ReturnType<typeof openNccl>;
let opened: Nccl | undefined;
const nccl = (): Nccl => (opened ??= openNccl());

/** NCCL_UNIQUE_ID_BYTES, and the values of ncclDataType_t and ncclRedOp_t */
const idBytes = 128;
const [FLOAT32, SUM] = [7, 0];

/** NVLink multicast stays off. NCCL reads the environment of the C library, which `process.env` of a worker thread does not reach. */
export function turnMulticastOff(): void {
  process.env.NCCL_NVLS_ENABLE = "0";
  koffi().load(null).func("setenv", "int", ["str", "str", "int"])("NCCL_NVLS_ENABLE", "0", 1);
}

function openNccl() {
  turnMulticastOff();
  const { path, handle } = openLibrary("nccl");
  const { array, struct } = koffi();
  const id = struct({ internal: array("uint8_t", idBytes) });
  const bind = (name: string, ...params: (string | typeof id)[]) => handle.func(name, "int", params);
  return {
    path,
    version: bind("ncclGetVersion", "void *"),
    uniqueId: bind("ncclGetUniqueId", "void *"),
    initRank: bind("ncclCommInitRank", "void *", "int", id, "int"),
    allReduce: bind("ncclAllReduce", "uint64_t", "uint64_t", "size_t", "int", "int", "void *", "void *"),
    destroy: bind("ncclCommDestroy", "void *"),
    error: handle.func("ncclGetErrorString", "str", ["int"]),
    lastError: handle.func("ncclGetLastError", "str", ["void *"]),
  };
}

/** "2.28.9", and the file it is in. */
export function ncclVersion(): { readonly version: string; readonly path: string } {
  const into = new Int32Array(1);
  check("ncclGetVersion", nccl().version(into));
  const code = into[0]!;
  return { version: `${Math.floor(code / 10_000)}.${Math.floor(code / 100) % 100}.${code % 100}`, path: nccl().path };
}

/** What one rank makes and all ranks of a communicator must be given. */
export function uniqueId(): Uint8Array {
  const id = new Uint8Array(idBytes);
  check("ncclGetUniqueId", nccl().uniqueId(id));
  return id;
}

/** Waits until all ranks have come, each with the device of its current context. */
export function joinCommunicator(id: Uint8Array, rank: number, ranks: number): Communicator {
  const into = new BigUint64Array(1);
  check("ncclCommInitRank", nccl().initRank(into, ranks, { internal: id }, rank));
  const communicator = into[0]!;
  return {
    allReduce: (from, to, count, stream) => check("ncclAllReduce", nccl().allReduce(from, to, count, FLOAT32, SUM, communicator, stream)),
    close: () => check("ncclCommDestroy", nccl().destroy(communicator)),
  };
}

/** ncclResult_t of a machine's making: a CUDA call failed, a system call failed, another rank failed. */
const ofTheMachine = [1, 2, 6];

function check(call: string, code: number): void {
  if (code === 0) return;
  const detail: string | null = nccl().lastError(null);
  const message = `${call}: ${nccl().error(code)}${detail ? `: ${detail.trim()}` : ""}`;
  throw ofTheMachine.includes(code) ? new Trouble(message, "NCCL_DEBUG=WARN in the environment shows more", 3) : new Error(message);
}
