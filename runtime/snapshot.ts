/**
 * Snapshots: all that a run remembers between two steps, in a folder for each: `step-00000020/` holds snapshot.json (how far the
 * run was, its job and mesh, and how each tensor is cut) and a safetensors file for each rank that has pieces no rank before it has.
 * A run goes on from one on any mesh and backend: pieces are put together anew. A folder is there whole, or under another name.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { Job } from "../schemas/job.ts";
import { rankAt } from "../schemas/layout.ts";
import { type Buffer, MeshText, type Plan } from "../schemas/plan.ts";
import { Trouble } from "../schemas/trouble.ts";
import { summary } from "./checkpoint.ts";
import type { Milestone } from "./course.ts";
import { ranksText } from "./launch/rankList.ts";
import { copyShared, firstHolders, type Ranges, rangesIn, sharedBy } from "./pieces.ts";
import { rememberedBy } from "./remembered.ts";
import { type LateEntry, openSafetensors, type Safetensors, streamSafetensors } from "./safetensors.ts";

const count = z.int().nonnegative();
const MilestoneText = z.strictObject({
  ...{ steps: count, read: count, trained: count, updates: count },
  loss_scale: z.strictObject({ scale: z.number(), well: count, patience: z.int() }),
});
const Tensor = z.strictObject({ stage: count, sizes: z.array(count), cuts: z.array(z.array(count)) });
const SnapshotText = z.strictObject({
  format: z.literal(1),
  rankc: z.string(),
  milestone: MilestoneText.describe("how far the run was"),
  job: z.looseObject({ model: z.looseObject({}), train: z.looseObject({ optimizer: z.looseObject({ type: z.string() }) }) }),
  mesh: MeshText,
  tensors: z.record(z.string(), Tensor).describe("by name: the stage it is on, its whole sizes, and per dim the factors that cut it"),
});
type SnapshotText = z.infer<typeof SnapshotText>;

const folderOf = (step: number): string => `step-${String(step).padStart(8, "0")}`;
const fileOf = (rank: number): string => `rank-${String(rank).padStart(5, "0")}.safetensors`;
const TEXT = "snapshot.json";

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

/** Before a run: makes the folder, and refuses one whose snapshots the run would stand beside as if they were its own. */
export function expectRoom(folder: string, done: number): void {
  try {
    mkdirSync(folder, { recursive: true });
  } catch (error) {
    throw new Trouble(
      `${folder}: cannot be made (${(error as NodeJS.ErrnoException).code})`,
      "name a folder you can write to after --save",
    );
  }
  const later = stepsIn(folder).filter((step) => step > done);
  if (later.length > 0)
    throw new Trouble(
      `${folder} holds a snapshot of step ${later.at(-1)}, and this run begins after step ${done}`,
      "go on from it with --resume, or name another folder after --save",
    );
}

/** Writes a snapshot; answers with its folder. All processes of a run call it between the same two steps. */
export async function saveSnapshot({ plan, folder, version, ranks, meet, read }: Saving, milestone: Milestone): Promise<string> {
  const { mesh } = plan;
  const whole = join(folder, folderOf(milestone.steps));
  const part = `${whole}.part`;
  const leads = ranks.includes(0);
  if (leads) rmSync(part, { recursive: true, force: true });
  await meet(`${part} is to be written`);
  const tensors: SnapshotText["tensors"] = {};
  const files = new Map<number, LateEntry[]>();
  for (const program of plan.programs)
    for (const { name, buffer } of rememberedBy(program)) {
      if (name in tensors) throw new Error(`${name} is remembered twice`);
      tensors[name] = { stage: program.stage, sizes: buffer.sizes, cuts: buffer.cuts };
      for (const n of firstHolders(mesh, buffer)) {
        const rank = rankAt(mesh, program.stage, n);
        const own = files.get(rank) ?? [];
        files.set(rank, own);
        own.push({ name, dtype: "F32", shape: buffer.shape, data: () => read(rank, buffer) });
      }
    }
  mkdirSync(part, { recursive: true });
  for (const rank of ranks) {
    const entries = files.get(rank);
    if (entries) await streamSafetensors(join(part, fileOf(rank)), entries);
  }
  await meet(`${part} is written`);
  if (!leads) return whole;
  const missing = [...files.keys()].filter((rank) => !existsSync(join(part, fileOf(rank))));
  if (missing.length > 0)
    throw new Trouble(`${part}: the files of ${ranksText(missing)} are not there`, "name a folder after --save that all hosts share");
  const text: SnapshotText = { format: 1, rankc: version, milestone, job: plan.job, mesh, tensors };
  writeFileSync(join(part, TEXT), `${JSON.stringify(text)}\n`);
  rmSync(whole, { recursive: true, force: true });
  renameSync(part, whole);
  return whole;
}

