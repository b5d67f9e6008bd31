/** NCCL: collectives between GPUs, one communicator per process and group. Calls are issued to streams of the current context. */

import type { LibraryHandle } from "koffi";
import { bytesOf, type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { DevicePointer, Stream } from "./driver.ts";
import { koffi, openLibrary } from "./libraries.ts";

/**
 * The communicator of one rank. `count` is a number of elements: of the whole in `allReduce`, of one rank's block in all others. In place
 * are allowed: a gather with `from` at `to + rank * count`, a scatter with `to` at `from + rank * count`, and a reduction with `from = to`.
 */
export type Communicator = {
  readonly rank: number;
  readonly ranks: number;
  readonly allReduce: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream, dtype?: Dtype, by?: "sum" | "max") => void;
  readonly allGather: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream, dtype: Dtype) => void;
  readonly reduceScatter: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream, dtype: Dtype) => void;
  /** Not in place. */
  readonly allToAll: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream, dtype: Dtype) => void;
  /** Sends to the next member, from the last to the first; not in place. */
  readonly shift: (from: DevicePointer, to: DevicePointer, count: number, stream: Stream, dtype: Dtype) => void;
  /** Issues the collectives that `issue` calls as one launch: they run together. */
  readonly together: (issue: () => void) => void;
  readonly send: (from: DevicePointer, count: number, peer: number, stream: Stream, dtype: Dtype) => void;
  readonly recv: (to: DevicePointer, count: number, peer: number, stream: Stream, dtype: Dtype) => void;
  /**
   * Splits the communicator; all its ranks call it. `members`: the ranks of the caller's new communicator, ascending, or undefined for none;
   * `multiprocessors`: the most that a collective of the new one occupies, or as many as NCCL chooses.
   */
  readonly split: (members: readonly number[] | undefined, multiprocessors?: number) => Communicator | undefined;
  /** Throws the error of a call that has failed since, on this rank or another. */
  readonly check: () => void;
  /**
   * Aborts pending work after a rank has failed. Runs on a thread of its own, because NCCL waits for graphs that contain its calls; the
   * promise resolves when the abort has ended, possibly never.
   */
  readonly abort: () => Promise<void>;
  readonly close: () => void;
};

type Nccl = ReturnType<typeof openNccl>;
let opened: Nccl | undefined;
const nccl = (): Nccl => (opened ??= openNccl());

/** NCCL_UNIQUE_ID_BYTES, NCCL_SPLIT_NOCOLOR, and the values of ncclRedOp_t and of ncclResult_t */
const idBytes = 128;
const NOCOLOR = -1;
const reductions = { sum: 0, max: 2 } as const;
const IN_PROGRESS = 7;

/** Turns NVLink multicast off. NCCL reads the environment of the C library, which `process.env` of a worker thread does not change. */
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
    allGather: bind("ncclAllGather", "uint64_t", "uint64_t", "size_t", "int", "void *", "void *"),
    reduceScatter: bind("ncclReduceScatter", "uint64_t", "uint64_t", "size_t", "int", "int", "void *", "void *"),
    // since 2.28
    allToAll: has(handle, "ncclAlltoAll") ? bind("ncclAlltoAll", "uint64_t", "uint64_t", "size_t", "int", "void *", "void *") : undefined,
    send: bind("ncclSend", "uint64_t", "size_t", "int", "int", "void *", "void *"),
    recv: bind("ncclRecv", "uint64_t", "size_t", "int", "int", "void *", "void *"),
    groupStart: bind("ncclGroupStart"),
    groupEnd: bind("ncclGroupEnd"),
    split: splitOf(path, handle),
    asyncError: bind("ncclCommGetAsyncError", "void *", "void *"),
    abort: bind("ncclCommAbort", "void *"),
    destroy: bind("ncclCommDestroy", "void *"),
    error: handle.func("ncclGetErrorString", "str", ["int"]),
    lastError: handle.func("ncclGetLastError", "str", ["void *"]),
  };
}

/** Returns the version, e.g. "2.28.9", and the path of the library. */
export function ncclVersion(): { readonly version: string; readonly path: string } {
  const into = new Int32Array(1);
  check("ncclGetVersion", nccl().version(into));
  const [code = 0] = into;
  return { version: `${Math.floor(code / 10_000)}.${Math.floor(code / 100) % 100}.${code % 100}`, path: nccl().path };
}

/** Returns a new id of a communicator. One rank creates it, and all ranks of the communicator join with it. */
export function uniqueId(): Uint8Array {
  const id = new Uint8Array(idBytes);
  check("ncclGetUniqueId", nccl().uniqueId(id));
  return id;
}

/** Joins a communicator with the device of the current context. Waits until all its ranks have joined. */
export function joinCommunicator(id: Uint8Array, rank: number, ranks: number): Communicator {
  const into = new BigUint64Array(1);
  check("ncclCommInitRank", nccl().initRank(into, ranks, { internal: id }, rank));
  const [own = 0n] = into;
  return communicator(own, rank, ranks);
}

