/** The doctor and the bindings under it, with and without a GPU. A test that needs a library of NVIDIA skips with the reason in its title. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, test, vi } from "vitest";
import type { DiagnoseSettings } from "../../runtime/checkList.ts";
import { type Context, driver, packParams } from "../../runtime/cuda/driver.ts";
import { findLibrary, koffi, openLibrary } from "../../runtime/cuda/libraries.ts";
import { joinCommunicator, ncclVersion, turnMulticastOff, uniqueId } from "../../runtime/cuda/nccl.ts";
import { compile, nvrtcVersion } from "../../runtime/cuda/nvrtc.ts";
import { type Diagnosis, diagnose, printDiagnosis } from "../../runtime/doctor.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { fixture } from "../support/job.ts";
import { rankcProcess } from "../support/rankc.ts";
import { adapterEnv, hardware, noAdapter } from "../support/softwareAdapter.ts";

const scratch = mkdtempSync(join(tmpdir(), "rankc-doctor-"));
afterAll(() => rmSync(scratch, { recursive: true }));
afterEach(() => vi.unstubAllEnvs());

const cc = process.env.CC ?? "cc";

/** Why this machine cannot do something, in one line, or undefined. */
function lacks(tryIt: () => unknown): string | undefined {
  try {
    tryIt();
  } catch (error) {
    return error instanceof Error ? error.message.split(/[;\n]/)[0]! : String(error);
  }
}
const noGpu = lacks(driver);
const noNvrtc = lacks(nvrtcVersion);
const noNccl = lacks(ncclVersion);
const noCompiler = lacks(() => execFileSync(cc, ["--version"], { stdio: "ignore" }));
const because = (...reasons: (string | undefined)[]): string =>
  reasons
    .filter((reason) => reason !== undefined)
    .map((reason) => ` [skipped: ${reason}]`)
    .join("");

const caught = (act: () => unknown): unknown => {
  try {
    act();
  } catch (error) {
    return error;
  }
  throw new Error("nothing was thrown");
};

describe("finding libraries", () => {
  const all = ["cuda", "nvrtc", "nccl"] as const;
  const env = { cuda: "RANKC_LIBCUDA", nvrtc: "RANKC_LIBNVRTC", nccl: "RANKC_LIBNCCL" };

  test.each(all)("%s: the error lists every tried path with its reason, and a fix", (library) => {
    const result = findLibrary(library);
    if ("handle" in result) return expect(result.path).not.toBe("");
    expect(result.tried.length).toBeGreaterThan(0);
    for (const { place, failed } of result.tried) expect([place, failed]).not.toContain("");
    const trouble = caught(() => openLibrary(library)) as Trouble;
    expect(trouble).toBeInstanceOf(Trouble);
    for (const { place, failed } of result.tried) expect(trouble.message).toContain(`\n  ${place}: ${failed}`);
    expect(trouble.fix).toContain(env[library]);
    expect(trouble.exit).toBe(3);
  });

  test.each(all)("%s: a variable that does not name a library is an error, and no other path is tried", (library) => {
    const text = join(scratch, "text.so");
    writeFileSync(text, "this is a text, and long enough to be read as the header of an ELF file, were it one\n");
    const failed = (path: string): unknown => {
      vi.stubEnv(env[library], path);
      const result = findLibrary(library);
      return "handle" in result ? result.path : result.tried.map(({ place, failed }) => `${place}: ${failed}`);
    };
    expect(failed(text)).toEqual([expect.stringMatching(/text\.so: .*invalid ELF header/)]);
    expect(failed(join(scratch, "nowhere.so"))).toEqual([expect.stringMatching(/nowhere\.so: .*No such file/)]);
    expect(failed("libc.so.6")).toEqual([
      expect.stringMatching(/^libc\.so\.6: is a library without (cuInit|nvrtcVersion|ncclGetVersion)$/),
    ]);
    expect((caught(() => openLibrary(library)) as Trouble).message).toContain(`${env[library]} names libc.so.6`);
  });

  test("folders of wheels under PYTHONPATH are searched, and the loader's message about a library there is reported", () => {
    const lib = join(scratch, "nvidia", "nccl", "lib");
    mkdirSync(lib, { recursive: true });
    writeFileSync(join(lib, "libnccl.so.2"), "no library");
    vi.stubEnv("PYTHONPATH", scratch);
    const result = findLibrary("nccl");
    if ("handle" in result) return; // the machine's own came first
    expect(result.tried).toContainEqual({ place: join(lib, "libnccl.so.2"), failed: expect.stringContaining("file too short") });
  });
});

