/** A run on this machine: opens what a plan needs here (its text, its weights, its devices), and closes all of it with the run. */
import { resolve } from "node:path";
import { type HeldOutPart, heldOutParts, heldOutSources } from "../../schemas/heldOut.ts";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { LocalRanks } from "../backend.ts";
import { type BackendName, backends } from "../backends.ts";
import { type OpenCheckpoint, openCheckpoint } from "../checkpoint/checkpoint.ts";
import { expectComplete, removeUnfinished, setAside } from "../checkpoint/commit.ts";
import { checkpointFor, type HfCheckpoint } from "../checkpoint/hf.ts";
import { isLoadable, loadState } from "../checkpoint/loadState.ts";
import { loadShards } from "../checkpoint/loadWeights.ts";
import { type Chosen, chooseCheckpoint, expectRoom, lockFolder, newestCheckpoint } from "../checkpoint/saveFolder.ts";
import { CheckpointSaver, type PendingSave } from "../checkpoint/saver.ts";
import { type Opened, type OpenedCorpus, openCorpus } from "../data/corpus.ts";
import { type HeldOut, heldOutOf } from "../data/heldOut.ts";
import { openHeldOutSources, openSources } from "../data/sources.ts";
import type { FileLock } from "../lockFile.ts";
import { RankPrograms } from "../rankPrograms.ts";
import type { StartupClock } from "../startup.ts";
import { readingOf } from "./inputs.ts";
import { type Run, runOn } from "./loop.ts";
import { Parameters } from "./parameters.ts";

/** The share of a step for which the host allocates memory of saves, while the device computes: the rest is for the host's own calls. */
export const PREPARING = 0.75;

/** Settings of `openRun`. */
export interface RunSettings {
  /** Returns a cubin of the plan by its file name. */
  readonly cubin?: (file: string) => Uint8Array | undefined;
  /** CUDA: replay steps as a graph (default: true). */
  readonly graph?: boolean;
  /** rankc's version, the same in all processes of a run. */
  readonly version?: string;
  /** Measures the parts of the start; see startup.ts. */
  readonly startup?: StartupClock;
  /** Receives a line about what takes long before the first step. */
  readonly onProgress?: (line: string) => void;
  /** Record the times of instructions. A profiled run is slower. */
  readonly profile?: boolean;
  /** The backend. `cuda` runs one rank in this process, read from the environment. */
  readonly backend?: BackendName;
  /** Returns the source of a kernel by its file name; the backend `cpu` needs none. */
  readonly source?: (file: string) => string;
  /** A Hugging Face checkpoint: a file, an index or a folder. */
  readonly initFrom?: string;
  /** The folder that `save` writes checkpoints to. */
  readonly save?: string;
  /** A checkpoint, or a folder of checkpoints, to resume from. `auto`: the newest in `save`, or none if `save` has none. */
  readonly resume?: string;
  /** Complete checkpoints to keep in `save`: older ones are removed when a new one is complete; undefined: all. */
  readonly keep?: number;
  /** With `resume`: what is read of the checkpoint; default: all. With `weights` the run is a new one. */
  readonly only?: "weights";
  /** Job keys and tensor names in which the checkpoint may differ from the job. */
  readonly allowMismatch?: readonly string[];
  /** The base directory of relative paths in the job. */
  readonly baseDir: string;
  /** As in `Given`. */
  readonly watch?: readonly string[];
  /** As in `Given`; steps are then not replayed as a graph. */
  readonly debugNonfinite?: boolean;
}

/** An open run. */
export interface OpenRun extends Run {
  /** Writes a checkpoint to the `save` folder and returns its path. All processes of a run call it after the same step. */
  save(): Promise<string>;
  /**
   * Begins a checkpoint and returns when the state is copied; it is written while steps run, and `done` of the result tells its end. All
   * processes of a run call it after the same step.
   */
  beginSave(): Promise<PendingSave>;
  /** Messages about the checkpoint that the run starts from. */
  readonly notes: readonly string[];
}