function communicator(own: bigint, rank: number, ranks: number): Communicator {
  const { allReduce, allGather, reduceScatter, allToAll, send, recv, groupStart, groupEnd, split, asyncError, abort, destroy } = nccl();
  const at = (base: DevicePointer, block: number, count: number, dtype: Dtype): bigint => base + BigInt(block * count * bytesOf[dtype]);
  return {
    rank,
    ranks,
    allReduce: (from, to, count, stream, dtype = "f32", by = "sum") =>
      check("ncclAllReduce", allReduce(from, to, count, dtypes[dtype].nccl, reductions[by], own, stream)),
    allGather: (from, to, count, stream, dtype) => check("ncclAllGather", allGather(from, to, count, dtypes[dtype].nccl, own, stream)),
    reduceScatter: (from, to, count, stream, dtype) =>
      check("ncclReduceScatter", reduceScatter(from, to, count, dtypes[dtype].nccl, reductions.sum, own, stream)),
    allToAll: (from, to, count, stream, dtype) => {
      if (allToAll) return check("ncclAlltoAll", allToAll(from, to, count, dtypes[dtype].nccl, own, stream));
      check("ncclGroupStart", groupStart());
      for (let peer = 0; peer < ranks; peer++) {
        check("ncclSend", send(at(from, peer, count, dtype), count, dtypes[dtype].nccl, peer, own, stream));
        check("ncclRecv", recv(at(to, peer, count, dtype), count, dtypes[dtype].nccl, peer, own, stream));
      }
      check("ncclGroupEnd", groupEnd());
    },
    shift: (from, to, count, stream, dtype) => {
      check("ncclGroupStart", groupStart());
      check("ncclSend", send(from, count, dtypes[dtype].nccl, (rank + 1) % ranks, own, stream));
      check("ncclRecv", recv(to, count, dtypes[dtype].nccl, (rank + ranks - 1) % ranks, own, stream));
      check("ncclGroupEnd", groupEnd());
    },
    together: (issue) => {
      check("ncclGroupStart", groupStart());
      issue();
      check("ncclGroupEnd", groupEnd());
    },
    send: (from, count, peer, stream, dtype) => check("ncclSend", send(from, count, dtypes[dtype].nccl, peer, own, stream)),
    recv: (to, count, peer, stream, dtype) => check("ncclRecv", recv(to, count, dtypes[dtype].nccl, peer, own, stream)),
    split: (members, multiprocessors) => {
      const into = new BigUint64Array(1);
      const config = multiprocessors === undefined ? null : configOf(multiprocessors);
      check("ncclCommSplit", split(own, members?.[0] ?? NOCOLOR, rank, into, config));
      const [part = 0n] = into;
      return members && communicator(part, members.indexOf(rank), members.length);
    },
    check: () => {
      const into = new Int32Array(1);
      check("ncclCommGetAsyncError", asyncError(own, into));
      const [code = 0] = into;
      if (code !== IN_PROGRESS) check("a collective", code);
    },
    abort: () => new Promise((resolve) => void abort.async(own, () => resolve())),
    close: () => check("ncclCommDestroy", destroy(own)),
  };
}

/**
 * Returns an ncclConfig_t in its form of NCCL 2.18, which later versions read: the most thread blocks of a collective, and NCCL's default
 * for all else. A collective has one thread block a multiprocessor.
 */
function configOf(most: number): Uint8Array {
  const [bytes, magic, version, undefinedInt] = [48, 0xcafebeef, 21_800, -(2 ** 31)];
  const config = new DataView(new ArrayBuffer(bytes));
  config.setBigUint64(0, BigInt(bytes), true);
  config.setUint32(8, magic, true);
  config.setUint32(12, version, true);
  // blocking, cgaClusterSize, minCTAs, maxCTAs; then netName, a null pointer, and splitShare
  for (const [n, value] of [undefinedInt, undefinedInt, undefinedInt, most].entries()) config.setInt32(16 + 4 * n, value, true);
  config.setInt32(40, undefinedInt, true);
  return new Uint8Array(config.buffer);
}

const has = (handle: LibraryHandle, name: string): boolean => {
  try {
    return handle.symbol(name) !== undefined;
  } catch {
    return false;
  }
};

function splitOf(path: string, handle: LibraryHandle) {
  if (has(handle, "ncclCommSplit")) return handle.func("ncclCommSplit", "int", ["void *", "int", "int", "void *", "void *"]);
  throw new Trouble(`NCCL (${path}) has no ncclCommSplit: it is too old`, "use NCCL 2.18 or later: RANKC_LIBNCCL names its file", 3);
}

/** Values of ncclResult_t that the machine causes: a failed CUDA call, a failed system call, a failed rank. */
const ofTheMachine = [1, 2, 6];

function check(call: string, code: number): void {
  if (code === 0) return;
  const detail: string | null = nccl().lastError(null);
  const message = `${call}: ${nccl().error(code)}${detail ? `: ${detail.trim()}` : ""}`;
  throw ofTheMachine.includes(code) ? new Trouble(message, "NCCL_DEBUG=WARN in the environment shows more", 3) : new Error(message);
}