test("NVLink multicast is off in the environment of the C library, which NCCL reads", () => {
  const getenv = koffi().load(null).func("getenv", "str", ["str"]);
  process.env.NCCL_NVLS_ENABLE = "1";
  turnMulticastOff();
  expect(getenv("NCCL_NVLS_ENABLE")).toBe("0");
  expect(process.env.NCCL_NVLS_ENABLE).toBe("0");
});

describe("the diagnosis", () => {
  const of = async (settings: Partial<DiagnoseSettings> = {}) => diagnose({ nvcc: "13.0", ...settings });
  const named = ({ checks }: Diagnosis, name: string) => checks.find((c) => c.name === name)!;
  /** The doctor's word in JSON, from a process with these variables. */
  const asked = async (env: NodeJS.ProcessEnv): Promise<Diagnosis & { readonly exit: number | null }> => {
    for (const [name, value] of Object.entries(env)) vi.stubEnv(name, value);
    const { exit, out, err } = await rankcProcess("doctor", "--format", "json");
    expect(err).toBe("");
    return { exit, ...JSON.parse(out) };
  };
  /** Builds a driver for Vulkan that executes a statement in C when it is loaded. */
  function vulkanThat(does: string): NodeJS.ProcessEnv {
    const folder = mkdtempSync(join(scratch, "vulkan-"));
    writeFileSync(
      join(folder, "driver.c"),
      `#include <stdlib.h>\n#include <unistd.h>\n__attribute__((constructor)) void load(void) { ${does}; }\n`,
    );
    execFileSync(cc, ["-shared", "-fPIC", "-o", join(folder, "libvulkan.so.1"), join(folder, "driver.c")]);
    return { LD_LIBRARY_PATH: folder };
  }
  const nowhere = { VK_DRIVER_FILES: "/nowhere.json", VK_ICD_FILENAMES: "/nowhere.json" };

  test("never throws; each failure has its cause and a fix", async () => {
    const { verdict, works, checks } = await of();
    const names = ["node", "system", "koffi", "driver", "nvrtc", "launch", "nccl", "nvcc", "webgpu", "cpu"];
    expect(checks.map(({ name }) => name)).toEqual(expect.arrayContaining(names));
    for (const check of checks) {
      expect(check.found).not.toBe("");
      expect("fix" in check).toBe(!check.ok);
    }
    const launched = checks.find(({ name }) => name === "launch")!.ok;
    expect(verdict).toBe(works.cuda ? "ready" : launched ? "partly" : "no");
    if (noGpu) expect(verdict).toBe("no");
  });

  test("a backend works if all its checks pass, whatever else is missing", async () => {
    const diagnosis = await of({ nvcc: undefined });
    for (const backend of ["cpu", "webgpu", "cuda"] as const)
      expect(diagnosis.works[backend]).toBe(diagnosis.checks.filter((c) => c.for.includes(backend)).every(({ ok }) => ok));
    expect(diagnosis.works.cpu).toBe(true);
    expect(named(diagnosis, "nvcc")).toMatchObject({ ok: false, for: [], fix: expect.stringContaining("RANKC_NVCC") });
  });

  test.skipIf(noAdapter)(`with an adapter: its name, profiles, features and limits${because(noAdapter)}`, async () => {
    const diagnosis = await asked(adapterEnv);
    const webgpu = diagnosis.webgpu!;
    expect(diagnosis.works.webgpu).toBe(true);
    expect(webgpu.profiles[0]).toBe("baseline");
    expect(webgpu.profiles.includes("f16")).toBe(webgpu.features["shader-f16"]);
    if (!hardware) expect([webgpu.adapter, webgpu.profiles]).toEqual([expect.stringMatching(/SwiftShader.*\(software\)$/), ["baseline"]]);
    for (const limit of Object.values(webgpu.limits)) expect(limit).toBeGreaterThanOrEqual(16_384);
    const { found } = named(diagnosis, "webgpu");
    for (const word of [webgpu.adapter, ...webgpu.profiles.map((p) => `webgpu:${p}`), ...Object.keys(webgpu.features), "KiB"])
      expect(found).toContain(word);
  });

  test("no adapter is a failure of WebGPU alone; doctor exits with 3 only if the requested backend does not work", async () => {
    const { exit, ...diagnosis } = await asked(nowhere);
    expect(exit).toBe(0);
    expect((await rankcProcess("doctor", "--backend", "cpu")).exit).toBe(0);
    expect((await rankcProcess("doctor", "--backend", "webgpu")).exit).toBe(diagnosis.works.webgpu ? 0 : 3);
    expect(diagnosis.verdict === "ready").toBe(diagnosis.works.cuda);
    expect(diagnosis.checks.map(({ name }) => name)).toEqual((await of()).checks.map(({ name }) => name));
    if (process.platform !== "linux") return;
    expect(named(diagnosis, "webgpu")).toMatchObject({ ok: false, for: ["webgpu"], fix: expect.stringMatching(/driver/) });
    expect([diagnosis.works.webgpu, diagnosis.webgpu]).toEqual([false, undefined]);
  });

  test.skipIf(noCompiler || process.platform !== "linux").each([
    ["does not answer", "pause()", 2000, /did not answer for 2 s/],
    ["ends the process", "abort()", 600_000, /ended by SIGABRT/],
  ])(`a driver that %s is reported, and does not block${because(noCompiler)}`, async (_, does, webgpuLimit, reported) => {
    for (const [name, value] of Object.entries(vulkanThat(does))) vi.stubEnv(name, value);
    const diagnosis = await of({ webgpuLimit });
    expect(named(diagnosis, "webgpu")).toMatchObject({ ok: false, found: expect.stringMatching(reported) });
    expect(diagnosis.works).toMatchObject({ cpu: true, webgpu: false });
  });

  test("is printed as a list, with a fix under each failure", () => {
    const text = printDiagnosis({
      verdict: "partly",
      works: { cpu: true, webgpu: true, cuda: false },
      checks: [
        { name: "launch", ok: true, found: "sums are exact", for: ["cuda"] },
        { name: "nccl", ok: false, found: "was not found; tried:\n  libnccl.so.2: no", fix: "install it", for: ["cuda"] },
        { name: "nvcc", ok: false, found: "is not here", fix: "get it", for: [] },
      ],
    });
    expect(`\n${text}\n`).toBe(`
ok  launch  sums are exact
no  nccl    was not found; tried:
              libnccl.so.2: no
            fix: install it
--  nvcc    is not here
            fix: get it

CUDA: kernels run on this machine's GPU, but something that plans need is missing.
Plans run here on: cpu, webgpu.
`);
  });
});

