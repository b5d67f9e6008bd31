/**
 * Reads checkpoints, which saver.ts writes. A checkpoint is a folder `step-00000020/` with snapshot.json (run progress, job, mesh, the
 * sharding of each tensor, a digest of each file) and one safetensors file per rank that is the first holder of a shard. A run may resume
 * on any mesh and backend, because shards are reassembled. The folder has its final name when it is complete. Reading a shard verifies its
 * digest and that all values are finite.
 */
import { join } from "node:path";
import { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { RunProgress } from "../train/stepParameters.ts";
import { checkpointState } from "./checkpointState.ts";
import { expectAllowed, type Mismatch, modelDifferences, roundingNotes, surplusMismatches } from "./mismatch.ts";
import { openSafetensors, type Safetensors } from "./safetensors.ts";
import { type SavedTensors, savedTensors } from "./savedTensors.ts";
import { type CheckpointText, readCheckpointText, TEXT } from "./snapshotFile.ts";
import { fileOf } from "./stateFiles.ts";

/** An open checkpoint. */
export interface OpenCheckpoint extends SavedTensors {
  readonly folder: string;
  readonly progress: RunProgress;
  /**
   * Compares the checkpoint with a plan. Throws a Trouble that lists the differences of the model, except those that `allowed`
   * (--allow-mismatch) names. Returns notes on differences that are valid.
   */
  expectFor(plan: Plan, allowed: readonly string[], only?: "weights"): string[];
  has(name: string): boolean;
  /** Returns a whole tensor; undefined if the checkpoint has none of this name. */
  whole(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined;
  /** The sections of the saved job that an export reads, as they are in the file. */
  readonly job: CheckpointText["job"];
  /** Returns the model section of the saved job. Throws a Trouble if this version of rankc cannot read it. */
  model(): Job["model"];
  close(): void;
}

const DAMAGED = "use another checkpoint of the run";

/** Returns the files of a checkpoint by rank, which open when they are read, and the function that closes them. */
function openFiles(at: string, files: CheckpointText["files"]) {
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
  return { fileAt, close };
}

/** Opens the checkpoint in folder `at`. Throws a Trouble if snapshot.json is damaged. */
export function openCheckpoint(at: string): OpenCheckpoint {
  const { progress, rankc, job, mesh, tensors, files } = readCheckpointText(join(at, TEXT));
  const { fileAt, close } = openFiles(at, files);
  const saved = savedTensors({ at, mesh, tensors, fileAt });
  /** Keys that a later rankc added get their defaults, which keep the arithmetic of the rankc that saved. */
  function model(): Job["model"] {
    const parsed = Job.shape.model.safeParse(job.model);
    if (parsed.success) return parsed.data;
    const [issue] = parsed.error.issues;
    throw new Trouble(`${at}: model.${issue?.path.join(".")}: ${issue?.message}`, `read it with the rankc that saved it, ${rankc}`);
  }
  return {
    ...{ folder: at, progress, ...saved, close },
    has: (name) => name in tensors,
    whole(name) {
      const sizes = tensors[name]?.sizes;
      const all = sizes?.map((n) => [[0, n] as const]);
      return sizes && all && { shape: sizes, data: saved.shard(name, all) };
    },
    job,
    model,
    expectFor(plan, allowed, only) {
      // adam and adamw have the same state; other optimizers have other state under the same names
      const [saved, asked] = [job.train.optimizer.type, plan.job.train.optimizer.type].map((type) => type.replace("adamw", "adam"));
      if (saved !== asked && only === undefined)
        throw new Trouble(
          `${at} was saved with train.optimizer.type ${job.train.optimizer.type}, and the job has ${plan.job.train.optimizer.type}`,
          "resume with the same optimizer, or start a new run from the weights: --only weights",
        );
      const { mismatches, notes } = modelDifferences(model(), plan.job.model);
      const held = tensorDifferences(tensors, plan, only);
      const rounded = only === undefined ? roundingNotes(job.train, plan.job.train) : [];
      const fix = "resume with the saved model and optimizer; the mesh may differ";
      return [...notes, ...rounded, ...held.notes, ...expectAllowed(at, [...mismatches, ...held.mismatches], allowed, fix)];
    },
  };
}

/** Lists tensors of the plan that the checkpoint lacks or has in another size, and parameters of the checkpoint that the plan lacks. */
function tensorDifferences(tensors: CheckpointText["tensors"], plan: Plan, only?: "weights"): { mismatches: Mismatch[]; notes: string[] } {
  const weights = new Set(plan.programs.flatMap(({ parameters }) => parameters.map(({ name }) => name)));
  const state = plan.programs.flatMap(checkpointState).filter(({ name }) => only === undefined || weights.has(name));
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
  const notes =
    states.length > 0 && only === undefined
      ? [`unused optimizer state tensors, which the job's optimizer does not have: ${states.length}`]
      : [];
  return { mismatches: [...wrong, ...surplusMismatches(parameters, plan.job.model)], notes };
}