/** Opens a plan on a backend, with its corpus and its start weights. Throws a Trouble, and then closes all that it opened. */
export async function openRun(plan: Plan, settings: RunSettings): Promise<OpenRun> {
  const { initFrom, resume, save: folder, baseDir, watch, version = "", allowMismatch = [] } = settings;
  if (initFrom !== undefined && resume !== undefined) throw new Trouble("--init-from and --resume exclude each other", "omit one of them");
  if (allowMismatch.length > 0 && initFrom === undefined && resume === undefined)
    throw new Trouble("--allow-mismatch needs --resume or --init-from", "add one of them, or omit --allow-mismatch");
  const { only } = settings;
  if (only !== undefined && (resume === undefined || resume === "auto"))
    throw new Trouble("--only weights needs --resume with a checkpoint", "name a checkpoint, or a folder of checkpoints: --resume DIR");
  const chosen = resume === undefined ? undefined : chosenBy(resume, folder);
  const { job } = plan;
  const corpus = openData(job, baseDir);
  const localRanks = await openBackend(plan, settings).catch((error: unknown) => {
    corpus.close();
    throw error;
  });
  settings.startup?.end("device");
  let lock: FileLock | undefined;
  let saver: CheckpointSaver | undefined;
  const close = async (error?: Error): Promise<void> => {
    await saver?.close(error);
    lock?.release();
    corpus.close();
    await localRanks.close(error);
  };
  try {
    if (folder !== undefined && localRanks.ranks.includes(0)) lock = lockFolder(folder);
    const from = chosen?.at === undefined ? undefined : openCheckpoint(chosen.at);
    const differences = from?.expectFor(plan, allowMismatch, only) ?? [];
    if (lock && folder !== undefined) {
      setAside(folder, chosen?.damaged ?? []);
      expectRoom(folder, (only === undefined && from?.progress.steps) || 0);
      removeUnfinished(folder);
    }
    const checkpoint = initFrom === undefined ? undefined : checkpointFor(job.model, initFrom, allowMismatch);
    const isLoaded = checkpoint
      ? await loadedByDevices(plan, localRanks, checkpoint, settings.onProgress)
      : from !== undefined && (await restoredByDevices(plan, localRanks, from, settings));
    const run = runOn(plan, {
      ...{ localRanks, debugNonfinite: settings.debugNonfinite ?? false },
      ...{ batch: corpus.batch, heldOut: corpus.heldOut },
      ...(isLoaded ? { isLoaded } : checkpoint && { checkpoint }),
      ...(from && (only === undefined ? { from } : !isLoaded && { checkpoint: { read: (name: string) => weightsOf(from, name) } })),
      ...(watch && { watch }),
      whileComputing: (seconds) => saver?.prepare(1000 * PREPARING * seconds),
    });
    settings.startup?.end("weights");
    checkpoint?.close();
    from?.close();
    if (folder !== undefined) {
      const { keep } = settings;
      saver = new CheckpointSaver({
        ...{ plan, folder, version, localRanks, expectHeld: () => lock?.expectHeld() },
        ...(keep !== undefined && { keep }),
      });
    }
    const beginSave = async (): Promise<PendingSave> => {
      if (!saver) throw new Error("the run was opened without a folder for checkpoints");
      run.expectBetweenSteps();
      return saver.begin(run.progress());
    };
    const save = async (): Promise<string> => {
      const { done } = await beginSave();
      return (await done).folder;
    };
    return { ...run, save, beginSave, close, notes: [...(chosen?.notes ?? []), ...differences, ...(checkpoint?.notes ?? [])] };
  } catch (error) {
    await close(error as Error);
    throw error;
  }
}

/** Returns the weights of a parameter in a checkpoint, which `expectFor` has checked. */
function weightsOf(from: OpenCheckpoint, name: string): Float32Array {
  const whole = from.whole(name);
  if (!whole) throw new Error(`rankc: ${from.folder} has no ${name}`);
  return whole.data;
}

/** The data of a run. */
interface RunData extends Opened {
  readonly heldOut: Readonly<Partial<Record<HeldOutPart, HeldOut>>>;
}