export interface Snapshot {
  readonly folder: string;
  readonly milestone: Milestone;
  /** Throws a Trouble that names all of what the plan remembers and this does not hold, or holds in another size. */
  expectFor(plan: Plan): void;
  /** A rank's piece of a tensor, from the pieces that were saved. */
  piece(name: string, ranges: Ranges): Float32Array;
  /** A whole tensor; undefined where there is none of this name. */
  whole(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined;
  /** The model that was trained. */
  model(): Job["model"];
  close(): void;
}

/** `folder`: a snapshot, or the folder of a run's snapshots, of which it is the last. */
export function openSnapshot(folder: string): Snapshot {
  const at = existsSync(join(folder, TEXT)) ? folder : lastIn(folder);
  const { milestone, rankc, job, mesh, tensors } = readText(join(at, TEXT));
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
    const file = openSafetensors(join(at, fileOf(rank)));
    open.set(rank, file);
    return file;
  }
  function tensor(name: string) {
    const found = tensors[name];
    if (!found) throw new Error(`${at} holds no ${name}`);
    return found;
  }
  function piece(name: string, ranges: Ranges): Float32Array {
    const saved = tensor(name);
    const out = new Float32Array(ranges.reduce((n, dim) => n * dim.reduce((m, [from, to]) => m + to - from, 0), 1));
    for (const n of firstHolders(mesh, saved)) {
      const theirs = rangesIn(mesh, saved, n);
      const shared = sharedBy(theirs, ranges);
      if (!shared) continue;
      const values = fileAt(rankAt(mesh, saved.stage, n)).read(name);
      copyShared(shared, [theirs, values], [ranges, out]);
    }
    return out;
  }
  return {
    ...{ folder: at, milestone, piece, close },
    whole(name) {
      const sizes = tensors[name]?.sizes;
      const all = sizes?.map((n) => [[0, n] as const]);
      return sizes && all && { shape: sizes, data: piece(name, all) };
    },
    model() {
      const parsed = Job.shape.model.safeParse(job.model);
      if (parsed.success) return parsed.data;
      const [issue] = parsed.error.issues;
      throw new Trouble(`${at}: model.${issue!.path.join(".")}: ${issue!.message}`, `take it with the rankc that saved it, ${rankc}`);
    },
    expectFor(plan) {
      // what adam keeps is what adamw does; another optimizer's moments may have the same names, and are others
      const [saved, asked] = [job.train.optimizer.type, plan.job.train.optimizer.type].map((type) => type.replace("adamw", "adam"));
      if (saved !== asked)
        throw new Trouble(
          `${at} was saved by ${job.train.optimizer.type}, and the job's train.optimizer.type is ${plan.job.train.optimizer.type}`,
          "resume with that one, or begin anew from its weights: rankc export hf, then --init-from",
        );
      const problems = plan.programs.flatMap(rememberedBy).flatMap(({ name, buffer: { sizes } }) => {
        const found = tensors[name]?.sizes;
        if (`${found}` === `${sizes}`) return [];
        return [found ? `${name} is [${found.join(", ")}]; the plan's is [${sizes.join(", ")}]` : `${name} is not there`];
      });
      if (problems.length === 0) return;
      throw new Trouble(summary(at, problems), "resume with the model and the optimizer that it was saved with; the mesh may be another");
    },
  };
}

const stepsIn = (folder: string): number[] =>
  readdirSync(folder)
    .flatMap((name) => (/^step-\d+$/.test(name) && existsSync(join(folder, name, TEXT)) ? [Number(name.slice(5))] : []))
    .sort((a, b) => a - b);

function lastIn(folder: string): string {
  const there = statSync(folder, { throwIfNoEntry: false })?.isDirectory() ? stepsIn(folder) : [];
  const last = there.at(-1);
  if (last === undefined) throw new Trouble(`${folder} holds no snapshot`, "name a folder that `rankc run --save` wrote to");
  return join(folder, folderOf(last));
}

function readText(path: string): SnapshotText {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    const what = error instanceof SyntaxError ? "is not JSON" : `cannot be read (${(error as NodeJS.ErrnoException).code})`;
    throw new Trouble(`${path} ${what}`, "take another snapshot of the run");
  }
  const { success, data, error } = SnapshotText.safeParse(value);
  if (success) return data;
  const [issue] = error.issues;
  throw new Trouble(
    `${path}: ${issue!.path.join(".") || "the file"}: ${issue!.message}`,
    "take another snapshot of the run, or this rankc's version of it",
  );
}
