/**
 * Writes and reads checkpoints. A checkpoint is a folder `step-00000020/` with snapshot.json (run progress, job, mesh, the sharding of
 * each tensor, a digest of each file) and one safetensors file per rank that is the first holder of a shard. A run may resume on any mesh
 * and backend, because shards are reassembled. The folder is renamed to its final name when it is complete. Reading a shard verifies its
 * digest and that all values are finite.
 */
import { closeSync, existsSync, fsyncSync, openSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Job } from "../../schemas/job.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import { ranksText } from "../launch/rankList.ts";
import { copyShared, firstHolders, type Ranges, shardRanges, sharedBy } from "../shards.ts";
import type { RunProgress } from "../train/stepParameters.ts";
import { checkpointState } from "./checkpointState.ts";
import { expectFinite } from "./finite.ts";
import { expectAllowed, type Mismatch, modelDifferences, surplusMismatches } from "./mismatch.ts";
import { type DeferredTensorEntry, openSafetensors, type Safetensors, streamSafetensors } from "./safetensors.ts";
import { folderOf } from "./saveFolder.ts";
import { type CheckpointText, printCheckpointText, readCheckpointText, TEXT } from "./snapshotFile.ts";

const fileOf = (rank: number): string => `rank-${String(rank).padStart(5, "0")}.safetensors`;

/** What saveCheckpoint needs of a run. */
export interface Saving {
  readonly plan: Plan;
  readonly folder: string;
  /** The version of rankc. */
  readonly version: string;
  /** The ranks of this process. */
  readonly ranks: readonly number[];
  /** A named barrier among the processes of the run. */
  readonly meet: (name: string) => Promise<void>;
  readonly read: (rank: number, buffer: Buffer) => Promise<Float32Array>;
}

/**
 * Writes a checkpoint and returns its folder. All processes of a run call it between the same two steps. Throws a Trouble, and removes the
 * incomplete checkpoint, if the file system returns an error or a value is not finite.
 */
export async function saveCheckpoint(saving: Saving, progress: RunProgress): Promise<string> {
  const { folder, ranks, meet } = saving;
  const whole = join(folder, folderOf(progress.steps));
  const part = `${whole}.part`;
  const leads = ranks.includes(0);
  try {
    if (leads) rmSync(part, { recursive: true, force: true });
    await meet(`${part} is to be written`);
    const { tensors, files } = contentsOf(saving, progress);
    makeFolder(part);
    for (const rank of ranks) {
      const entries = files.get(rank);
      if (entries) await streamSafetensors(join(part, fileOf(rank)), entries, { step: String(progress.steps) });
    }
    await meet(`${part} is written`);
    if (!leads) return whole;
    writeText(part, saving, { progress, tensors, files: digestsIn(part, [...files.keys()], progress.steps) });
    rmSync(whole, { recursive: true, force: true });
    renameSync(part, whole);
    syncFolder(folder);
    return whole;
  } catch (error) {
    if (leads) rmSync(part, { recursive: true, force: true });
    throw unwritten(whole, error);
  }
}

/** Returns the sharding of each tensor, and the file entries of each rank that is the first holder of a shard. */
function contentsOf({ plan, read }: Saving, { steps }: RunProgress) {
  const { mesh, programs } = plan;
  const tensors: CheckpointText["tensors"] = {};
  const files = new Map<number, DeferredTensorEntry[]>();
  const fix = "resume from an earlier checkpoint, with a smaller learning rate";
  for (const program of programs)
    for (const { name, buffer } of checkpointState(program)) {
      if (name in tensors) throw new Error(`${name} is in the checkpoint state twice`);
      tensors[name] = { stage: program.stage, sizes: buffer.sizes, shardedBy: buffer.shardedBy };
      for (const n of firstHolders(mesh, buffer)) {
        const rank = rankAt(mesh, program.stage, n);
        const own = files.get(rank) ?? [];
        files.set(rank, own);
        const data = async () => expectFinite(await read(rank, buffer), `no checkpoint of step ${steps}: ${name}`, fix);
        own.push({ name, dtype: "F32", shape: buffer.shape, data });
      }
    }
  return { tensors, files };
}

/** Returns the digests of the files that the ranks wrote. Throws a Trouble if some are missing. */
function digestsIn(part: string, ranks: readonly number[], step: number): CheckpointText["files"] {
  const missing = ranks.filter((rank) => !existsSync(join(part, fileOf(rank))));
  if (missing.length > 0)
    throw new Trouble(`${part}: the files of ${ranksText(missing)} are missing`, "use a --save folder that all hosts share");
  const digestOf = (name: string) => {
    const file = openSafetensors(join(part, name));
    file.close();
    return [name, { step, header_sha256: file.headerDigest }] as const;
  };
  return Object.fromEntries(ranks.map((rank) => digestOf(fileOf(rank))));
}