/** Opens the data that a job trains on, and the data that it evaluates on. */
function openData(job: Job, baseDir: string): RunData {
  const open = [openTraining(job, baseDir)] as const;
  const [{ batch, heldOut: ofCorpus }] = open;
  const closing: (() => void)[] = open.map(({ close }) => close);
  const close = (): void => {
    for (const end of closing) end();
  };
  const heldOut: Partial<Record<HeldOutPart, HeldOut>> = {};
  const { evaluation } = job.train;
  try {
    for (const part of evaluation ? heldOutParts : []) {
      const given = heldOutSources(job.data, part);
      if (!given || !evaluation) continue;
      const own = job.data[part] !== undefined;
      if (!own && ofCorpus) heldOut[part] = heldOutOf([{ ...ofCorpus(part), name: job.data.path }], evaluation.steps, readingOf(job));
      else {
        const placed = given.map((source) => ({ ...source, path: resolve(baseDir, source.path) }));
        const opened = openHeldOutSources(placed, { part, own, split: job.data.split }, readingOf(job));
        closing.push(opened.close);
        const named = opened.sources.map((source, k) => ({ ...source, name: given[k]?.path ?? source.name }));
        heldOut[part] = heldOutOf(named, evaluation.steps, readingOf(job));
      }
    }
    return { batch, heldOut, close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Opens the sources of a job, or its one corpus. */
function openTraining(job: Job, baseDir: string): Opened & Partial<OpenedCorpus> {
  const { path, labels, tokenizer, sources, split } = job.data;
  if (sources) {
    const placed = sources.map((source) => ({ ...source, path: resolve(baseDir, source.path) }));
    return openSources(placed, split, readingOf(job));
  }
  const files = {
    path: resolve(baseDir, path),
    labels: labels === null ? undefined : resolve(baseDir, labels),
    tokenizer: tokenizer === "bytes" ? undefined : resolve(baseDir, tokenizer),
  };
  return openCorpus(files, readingOf(job));
}

/** Loads the weights of a checkpoint through the loaders of the devices. Returns false if the host must convert them. */
async function loadedByDevices(
  plan: Plan,
  localRanks: LocalRanks,
  checkpoint: HfCheckpoint,
  onProgress: RunSettings["onProgress"],
): Promise<boolean> {
  const parameters = new Parameters(plan, new RankPrograms(plan), localRanks);
  for (const rank of localRanks.ranks) {
    const device = localRanks.rankDevice(rank);
    const shards = parameters.shardsOf(rank).map(({ parameter, buffers, sizes, ranges }) => {
      const pieces = checkpoint.pieces(parameter.name, sizes, ranges);
      return pieces && { pieces, target: buffers };
    });
    const all = shards.filter((shard) => shard !== undefined);
    if (!device.openLoader || all.length < shards.length) return false;
    await loadShards(device.openLoader(), all, rank === 0 ? onProgress : undefined);
  }
  return true;
}

/** Restores the state of a checkpoint through the loaders of the devices. Returns false if the host must write it. */
async function restoredByDevices(
  plan: Plan,
  localRanks: LocalRanks,
  from: OpenCheckpoint,
  { only, onProgress }: Pick<RunSettings, "only" | "onProgress">,
): Promise<boolean> {
  const parameters = new Parameters(plan, new RankPrograms(plan), localRanks);
  const weights = new Set(plan.programs.flatMap((program) => program.parameters.map(({ name }) => name)));
  for (const rank of localRanks.ranks) {
    const device = localRanks.rankDevice(rank);
    if (!device.openLoader) return false;
    const wanted = parameters.stateOf(rank).filter(({ name }) => only === undefined || weights.has(name));
    const shards = wanted.map((shard) => ({ ...shard, saved: from.savedShards(shard.name, shard.ranges), target: shard.buffers }));
    const loader = device.openLoader();
    const byLoader = shards.filter((shard) => isLoadable(shard, loader.blockBytes));
    for (const { name, ranges, buffers } of shards.filter((shard) => !byLoader.includes(shard))) {
      const values = from.shard(name, ranges);
      for (const buffer of buffers) device.write(buffer, 0, values);
    }
    await loadState(loader, byLoader, rank === 0 ? onProgress : undefined);
  }
  return true;
}

function chosenBy(resume: string, save: string | undefined): Chosen {
  if (resume !== "auto") return chooseCheckpoint(resume);
  if (save === undefined)
    throw new Trouble("--resume auto needs --save", "add --save DIR, or name a checkpoint after --resume (./auto for a folder named auto)");
  return newestCheckpoint(save, expectComplete);
}

async function openBackend(plan: Plan, settings: RunSettings): Promise<LocalRanks> {
  const { backend = "cpu", source = noSource, cubin, graph = true, profile = false, version = "", debugNonfinite = false } = settings;
  const { startup, onProgress } = settings;
  return backends[backend].open(plan, {
    ...{ source, version, profile, graph: graph && !debugNonfinite },
    ...(cubin && { cubin }),
    ...(startup && { startup }),
    ...(onProgress && { onProgress }),
  });
}

function noSource(file: string): never {
  throw new Error(`the run was opened without sources of kernels, and needs ${file}`);
}