const addSource = `extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
`;

/** Adds n random pairs on the device; beyond them, memory must stay as it was. */
function expectSums(context: Context, image: Uint8Array, n: number): void {
  const guard = 64;
  const [a, b] = [0, 1].map(() => Float32Array.from({ length: n }, () => Math.random() - 0.5)) as [Float32Array, Float32Array];
  const c = new Float32Array(n + guard);
  const at = [a, b, c].map(({ byteLength }) => context.alloc(byteLength));
  context.upload(at[0]!, a);
  context.upload(at[1]!, b);
  context.fill(at[2]!, 0xff, c.byteLength);
  context.synchronize();
  const module = context.load(image);
  const stream = context.createStream();
  const [began, ended] = [context.createEvent(), context.createEvent()];
  context.record(began, stream);
  context.launch(context.kernel(module, "add"), { grid: [Math.ceil(n / 128)], block: [128], stream }, packParams(...at, n));
  context.record(ended, stream);
  context.synchronize(stream);
  context.download(c, at[2]!);
  expect(context.elapsed(began, ended)).toBeGreaterThan(0);
  for (const event of [began, ended]) context.destroyEvent(event);
  context.destroyStream(stream);
  context.unload(module);
  for (const pointer of at) context.free(pointer);
  expect(c.subarray(0, n)).toEqual(a.map((x, i) => x + b[i]!));
  expect(c.subarray(n).every(Number.isNaN)).toBe(true);
}
const oddSizes = [1, 127, 129, 100_003];

test("parameters are packed in the layout of C", () => {
  expect([...packParams(1, 0x0807060504030201n, -1).bytes]).toEqual([1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 255, 255, 255, 255]);
});

