/**
 * Snapshots: all that a run remembers between two steps, in a folder for each: `step-00000020/` holds snapshot.json (how far the
 * run was, its job and mesh, how each tensor is cut, and a digest of each file) and a safetensors file for each rank that has pieces no
 * rank before it has. A run goes on from one on any mesh and backend: pieces are put together anew. A folder is there whole, or under
 * another name. Reading a piece checks its digest, and that it is finite.
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
import type { RunProgress } from "../train/schedule.ts";
import { printSnapshotText, readSnapshotText, type SnapshotText, TEXT } from "./checkpointFile.ts";
import { expectFinite } from "./finite.ts";
import { expectAllowed, type Mismatch, modelDifferences, surplusMismatches } from "./mismatch.ts";
import { type DeferredTensorEntry, openSafetensors, type Safetensors, streamSafetensors } from "./safetensors.ts";
import { folderOf } from "./saveFolder.ts";
import { checkpointState } from "./state.ts";

const fileOf = (rank: number): string => `rank-${String(rank).padStart(5, "0")}.safetensors`;

/** Where a run puts its snapshots. */
export interface Saving {
  readonly plan: Plan;
  readonly folder: string;
  /** rankc's. */
  readonly version: string;
  /** The ranks of this process, and whether rank 0 is among them. */
  readonly ranks: readonly number[];
  /** Waits for the other processes of the run. */
  readonly meet: (name: string) => Promise<void>;
  readonly read: (rank: number, buffer: Buffer) => Promise<Float32Array>;
}

/**
 * Writes a snapshot; returns its folder. All processes of a run call it between the same two steps. Throws a Trouble, and leaves nothing
 * of the snapshot, where the disk refuses or a value is not finite.
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

/** How each tensor is cut, and by rank what its file holds. */
function contentsOf({ plan, read }: Saving, { steps }: RunProgress) {
  const { mesh, programs } = plan;
  const tensors: SnapshotText["tensors"] = {};
  const files = new Map<number, DeferredTensorEntry[]>();
  const fix = "resume from an earlier snapshot, with a smaller learning rate";
  for (const program of programs)
    for (const { name, buffer } of checkpointState(program)) {
      if (name in tensors) throw new Error(`${name} is remembered twice`);
      tensors[name] = { stage: program.stage, sizes: buffer.sizes, shardedBy: buffer.shardedBy };
      for (const n of firstHolders(mesh, buffer)) {
        const rank = rankAt(mesh, program.stage, n);
        const own = files.get(rank) ?? [];
        files.set(rank, own);
        const data = async () => expectFinite(await read(rank, buffer), `no snapshot of step ${steps}: ${name}`, fix);
        own.push({ name, dtype: "F32", shape: buffer.shape, data });
      }
    }
  return { tensors, files };
}

/** Digests of the files that the ranks wrote; throws a Trouble where some are not there. */
function digestsIn(part: string, ranks: readonly number[], step: number): SnapshotText["files"] {
  const missing = ranks.filter((rank) => !existsSync(join(part, fileOf(rank))));
  if (missing.length > 0)
    throw new Trouble(`${part}: the files of ${ranksText(missing)} are not there`, "name a folder after --save that all hosts share");
  const digestOf = (name: string) => {
    const file = openSafetensors(join(part, name));
    file.close();
    return [name, { step, header_sha256: file.headerDigest }] as const;
  };
  return Object.fromEntries(ranks.map((rank) => digestOf(fileOf(rank))));
}

