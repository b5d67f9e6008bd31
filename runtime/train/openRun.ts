/** A run on this machine: opens what a plan needs here (its text, its weights, its devices), and closes all of it with the run. */
import { resolve } from "node:path";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { LocalRanks } from "../backend.ts";
import { openCheckpoint, saveCheckpoint } from "../checkpoint/checkpoint.ts";
import { checkpointFor } from "../checkpoint/hf.ts";
import { type Chosen, chooseSnapshot, expectRoom, type FolderLock, lockFolder, newestSnapshot } from "../checkpoint/saveFolder.ts";
import { openCpu } from "../cpu/backend.ts";
import { openCorpus } from "../data/corpus.ts";
import { readingOf } from "./inputs.ts";
import { type Run, runOn } from "./loop.ts";

export interface RunSettings {
  /** A cubin beside the plan, by the name of its file. */
  readonly cubin?: (file: string) => Uint8Array | undefined;
  /** CUDA: steps are replayed as a graph, unless this is false. */
  readonly graph?: boolean;
  /** rankc's version, the same in all processes of a run. */
  readonly version?: string;
  /** Takes times; slower. */
  readonly profile?: boolean;
  /** `cuda` runs one rank in this process; the environment says which. */
  readonly backend?: "cpu" | "webgpu" | "cuda";
  /** The text of a kernel of the plan, by the name of its file; the backend `cpu` needs none. */
  readonly source?: (file: string) => string;
  /** A Hugging Face checkpoint: a file, an index or a folder. */
  readonly initFrom?: string;
  /** A folder for snapshots, which `save` writes to. */
  readonly save?: string;
  /** A snapshot, or a folder of them, to go on from; `auto`: the newest of `save`, or none where it has none. */
  readonly resume?: string;
  /** Job keys, or names of tensors, in which what the run starts from may differ from the job. */
  readonly allowMismatch?: readonly string[];
  /** Where relative paths of the job start: the job file's folder. */
  readonly baseDir: string;
  /** As in `Given`. */
  readonly watch?: readonly string[];
  /** As in `Given`; steps are then not replayed as a graph. */
  readonly debugNonfinite?: boolean;
}

export interface OpenRun extends Run {
  /** Writes a snapshot, where the run was opened to: its folder. All processes of a run do it after the same step. */
  save(): Promise<string>;
  /** What a person should read about the snapshot or the checkpoint that the run starts from. */
  readonly notes: readonly string[];
}

export async function openRun(plan: Plan, settings: RunSettings): Promise<OpenRun> {
  const { initFrom, resume, save: folder, baseDir, watch, version = "", allowMismatch = [] } = settings;
  if (initFrom !== undefined && resume !== undefined)
    throw new Trouble("--init-from and --resume both say what to start from", "leave one of them out");
  if (allowMismatch.length > 0 && initFrom === undefined && resume === undefined)
    throw new Trouble("--allow-mismatch says what may differ, and nothing is started from", "name it after --resume or --init-from");
  const chosen = resume === undefined ? undefined : chosenBy(resume, folder);
  const { job } = plan;
  const { path, labels } = job.data;
  const files = { path: resolve(baseDir, path), labels: labels === null ? undefined : resolve(baseDir, labels) };
  const corpus = openCorpus(files, readingOf(job));
  const localRanks = await openBackend(plan, settings).catch((error: unknown) => {
    corpus.close();
    throw error;
  });
  let lock: FolderLock | undefined;
  const close = async (error?: Error): Promise<void> => {
    lock?.release();
    corpus.close();
    await localRanks.close(error);
  };
  try {
    if (folder !== undefined && localRanks.ranks.includes(0)) lock = lockFolder(folder);
    const from = chosen?.at === undefined ? undefined : openCheckpoint(chosen.at);
    const differences = from?.expectFor(plan, allowMismatch) ?? [];
    if (lock) expectRoom(folder!, from?.progress.steps ?? 0);
    const checkpoint = initFrom === undefined ? undefined : checkpointFor(job.model, initFrom, allowMismatch);
    const run = runOn(plan, {
      ...{ localRanks, debugNonfinite: settings.debugNonfinite ?? false },
      batch: corpus.batch,
      ...(checkpoint && { checkpoint }),
      ...(from && { from }),
      ...(watch && { watch }),
    });
    checkpoint?.close();
    from?.close();
    const { ranks, meet = async () => {} } = localRanks;
    // what is remembered is f32 in any precision
    const read = async (rank: number, buffer: Buffer) => (await run.read(rank, buffer)) as Float32Array;
    const save = async (): Promise<string> => {
      if (folder === undefined) throw new Error("the run was opened without a folder for snapshots");
      lock?.expectHeld();
      return saveCheckpoint({ plan, folder, version, ranks, meet, read }, run.progress());
    };
    return { ...run, save, close, notes: [...(chosen?.notes ?? []), ...differences, ...(checkpoint?.notes ?? [])] };
  } catch (error) {
    await close(error as Error);
    throw error;
  }
}

function chosenBy(resume: string, save: string | undefined): Chosen {
  if (resume !== "auto") return chooseSnapshot(resume);
  if (save === undefined)
    throw new Trouble(
      "--resume auto needs --save",
      "name the folder after --save, or a snapshot after --resume (./auto for one of that name)",
    );
  return newestSnapshot(save);
}

async function openBackend(plan: Plan, settings: RunSettings): Promise<LocalRanks> {
  const { backend = "cpu", source, cubin, graph = true, profile = false, version = "", debugNonfinite = false } = settings;
  switch (backend) {
    case "cpu":
      return openCpu(plan, { profile });
    case "webgpu":
      return (await import("../webgpu/dawn.ts")).openWebgpu(plan, { kernel: source! }, { profile });
    case "cuda": {
      const { openRank } = await import("../cuda/rank.ts");
      const files = { source: source!, ...(cubin && { cubin }) };
      return openRank(plan, { files, env: process.env, version, profile, graph: graph && !debugNonfinite });
    }
    default:
      return backend satisfies never;
  }
}