describe.skipIf(noCompiler)(`the driver's binding, before a stand-in for the driver${because(noCompiler)}`, () => {
  /** The binding as a fresh process has it, with the stand-in as its driver. */
  async function standIn(): Promise<typeof import("../../runtime/cuda/driver.ts")> {
    const path = join(scratch, "standInDriver.so");
    execFileSync(cc, ["-shared", "-fPIC", "-O1", "-w", "-o", path, fixture("standInDriver.c")]);
    vi.stubEnv("RANKC_LIBCUDA", path);
    vi.resetModules();
    return import("../../runtime/cuda/driver.ts");
  }
  const image = Uint8Array.from([0x7f, 0x45, 0x4c, 0x46]);

  test("devices are described", async () => {
    const { version, devices } = (await standIn()).driver();
    expect(version).toBe("13.1");
    expect(devices).toEqual([
      { ordinal: 0, name: "Stand-in 0", uuid: "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", bytes: 141 * 2 ** 30, sm: 90 },
      { ordinal: 1, name: "Stand-in 1", uuid: "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f", bytes: 141 * 2 ** 30, sm: 90 },
    ]);
  });

  test("memory, modules, launches, streams and events have the arguments that the driver expects", async () => {
    const { driver } = await standIn();
    const context = driver().open(driver().devices[0]!);
    for (const n of oddSizes) expectSums(context, image, n);
    context.close();
  });

  test("faults of the user are a Trouble with a fix; faults of rankc are an Error", async () => {
    const { driver } = await standIn();
    const context = driver().open(driver().devices[0]!);
    expect(caught(() => context.alloc(2 ** 40))).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
      fix: expect.stringContaining("nvidia-smi"),
    });
    const wrongName = caught(() => context.kernel(context.load(image), "subtract"));
    expect(wrongName).toMatchObject({ name: "Error", message: "cuModuleGetFunction: CUDA_ERROR_NOT_FOUND: named symbol not found" });
    context.close();
    expect(caught(() => context.synchronize())).toMatchObject({ message: "cuCtxSynchronize: CUresult 201: CUresult 201" });
    vi.stubEnv("STAND_IN_NO_DEVICE", "1");
    expect(caught((await standIn()).driver)).toMatchObject({ name: "Trouble", message: expect.stringContaining("CUDA_ERROR_NO_DEVICE") });
  });
});

describe.skipIf(noNvrtc)(`NVRTC${because(noNvrtc)}`, () => {
  test("compiles a cubin for an architecture, and PTX for a virtual one; no GPU is needed", () => {
    expect([...compile(addSource, { arch: "sm_90a", name: "add.cu" }).subarray(0, 4)]).toEqual([0x7f, 0x45, 0x4c, 0x46]);
    const ptx = Buffer.from(compile(addSource, { arch: "compute_80", name: "add.cu" })).toString();
    expect(ptx).toContain(".visible .entry add(");
    expect(ptx.endsWith("\0")).toBe(true);
  });

  test("an invalid source is reported with its line, and a caret under its column", () => {
    const wrong = addSource.replace("b[i];", "bee[i];");
    expect(caught(() => compile(wrong, { arch: "sm_90a", name: "wrong.cu" }))).toMatchObject({
      name: "Error",
      message: expect.stringMatching(/wrong\.cu\(3\): error: identifier "bee" is undefined\n.*bee\[i\];\n +\^/),
    });
  });

  test("options are passed on, and an unknown architecture is a Trouble", () => {
    const guarded = `#ifndef WIDTH\n#error no width\n#endif\n${addSource}`;
    expect(compile(guarded, { arch: "sm_90a", name: "add.cu", options: ["-DWIDTH=4", "--use_fast_math"] }).length).toBeGreaterThan(0);
    expect(caught(() => compile(addSource, { arch: "sm_1", name: "add.cu" }))).toMatchObject({ name: "Trouble", exit: 3 });
  });
});

test.skipIf(noNccl)(`NCCL makes a new id each time${because(noNccl)}`, () => {
  expect(ncclVersion().version).toMatch(/^2\.\d+\.\d+$/);
  expect(uniqueId()).not.toEqual(uniqueId());
});

test.skipIf(noGpu || noNvrtc)(`a GPU adds vectors of odd sizes, and touches nothing beyond them${because(noGpu, noNvrtc)}`, () => {
  const context = driver().open(driver().devices[0]!);
  const cubin = compile(addSource, { arch: `sm_${context.device.sm}`, name: "add.cu" });
  for (const n of oddSizes) expectSums(context, cubin, n);
  context.close();
});

test.skipIf(noGpu || noNccl)(`an all-reduce over one rank returns its input${because(noGpu, noNccl)}`, () => {
  const context = driver().open(driver().devices[0]!);
  const sent = Float32Array.from({ length: 1003 }, Math.random);
  const got = new Float32Array(sent.length);
  const at = [sent, got].map(({ byteLength }) => context.alloc(byteLength));
  context.upload(at[0]!, sent);
  context.fill(at[1]!, 0xff, got.byteLength);
  context.synchronize();
  const stream = context.createStream();
  const communicator = joinCommunicator(uniqueId(), 0, 1);
  communicator.allReduce(at[0]!, at[1]!, sent.length, stream);
  context.synchronize(stream);
  context.download(got, at[1]!);
  communicator.close();
  context.destroyStream(stream);
  for (const pointer of at) context.free(pointer);
  context.close();
  expect(got).toEqual(sent);
});