function writeText(part: string, { plan, version }: Saving, text: Pick<CheckpointText, "progress" | "tensors" | "files">): void {
  const fd = openSync(join(part, TEXT), "w");
  try {
    writeFileSync(fd, printCheckpointText({ rankc: version, job: plan.job, mesh: plan.mesh, ...text }));
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
  syncFolder(part);
}

/** Flushes the entries of a folder to disk. File systems without support return EINVAL, which is ignored. */
function syncFolder(folder: string): void {
  const fd = openSync(folder, "r");
  try {
    fsyncSync(fd);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EINVAL") throw error;
  } finally {
    closeSync(fd);
  }
}

/** An open checkpoint. */
export interface OpenCheckpoint {
  readonly folder: string;
  readonly progress: RunProgress;
  /**
   * Compares the checkpoint with a plan. Throws a Trouble that lists the differences of the model, except those that `allowed`
   * (--allow-mismatch) names. Returns notes on differences that are valid.
   */
  expectFor(plan: Plan, allowed: readonly string[]): string[];
  /** Assembles the values of `ranges` of a tensor from the saved shards. */
  shard(name: string, ranges: Ranges): Float32Array;
  /** Returns a whole tensor; undefined if the checkpoint has none of this name. */
  whole(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined;
  /** Returns the model section of the saved job. Throws a Trouble if this version of rankc cannot read it. */
  model(): Job["model"];
  close(): void;
}

const DAMAGED = "use another checkpoint of the run";

/** Opens the checkpoint in folder `at`. Throws a Trouble if snapshot.json is damaged. */
export function openCheckpoint(at: string): OpenCheckpoint {
  const { progress, rankc, job, mesh, tensors, files } = readCheckpointText(join(at, TEXT));
  const open = new Map<number, Safetensors>();
  const close = (): void => {
    for (const file of open.values()) file.close();
    open.clear();
  };
  function fileAt(rank: number): Safetensors {
    const known = open.get(rank);
    if (known) return known;
    // stay below the limit of open files of a process
    if (open.size >= 64) close();
    const path = join(at, fileOf(rank));
    const file = openSafetensors(path);
    open.set(rank, file);
    const stated = files[fileOf(rank)];
    const { step } = file.metadata;
    if (step !== String(stated?.step))
      throw new Trouble(`${path} is of step ${step}, but the checkpoint is of step ${stated?.step}`, DAMAGED);
    if (file.headerDigest !== stated?.header_sha256)
      throw new Trouble(`${path} is not the file that was saved: the SHA-256 of its header differs from ${TEXT}'s`, DAMAGED);
    return file;
  }
  function tensor(name: string) {
    const found = tensors[name];
    if (!found) throw new Error(`${at} holds no ${name}`);
    return found;
  }
  function shard(name: string, ranges: Ranges): Float32Array {
    const saved = tensor(name);
    const out = new Float32Array(ranges.reduce((n, dim) => n * dim.reduce((m, [from, to]) => m + to - from, 0), 1));
    for (const n of firstHolders(mesh, saved)) {
      const theirs = shardRanges(mesh, saved, n);
      const shared = sharedBy(theirs, ranges);
      if (!shared) continue;
      const file = fileAt(rankAt(mesh, saved.stage, n));
      const values = expectFinite(file.read(name), `${file.path}: ${name}`, "use a checkpoint of an earlier step");
      copyShared(shared, [theirs, values], [ranges, out]);
    }
    return out;
  }
  /** Keys that a later rankc added get their defaults, which keep the arithmetic of the rankc that saved. */
  function model(): Job["model"] {
    const parsed = Job.shape.model.safeParse(job.model);
    if (parsed.success) return parsed.data;
    const [issue] = parsed.error.issues;
    throw new Trouble(`${at}: model.${issue?.path.join(".")}: ${issue?.message}`, `read it with the rankc that saved it, ${rankc}`);
  }
  return {
    ...{ folder: at, progress, shard, close },
    whole(name) {
      const sizes = tensors[name]?.sizes;
      const all = sizes?.map((n) => [[0, n] as const]);
      return sizes && all && { shape: sizes, data: shard(name, all) };
    },
    model,
    expectFor(plan, allowed) {
      // adam and adamw have the same state; other optimizers have other state under the same names
      const [saved, asked] = [job.train.optimizer.type, plan.job.train.optimizer.type].map((type) => type.replace("adamw", "adam"));
      if (saved !== asked)
        throw new Trouble(
          `${at} was saved with train.optimizer.type ${job.train.optimizer.type}, and the job has ${plan.job.train.optimizer.type}`,
          "resume with the same optimizer, or start a new run from the weights: rankc export hf, then --init-from",
        );
      const { mismatches, notes } = modelDifferences(model(), plan.job.model);
      const held = tensorDifferences(tensors, plan);
      const fix = "resume with the saved model and optimizer; the mesh may differ";
      return [...notes, ...held.notes, ...expectAllowed(at, [...mismatches, ...held.mismatches], allowed, fix)];
    },
  };
}

/** Lists tensors of the plan that the checkpoint lacks or has in another size, and parameters of the checkpoint that the plan lacks. */
function tensorDifferences(tensors: CheckpointText["tensors"], plan: Plan): { mismatches: Mismatch[]; notes: string[] } {
  const state = plan.programs.flatMap(checkpointState);
  const names = new Set(state.map(({ name }) => name));
  const wrong = state.flatMap(({ name, buffer: { sizes } }): Mismatch[] => {
    const found = tensors[name]?.sizes;
    if (`${found}` === `${sizes}`) return [];
    return [{ text: found ? `${name} is [${found.join(", ")}]; the plan's is [${sizes.join(", ")}]` : `${name} is missing` }];
  });
  const isState = (name: string): boolean => name.slice(0, name.lastIndexOf(".")) in tensors;
  const surplus = Object.keys(tensors).filter((name) => !names.has(name) && !name.startsWith("mtp."));
  const states = surplus.filter((name) => isState(name) && names.has(name.slice(0, name.lastIndexOf("."))));
  const parameters = surplus.filter((name) => !isState(name));
  const notes = states.length > 0 ? [`unused optimizer state tensors, which the job's optimizer does not have: ${states.length}`] : [];
  return { mismatches: [...wrong, ...surplusMismatches(parameters, plan.job.model)], notes };
}
