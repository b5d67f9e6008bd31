/** The registry of backends: `run`, `doctor` and the library read it. A backend is a row; its modules are imported when it is opened. */
import type { Plan } from "../schemas/plan.ts";
import type { LocalRanks } from "./backend.ts";
import type { CheckList } from "./checkList.ts";
import type { StartupClock } from "./startup.ts";
import type { Survey } from "./webgpu/probe.ts";

/** What `open` of a backend receives. */
export interface OpenSettings {
  /** Returns the source of a kernel by its file name. */
  readonly source: (file: string) => string;
  /** Returns a cubin of the plan by its file name. */
  readonly cubin?: (file: string) => Uint8Array | undefined;
  /** rankc's version, the same in all processes of a run. */
  readonly version: string;
  /** Record the times of instructions. */
  readonly profile: boolean;
  /** Replay steps as a graph, if the backend can. */
  readonly graph: boolean;
  /** Measures the parts of the start. */
  readonly startup?: StartupClock;
  /** Receives a line about what takes long. */
  readonly onProgress?: (line: string) => void;
}

/** A backend. */
export interface BackendRow {
  /** The ranks of one process, as the help of `run` describes them. */
  readonly description: string;
  /** The ranks that one process runs: all of the plan, or one, with a process for each. */
  readonly ranks: "all" | "one";
  /** The default target of a job; null if it depends on the device, and the fix for that. */
  readonly target: { readonly name: string } | { readonly name: null; readonly found: string; readonly fix: string };
  /** Adds the checks of `rankc doctor` for this backend. Returns the adapter of WebGPU. */
  readonly check: (list: CheckList) => Promise<Survey | undefined>;
  /** Opens the ranks of this process. Throws a Trouble if the device, a driver or a library is missing. */
  readonly open: (plan: Plan, settings: OpenSettings) => Promise<LocalRanks>;
  /** Returns how to end a process whose device calls may never return; absent if the process ends by itself. */
  readonly hardExit?: () => Promise<(code: number) => void>;
}

const rows = {
  cpu: {
    description: "all ranks in this process",
    ranks: "all",
    target: { name: "cpu" },
    check: async (list) => void (await import("./cpu/checks.ts")).checkCpu(list),
    open: async (plan, { profile }) => (await import("./cpu/backend.ts")).openCpu(plan, { profile }),
  },
  webgpu: {
    description: "all ranks in this process, on one adapter",
    ranks: "all",
    target: { name: "webgpu" },
    check: async (list) => (await import("./webgpu/checks.ts")).checkWebgpu(list),
    open: async (plan, { source, profile }) => (await import("./webgpu/dawn.ts")).openWebgpu(plan, { kernel: source }, { profile }),
  },
  cuda: {
    description: "one process and GPU per rank",
    ranks: "one",
    target: {
      ...{ name: null, found: "a job for CUDA needs to know the GPU" },
      fix: "name its target, --target cuda:sm_90a for H100 and H200, or compile the job first",
    },
    check: async (list) => void (await import("./cuda/checks.ts")).checkCuda(list),
    open: async (plan, { source, cubin, ...how }) => {
      const files = { source, ...(cubin && { cubin }) };
      return (await import("./cuda/rank.ts")).openRank(plan, { files, env: process.env, ...how });
    },
    hardExit: async () => (await import("./cuda/hardExit.ts")).hardExit(),
  },
} as const satisfies Record<string, BackendRow>;

/** The name of a backend, as `--backend` takes it. */
export type BackendName = keyof typeof rows;
/** All backends by name. */
export const backends: Readonly<Record<BackendName, BackendRow>> = rows;
/** The names of all backends, the default one first. */
export const backendNames = Object.keys(rows) as [BackendName, ...BackendName[]];

/** Returns a value for each backend. */
export const forEachBackend = <T>(of: (name: BackendName) => T): Readonly<Record<BackendName, T>> => ({
  cpu: of("cpu"),
  webgpu: of("webgpu"),
  cuda: of("cuda"),
});
