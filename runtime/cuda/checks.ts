/** The checks of CUDA for `rankc doctor`, from the system to a collective. Calls of the libraries block, about a second per device. */
import { Trouble } from "../../schemas/trouble.ts";
import type { CheckList, Probe } from "../checkList.ts";
import { type Context, type CudaDevice, driver, packParams } from "./driver.ts";
import { koffi } from "./libraries.ts";
import { joinCommunicator, ncclVersion, uniqueId } from "./nccl.ts";
import { compile, nvrtcVersion } from "./nvrtc.ts";

/** Adds the checks of CUDA. The check `launch` passes if kernels run on one GPU. */
export function checkCuda(list: CheckList): void {
  const check = <T>(name: string, probe: Probe<T>): T | undefined => list.check(["cuda"], name, probe);
  check("system", () => [system()]);
  check("koffi", () => [callLibc()]);
  const devices = check("driver", () => {
    const { path, version, devices } = driver();
    return [`supports CUDA ${version}, ${devices.length} device${devices.length === 1 ? "" : "s"} (${path})`, devices];
  });
  for (const device of devices ?? []) check(`device ${device.ordinal}`, () => [describe(device)]);
  const device = devices?.[0];
  const cubin = check("nvrtc", () => compileAdd(device));
  const context = device && check("context", () => [`device ${device.ordinal} is open`, driver().open(device)]);
  check("launch", () => {
    if (!context) throw notTried("device");
    if (!cubin) throw notTried("compiled kernel");
    return [addVectors(context, cubin)];
  });
  check("nccl", () => {
    const { version, path } = ncclVersion();
    if (!context) throw notTried("device", `NCCL ${version} (${path}); `);
    return [`NCCL ${version} sums over one rank; NVLink multicast is off (${path})`, reduceAlone(context)];
  });
  if (context) check("close", () => ["the device is closed", context.close()]);
  const { nvcc } = list.settings;
  list.check([], "nvcc", () => {
    if (nvcc !== undefined) return [`CUDA ${nvcc}: rankc compile stores cubins with the kernels of a plan for CUDA`];
    throw new Trouble(
      "was not found on the path or at RANKC_NVCC. Plans run without it: NVRTC compiles their kernels at the first run",
      "install the CUDA toolkit where plans are compiled (https://developer.nvidia.com/cuda-downloads), or set RANKC_NVCC to the path of its nvcc",
    );
  });
}

const notTried = (missing: string, found = ""): Trouble =>
  new Trouble(`${found}not tried: there is no ${missing}`, "fix the failures above first");

function system(): string {
  const found = `${process.platform}-${process.arch}`;
  if (process.platform !== "linux") throw new Trouble(`${found}: CUDA plans do not run on this system`, "use Linux, or WSL 2 on Windows");
  return found;
}

function callLibc(): string {
  const pid: number = koffi().load(null).func("getpid", "int", [])();
  if (pid !== process.pid) throw new Error(`getpid returned ${pid}; this is process ${process.pid}`);
  return "calls native libraries";
}

function describe({ name, bytes, sm, uuid }: CudaDevice): string {
  const found = `${name}, ${(bytes / 2 ** 30).toFixed(1)} GiB, sm_${sm}, ${uuid}`;
  if (sm < 80) throw new Trouble(`${found}: older than sm_80`, "hide it with CUDA_VISIBLE_DEVICES; plans run on Ampere and later");
  return found;
}

const addSource = `extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
`;

/** Returns the architecture of the device, or that of an H100 if there is none. From sm_90 on, plans use features of one architecture: suffix `a`. */
function compileAdd(device: CudaDevice | undefined): readonly [string, Uint8Array] {
  const { version, path } = nvrtcVersion();
  const arch = `sm_${device?.sm ?? 90}${(device?.sm ?? 90) >= 90 ? "a" : ""}`;
  const began = performance.now();
  const cubin = compile(addSource, { arch, name: "add.cu" });
  return [`NVRTC ${version} compiles for ${arch} in ${(performance.now() - began).toFixed(0)} ms (${path})`, cubin];
}

/** More bytes than the caches of any device, and no multiple of a block. */
const addends = 10_000_019;
const block = 256;

function addVectors(context: Context, cubin: Uint8Array): string {
  const [a, b, c] = [randomFloats(addends), randomFloats(addends), new Float32Array(addends)];
  const bytes = addends * 4;
  const at = [a, b, c].map(() => context.alloc(bytes));
  const [atA, atB, atC] = at as [(typeof at)[0], (typeof at)[0], (typeof at)[0]];
  context.upload(atA, a);
  context.upload(atB, b);
  context.fill(atC, 0xff, bytes);
  context.synchronize();
  const module = context.load(cubin);
  const add = context.kernel(module, "add");
  const stream = context.createStream();
  const [began, ended] = [context.createEvent(), context.createEvent()];
  const params = packParams(atA, atB, atC, addends);
  const launch = (): void => context.launch(add, { grid: [Math.ceil(addends / block)], block: [block], stream }, params);
  launch();
  context.record(began, stream);
  launch();
  context.record(ended, stream);
  context.synchronize(stream);
  const milliseconds = context.elapsed(began, ended);
  context.download(c, atC);
  for (const event of [began, ended]) context.destroyEvent(event);
  context.destroyStream(stream);
  context.unload(module);
  for (const pointer of at) context.free(pointer);

  const wrong = c.findIndex((sum, i) => sum !== Math.fround(a[i]! + b[i]!));
  if (wrong >= 0) throw new Error(`a kernel computed ${a[wrong]} + ${b[wrong]} = ${c[wrong]}, at index ${wrong} of ${addends}`);
  const rate = (3 * bytes) / milliseconds / 1e6;
  return `${addends.toLocaleString("en-US")} sums are exact, in ${milliseconds.toFixed(3)} ms: ${rate.toFixed(0)} GB/s`;
}

function reduceAlone(context: Context): void {
  const n = 1003;
  const sent = randomFloats(n);
  const got = new Float32Array(n);
  const [from, to] = [context.alloc(4 * n), context.alloc(4 * n)];
  context.upload(from, sent);
  context.fill(to, 0xff, 4 * n);
  context.synchronize();
  const stream = context.createStream();
  const communicator = joinCommunicator(uniqueId(), 0, 1);
  communicator.allReduce(from, to, n, stream);
  context.synchronize(stream);
  context.download(got, to);
  communicator.close();
  context.destroyStream(stream);
  for (const pointer of [from, to]) context.free(pointer);
  const wrong = got.findIndex((value, i) => value !== sent[i]);
  if (wrong >= 0) throw new Error(`an all-reduce over one rank changed ${sent[wrong]} to ${got[wrong]}, at index ${wrong} of ${n}`);
}

function randomFloats(n: number): Float32Array {
  const floats = new Float32Array(n);
  for (let i = 0; i < n; i++) floats[i] = Math.random() * 2 - 1;
  return floats;
}