function writeText(part: string, { plan, version }: Saving, text: Pick<SnapshotText, "progress" | "tensors" | "files">): void {
  const fd = openSync(join(part, TEXT), "w");
  try {
    writeFileSync(fd, printSnapshotText({ rankc: version, job: plan.job, mesh: plan.mesh, ...text }));
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
  syncFolder(part);
}

/** Makes the names in a folder last. Some file systems cannot, and say EINVAL. */
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

export interface OpenCheckpoint {
  readonly folder: string;
  readonly progress: RunProgress;
  /**
   * Throws a Trouble that lists how the plan's model is another than the one that was saved, beside what `allowed` (--allow-mismatch) names;
   * returns notes on what may differ.
   */
  expectFor(plan: Plan, allowed: readonly string[]): string[];
  /** A rank's piece of a tensor, from the pieces that were saved. */
  shard(name: string, ranges: Ranges): Float32Array;
  /** A whole tensor; undefined where there is none of this name. */
  whole(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined;
  /** The model that was trained. */
  model(): Job["model"];
  close(): void;
}

const DAMAGED = "take another snapshot of the run";

/** `at`: the folder of a snapshot. Throws a Trouble where its text is damaged. */
export function openCheckpoint(at: string): OpenCheckpoint {
  const { progress, rankc, job, mesh, tensors, files } = readSnapshotText(join(at, TEXT));
  const open = new Map<number, Safetensors>();
  const close = (): void => {
    for (const file of open.values()) file.close();
    open.clear();
  };
  function fileAt(rank: number): Safetensors {
    const known = open.get(rank);
    if (known) return known;
    // a process may open so many files and no more
    if (open.size >= 64) close();
    const path = join(at, fileOf(rank));
    const file = openSafetensors(path);
    open.set(rank, file);
    const stated = files[fileOf(rank)];
    const { step } = file.metadata;
    if (step !== String(stated?.step)) throw new Trouble(`${path} is of step ${step}, and the snapshot of step ${stated?.step}`, DAMAGED);
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
      const values = expectFinite(file.read(name), `${file.path}: ${name}`, "take a snapshot of an earlier step");
      copyShared(shared, [theirs, values], [ranges, out]);
    }
    return out;
  }
  /** Keys that a later rankc added have their defaults, with which it computes what the one that saved did. */
  function model(): Job["model"] {
    const parsed = Job.shape.model.safeParse(job.model);
    if (parsed.success) return parsed.data;
    const [issue] = parsed.error.issues;
    throw new Trouble(`${at}: model.${issue?.path.join(".")}: ${issue?.message}`, `take it with the rankc that saved it, ${rankc}`);
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
      // what adam keeps is what adamw does; another optimizer's moments may have the same names, and are others
      const [saved, asked] = [job.train.optimizer.type, plan.job.train.optimizer.type].map((type) => type.replace("adamw", "adam"));
      if (saved !== asked)
        throw new Trouble(
          `${at} was saved by ${job.train.optimizer.type}, and the job's train.optimizer.type is ${plan.job.train.optimizer.type}`,
          "resume with that one, or begin anew from its weights: rankc export hf, then --init-from",
        );
      const { mismatches, notes } = modelDifferences(model(), plan.job.model);
      const held = tensorDifferences(tensors, plan);
      const fix = "resume with the model and the optimizer that it was saved with; the mesh may be another";
      return [...notes, ...held.notes, ...expectAllowed(at, [...mismatches, ...held.mismatches], allowed, fix)];
    },
  };
}

/** What the plan remembers and the snapshot does not hold, or in another size; and parameters of the snapshot that the plan has not. */
function tensorDifferences(tensors: SnapshotText["tensors"], plan: Plan): { mismatches: Mismatch[]; notes: string[] } {
  const remembered = plan.programs.flatMap(checkpointState);
  const names = new Set(remembered.map(({ name }) => name));
  const wrong = remembered.flatMap(({ name, buffer: { sizes } }): Mismatch[] => {
    const found = tensors[name]?.sizes;
    if (`${found}` === `${sizes}`) return [];
    return [{ text: found ? `${name} is [${found.join(", ")}]; the plan's is [${sizes.join(", ")}]` : `${name} is not there` }];
  });
  const isState = (name: string): boolean => name.slice(0, name.lastIndexOf(".")) in tensors;
  const surplus = Object.keys(tensors).filter((name) => !names.has(name) && !name.startsWith("mtp."));
  const states = surplus.filter((name) => isState(name) && names.has(name.slice(0, name.lastIndexOf("."))));
  const parameters = surplus.filter((name) => !isState(name));
  const notes = states.length > 0 ? [`tensors of optimizer state that the job's optimizer has not are not used: ${states.length}`] : [];
  return { mismatches: [...wrong, ...surplusMismatches(parameters, plan.job.model)], notes };
}
