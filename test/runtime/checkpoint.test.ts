/**
 * Checkpoints: a run that goes on from one has the numbers of a run that was never interrupted, on the same mesh to the bit, on any other
 * within rounding; a checkpoint is complete or absent; and one that does not fit is an error.
 */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import fc from "fast-check";
import { afterAll, beforeEach, describe, expect, test } from "vitest";
import type { RankDevice } from "../../runtime/backend.ts";
import { openCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors, streamSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { chooseCheckpoint, expectWritableFolder } from "../../runtime/checkpoint/saveFolder.ts";
import { CheckpointSaver } from "../../runtime/checkpoint/saver.ts";
import { printCheckpointText, readCheckpointText } from "../../runtime/checkpoint/snapshotFile.ts";
import { copyShared, firstHolders, shardRanges, sharedBy, visitRuns } from "../../runtime/shards.ts";
import type { StepResult } from "../../runtime/train/loop.ts";
import { openRun, type RunSettings } from "../../runtime/train/openRun.ts";
import { trainingSchedule } from "../../runtime/train/stepParameters.ts";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { fixture, jobOf, sameNumbers } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";
import { noAdapter } from "../support/softwareAdapter.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
});

const router = { score: "sigmoid", expert_bias: true, bias_rate: 0.05, balance: "seq_aux_loss", aux_coeff: 0.01 };
const jobWith = (parallel: object, train: object = {}, model: object = {}): Job =>
  jobOf({
    name: "saved",
    model: {
      ...{ layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16, dropout: { hidden: 0.1 } },
      ...{ moe: { experts: 4, top_k: 2, ffn: 16, router }, ...model },
    },
    parallel,
    train: {
      micro_batch: 1,
      global_batch: 16,
      steps: 6,
      precision: "fp32",
      init: { std: 0.2 },
      optimizer: { lr: 5e-3, eps: 1e-6, warmup_steps: 3 },
      ...train,
    },
    data: { path: "corpus.txt", order: "shuffled" },
  });

/** Plans of jobs that were compiled before. */
const plans = new Map<string, Plan>();
function planOf(job: Job): Plan {
  const key = JSON.stringify(job);
  const plan = plans.get(key) ?? compile(job).plan;
  plans.set(key, plan);
  return plan;
}
afterAll(() => plans.clear());

/** Numbers of so many steps, the last of which is saved. */
async function run(job: Job, steps: number, how: Partial<RunSettings> = {}, plan = planOf(job)): Promise<StepResult[]> {
  const opened = await openRun(plan, { baseDir: fixture(""), version: "test", ...how });
  const all: StepResult[] = [];
  for (let i = 0; i < steps; i++) all.push(await opened.step());
  if (how.save) expect(await opened.save()).toBe(join(how.save, `step-${String(all.at(-1)!.step).padStart(8, "0")}`));
  await opened.close();
  return all;
}
const figures = (steps: readonly StepResult[]) => steps.map(({ seconds: _, data_wait_seconds: __, ...numbers }) => numbers);

/** Steps before a resume, and after it. */
const HALF = isFull ? 3 : 2;

const meshes = {
  "one rank": { world: 1 },
  "tensor, expert and pipeline parallel, moments apart": {
    ...{ world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 2, distributed_optimizer: true },
  },
  "context and data parallel, tied over stages": { world: 4, context: 2, pipeline: 2 },
};
const kinds: Readonly<Record<string, object>> = {
  fp32: {},
  bf16: { precision: "bf16" },
  "fp16, of which the first steps overflow": { precision: "fp16", loss_scale: { initial: 2 ** 40, hysteresis: 1, backoff: 2 ** -30 } },
  "momentum, and a batch that grows": {
    optimizer: { type: "sgd", lr: 0.05, momentum: 0.9 },
    batch_rampup: { start: 8, increment: 8, samples: 20 },
  },
  "muon, bf16": { precision: "bf16", optimizer: { type: "muon", lr: 1e-2 } },
};

describe.each(Object.entries(meshes).map(([name, mesh], n) => ({ name, mesh, n })))("on $name", ({ mesh, n }) => {
  // in the fast tier a batch that grows on one rank, bf16 on a mesh
  for (const { options, rows } of byTier(Object.entries(kinds), (_, i) => i === [3, 1][n]))
    test.each(rows)("in %s, a resumed run equals an uninterrupted one, bit for bit", options, async (_, train) => {
      const job = jobWith(mesh, train, { tie_embeddings: true });
      const whole = await run(job, 2 * HALF);
      const [before, after] = [await run(job, HALF, { save: folder }), await run(job, HALF, { resume: folder })];
      expect(figures([...before, ...after])).toEqual(figures(whole));
    });
});

test("an fp16 scale that adapts begins at its initial value where the run before had none, and is never below min", async () => {
  const alone = { world: 1 };
  const small = { layers: 1, hidden: 16, heads: 2, seq: 8, moe: null };
  const scaled = (loss_scale: object) => jobWith(alone, { precision: "fp16", loss_scale }, small);
  const scales = async (job: Job, resume: string) => (await run(job, 1, { resume }))[0]!.loss_scale;
  const before = [
    [{ precision: "fp32" }, 512],
    [{ precision: "bf16" }, 512],
    [{ precision: "fp16", loss_scale: 8 }, 512],
    [{ precision: "fp16", loss_scale: { initial: 4, min: 1 } }, 128],
    [{ precision: "fp16", loss_scale: { initial: 1024, min: 1 } }, 1024],
  ] as const;
  for (const [i, [train, expected]] of before.entries()) {
    const at = join(folder, String(i));
    await run(jobWith(alone, train, small), 1, { save: at });
    expect(await scales(scaled({ initial: 512, min: 128, hysteresis: 2 }), at), JSON.stringify(train)).toBe(expected);
  }
  const { loss_scale } = trainingSchedule(scaled({ initial: 512, hysteresis: 3 }), {
    ...{ steps: 1, read: 16, trained: 16, updates: 1 },
    loss_scale: null,
  }).progress();
  expect(loss_scale).toEqual({ scale: 512, well: 0, patience: 3 });
});

test("on another mesh, and another optimizer's pieces, it has the same numbers", async () => {
  const [alone, many, other] = Object.values(meshes);
  const whole = await run(jobWith(alone!), 2 * HALF);
  await run(jobWith(many!), HALF, { save: folder });
  for (const mesh of isFull ? [alone!, other!, { world: 4, expert: 4, distributed_optimizer: true }] : [other!]) {
    const after = await run(jobWith(mesh), HALF, { resume: folder });
    for (const [i, { step, loss, grad_norm }] of after.entries()) {
      expect(step).toBe(HALF + 1 + i);
      expect(Math.abs(loss - whole[HALF + i]!.loss), `loss of step ${step}`).toBeLessThan(1e-4);
      expect(Math.abs(grad_norm / whole[HALF + i]!.grad_norm - 1), `norm of step ${step}`).toBeLessThan(1e-3);
    }
  }
});

test.skipIf(noAdapter)(`from WebGPU to the CPU and back${noAdapter ? ` (skipped: ${noAdapter})` : ""}`, full, async () => {
  const small = { layers: 1, hidden: 16, ffn: 16, heads: 2, kv_heads: 2, moe: null };
  const job = jobWith({ world: 2, pipeline: 1, distributed_optimizer: true }, {}, small);
  const whole = await run(job, 6);
  const { plan, sources } = compile(job, { target: await loadTarget("webgpu:baseline") });
  const there = { backend: "webgpu" as const, source: (file: string) => sources.get(file)! };
  const all = [
    ...(await run(job, 2, { save: folder, ...there }, plan)),
    ...(await run(job, 2, { resume: folder, save: folder })),
    ...(await run(job, 2, { resume: folder, ...there }, plan)),
  ];
  expect(all.map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6]);
  for (const [i, { loss }] of all.entries()) expect(Math.abs(loss - whole[i]!.loss), `loss of step ${i + 1}`).toBeLessThan(1e-4);
});

test("shards of a tensor are assembled from any other sharding", () => {
  const sizes = [6, 4, 12];
  const subAxes = fc.shuffledSubarray([0, 1, 2]);
  const mesh = buildMesh(jobWith({ world: 8, tensor: 2, sequence: true, context: 2 }));
  expect(mesh.subAxes.map((f) => f.size)).toEqual([2, 2, 2]);
  const cutBy = fc
    .tuple(subAxes, fc.nat(2))
    .map(([fs, dim]) => sizes.map((_, i) => (i === dim && sizes[i]! % 2 ** fs.length === 0 ? fs : [])));
  const whole = Float32Array.from({ length: elementsOf(sizes) }, (_, i) => i);
  const pieceFor = (shardedBy: number[][], n: number) => {
    const ranges = shardRanges(mesh, { sizes, shardedBy }, n);
    const data: number[] = [];
    visitRuns(sizes, ranges, (from, at, length) => {
      for (let i = 0; i < length; i++) data[at + i] = whole[from + i]!;
    });
    return { ranges, data: Float32Array.from(data) };
  };
  fc.assert(
    fc.property(cutBy, cutBy, fc.nat(7), (saved, asked, rank) => {
      const want = pieceFor(asked, rank);
      const out = new Float32Array(want.data.length).fill(-1);
      for (const n of firstHolders(mesh, { shardedBy: saved })) {
        const { ranges, data } = pieceFor(saved, n);
        const shared = sharedBy(ranges, want.ranges);
        if (shared) copyShared(shared, [ranges, data], [want.ranges, out]);
      }
      expect(sameNumbers(out, want.data)).toBe(true);
    }),
    { numRuns: 200 },
  );
});

test("each shard is saved once, by the first rank that holds it", async () => {
  const plan = planOf(jobWith(meshes["tensor, expert and pipeline parallel, moments apart"]));
  await run(jobWith(meshes["tensor, expert and pipeline parallel, moments apart"]), 1, { save: folder });
  const at = join(folder, "step-00000001");
  const files = readdirSync(at).filter((f) => f.startsWith("rank-"));
  expect(files.length).toBe(plan.mesh.world);
  const elements = files.reduce((sum, name) => {
    const file = openSafetensors(join(at, name));
    const own = file.names.reduce((n, t) => n + elementsOf(file.info(t).shape), 0);
    file.close();
    return sum + own;
  }, 0);
  // parameters, and two moments of all but the router's biases
  const sizes = plan.programs.flatMap((p) =>
    p.parameters.map((q) => [q.rule, elementsOf(p.buffers.find((b) => b.id === q.buffer)!.sizes)] as const),
  );
  expect(elements).toBe(sizes.reduce((n, [rule, size]) => n + (rule === "adamw" ? 3 : 1) * size, 0));
});

describe("faults", () => {
  const job = jobWith({ world: 1 });
  const said = async (how: { save?: string; resume?: string }, of = job): Promise<string> =>
    openRun(planOf(of), { baseDir: fixture(""), ...how }).then(
      async (opened) => {
        await opened.close();
        return "nothing";
      },
      (error: Error) => error.message.replaceAll(place, "DIR").replaceAll(/DIR\/\d+/g, "DIR"),
    );

  test("is reported with a fix", async () => {
    await run(job, 2, { save: folder });
    const step = join(folder, "step-00000002");
    const wider = jobWith({ world: 1 }, {}, { ffn: 64, moe: null });
    expect(await said({ resume: join(folder, "no") })).toBe("DIR/no contains no checkpoint");
    expect(await said({ resume: folder }, wider)).toMatch(
      /does not fit the job in \d+ places\n {2}model\.ffn is without effect in the checkpoint, 64 in the job\n.* layers\.0\.w1 is \[4, 32, 16\]; the plan's is \[32, 64\]/s,
    );
    expect(await said({ resume: folder }, jobWith({ world: 1 }, { optimizer: { type: "sgd", lr: 1e-2, momentum: 0.9 } }))).toContain(
      "was saved with train.optimizer.type adamw, and the job has sgd",
    );
    expect(await said({ save: folder })).toBe("DIR contains a checkpoint of step 2, and this run begins after step 0");
    expect(await said({ save: folder, resume: folder })).toBe("nothing");
    truncateSync(join(step, "rank-00000.safetensors"), 1000);
    expect(await said({ resume: folder })).toContain("it was cut");
  });

  test("every key of the model that changes numbers, and every tensor without use", full, async () => {
    const router = { score: "sigmoid", groups: 2, group_top_k: 1, group_scores: 1, aux_coeff: 0.01 };
    const moe = { experts: 4, top_k: 2, ffn: 16, router, shared: { ffn: 16 } };
    const small = { layers: 2, hidden: 16, heads: 4, kv_heads: 2, seq: 8, qkv_bias: true, qk_norm: "head", moe, mtp: { layers: 1 } };
    const of = (model: object) => jobWith({ world: 1 }, {}, { ...small, ...model });
    const moeOf = (change: object, routerChange: object = {}) => ({ moe: { ...moe, ...change, router: { ...router, ...routerChange } } });
    await run(of({}), 1, { save: folder });
    const { expectFor } = openCheckpoint(chooseCheckpoint(folder).at);
    const judged = (model: object, allowed: readonly string[] = []): string => {
      try {
        return `notes: ${expectFor(compile(of(model)).plan, allowed).join("; ")}`;
      } catch (error) {
        return (error as Error).message;
      }
    };
    expect(judged({})).toBe("notes: ");
    const refused: readonly [object, string, string?][] = [
      [{ tie_embeddings: true }, "model.tie_embeddings is false in the checkpoint, true in the job"],
      [{ tie_embeddings: true }, "head is there, and the job has no such part (check model.tie_embeddings)"],
      [{ layers: 1 }, "layers.1 (18 tensors) is there, and the job has no such part (check model.layers)"],
      [moeOf({ shared: null }), "layers.0.shared.w1 is there, and the job has no such part (check model.moe.shared)"],
      [{ qkv_bias: false }, "layers.0.bq is there"],
      [{ heads: 2, kv_heads: 1, head_dim: 8, qk_norm: "none" }, "model.heads is 4 in the checkpoint, 2 in the job"],
      [{ rope: { theta: 5e5 } }, "model.rope.theta is 10000 in the checkpoint, 500000 in the job"],
      [{ rope: { scaling: { type: "linear", factor: 2 } } }, "model.rope.scaling is null in the checkpoint"],
      [{ norm: { eps: 1e-6 } }, "model.norm.eps is 0.00001 in the checkpoint, 0.000001 in the job"],
      [moeOf({}, { score: "softmax" }), 'model.moe.router.score is "sigmoid" in the checkpoint, "softmax" in the job'],
      [moeOf({}, { scaling: 2 }), "model.moe.router.scaling is 1 in the checkpoint, 2 in the job"],
      [moeOf({}, { groups: 1, group_top_k: 1 }), "model.moe.router.groups is 2 in the checkpoint, 1 in the job"],
      [moeOf({ top_k: 1 }, { normalize_top_k: false }), "model.moe.top_k is 2 in the checkpoint, 1 in the job"],
      [
        moeOf({}, { balance: "sinkhorn", aux_coeff: 0, groups: 1, score: "softmax", normalize_top_k: false, group_top_k: 1 }),
        "model.moe.router.balance",
      ],
    ];
    for (const [model, found] of isFull ? refused : refused.filter((_, i) => i % 4 === 0)) {
      expect.soft(judged(model)).toContain(found);
      expect.soft(judged(model)).toContain("does not fit the job");
    }
    const allowed: readonly [object, readonly string[], string][] = [
      [
        { tie_embeddings: true },
        ["model.tie_embeddings"],
        "notes: allowed: model.tie_embeddings is false in the checkpoint, true in the job, and 1 more of model.tie_embeddings",
      ],
      [{ rope: { theta: 5e5 } }, ["rope"], "notes: allowed: model.rope.theta is 10000 in the checkpoint, 500000 in the job"],
      [{ dropout: { hidden: 0.2 } }, [], "notes: model.dropout.hidden is 0.1 in the checkpoint, 0.2 in the job"],
      [{ seq: 16 }, [], "notes: model.seq is 8 in the checkpoint, 16 in the job"],
      [moeOf({ rows_bound: 2 }), [], 'notes: model.moe.rows_bound is "worst" in the checkpoint, 2 in the job'],
      [
        moeOf({}, { aux_coeff: 0.1, jitter: 0.01 }),
        [],
        "notes: model.moe.router.jitter is null in the checkpoint, 0.01 in the job; model.moe.router.aux_coeff is 0.01 in the checkpoint, 0.1 in the job",
      ],
      [{ mtp: null }, [], 'notes: model.mtp is {"layers":1,"coeff":0.1} in the checkpoint, null in the job'],
    ];
    for (const [model, keys, found] of isFull ? allowed : allowed.slice(0, 2)) expect.soft(judged(model, keys)).toBe(found);
    // weights that the checkpoint has not cannot be allowed
    expect(judged({ out_bias: true }, ["model.out_bias", "model"])).toContain("layers.0.bo is missing");
    expect(await said({ resume: folder }, of({ rope: { theta: 5e5 } }))).toContain("model.rope.theta");
    const opened = await openRun(compile(of({ rope: { theta: 5e5 } })).plan, {
      baseDir: fixture(""),
      resume: folder,
      allowMismatch: ["model.rope.theta"],
    });
    expect(opened.notes).toEqual(["allowed: model.rope.theta is 10000 in the checkpoint, 500000 in the job"]);
    await opened.close();
  });

  test("a changed file is refused: its bytes, its step, its description", async () => {
    await run(job, 1, { save: folder });
    await run(job, 1, { save: folder, resume: folder });
    const [step, earlier] = [join(folder, "step-00000002"), join(folder, "step-00000001")];
    const [text, tensors] = [join(step, "snapshot.json"), join(step, "rank-00000.safetensors")];
    const [saved, bytes] = [readFileSync(text, "utf8"), readFileSync(tensors)];
    const found = async (path: string, content: string | Uint8Array): Promise<string> => {
      writeFileSync(path, content);
      const message = await said({ resume: folder });
      writeFileSync(text, saved);
      writeFileSync(tensors, bytes);
      return message;
    };
    const flipped = Uint8Array.from(bytes, (byte, i) => (i === bytes.length - 3 ? byte ^ 0x40 : byte));
    // another digest of the same length, in the header
    const resealed = Buffer.from(
      bytes.toString("latin1").replace(/"sha256\/norm":"[0-9a-f]{64}/, `"sha256/norm":"${"0".repeat(64)}`),
      "latin1",
    );
    expect(await found(tensors, flipped)).toMatch(/^DIR\/step-00000002\/rank-00000.safetensors: the SHA-256 of tensor \S+ differs/);
    expect(await found(tensors, resealed)).toContain("rank-00000.safetensors is not the file that was saved");
    expect(await found(tensors, readFileSync(join(earlier, "rank-00000.safetensors")))).toBe(
      "DIR/step-00000002/rank-00000.safetensors is of step 1, but the checkpoint is of step 2",
    );
    expect(await found(text, saved.replace('"read":32', '"read":33'))).toContain("snapshot.json was changed after it was saved");
    expect(await found(text, saved.replace('"format":2', '"format":1'))).toBe(
      "DIR/step-00000002/snapshot.json has checkpoint format 1, and this version of rankc reads format 2",
    );
    expect(await found(text, saved.slice(0, 100))).toContain("snapshot.json is not JSON");
    expect(await said({ resume: folder })).toBe("nothing");
  });

  test("weights that are not finite are neither saved nor resumed nor exported", async () => {
    const plan = planOf(job);
    const progress = { steps: 1, read: 16, trained: 16, updates: 1, loss_scale: null };
    const saveNow = (value: number) => {
      const read = async ({ shape }: { shape: readonly number[] }) => new Float32Array(elementsOf(shape)).fill(value);
      const localRanks = { ranks: [0], rankDevice: () => ({ read }) as unknown as RankDevice };
      return new CheckpointSaver({ plan, folder, version: "test", localRanks })
        .begin(progress)
        .then(async ({ done }) => (await done).folder);
    };
    mkdirSync(folder);
    await expect(saveNow(Number.NaN)).rejects.toThrow(/no checkpoint of step 1: embed holds 8192 of 8192 values that are NaN or infinite/);
    expect(readdirSync(folder)).toEqual([]);
    const at = await saveNow(1);
    const [text, tensors] = [join(at, "snapshot.json"), join(at, "rank-00000.safetensors")];
    const file = openSafetensors(tensors);
    const values = (name: string) => (name === "norm" ? file.read(name).fill(Number.POSITIVE_INFINITY, 3, 5) : file.read(name));
    await streamSafetensors(
      tensors,
      file.names.map((name) => ({ name, dtype: "F32", shape: file.info(name).shape, data: async () => values(name) })),
      { step: "1" },
    );
    const header_sha256 = openSafetensors(tensors).headerDigest;
    const { format: _, ...saved } = readCheckpointText(text);
    writeFileSync(text, printCheckpointText({ ...saved, files: { "rank-00000.safetensors": { step: 1, header_sha256 } } }));
    const why = "rank-00000.safetensors: norm holds 2 of 32 values that are NaN or infinite";
    expect(await said({ resume: folder })).toContain(why);
    const { model, whole } = openCheckpoint(at);
    expect(() => toHuggingFace(model(), { get: whole })).toThrow(why);
  });

  test("a newest folder without a description is not skipped: name it, or use --resume auto", async () => {
    await run(job, 1, { save: folder });
    await run(job, 1, { save: folder, resume: folder });
    rmSync(join(folder, "step-00000002", "snapshot.json"));
    expect(await said({ resume: folder })).toBe(
      "DIR: step-00000002 is incomplete: it has no snapshot.json; the newest complete one is step-00000001, and a resume from it repeats the steps between",
    );
    expect(await said({ resume: join(folder, "step-00000001") })).toBe("nothing");
    expect(await said({ resume: "auto" })).toBe("--resume auto needs --save");
    const plan = planOf(job);
    const opened = await openRun(plan, { baseDir: fixture(""), save: folder, resume: "auto" });
    expect(opened.progress().steps).toBe(1);
    expect(opened.notes).toEqual([
      `${join(folder, "step-00000002")} is unfinished and not used`,
      `resumed from ${join(folder, "step-00000001")}`,
    ]);
    await opened.close();
    const fresh = await openRun(plan, { baseDir: fixture(""), save: `${folder}-fresh`, resume: "auto" });
    expect([fresh.progress().steps, fresh.notes]).toEqual([
      0,
      [`${folder}-fresh contains no complete checkpoint: the run starts at step 0`],
    ]);
    await fresh.close();
  });

  test("one run saves into a folder: a second is refused until the first or its process has ended", async () => {
    const first = await openRun(planOf(job), { baseDir: fixture(""), save: folder });
    expect(await said({ save: folder })).toContain(`DIR: another run saves there: process ${process.pid} on `);
    await first.close();
    expect(await said({ save: folder })).toBe("nothing");
    const lock = join(folder, "run.lock");
    const of = (owner: object) => JSON.stringify({ id: "another", host: hostname(), pid: process.pid, since: "then", ...owner });
    for (const [owner, found] of [
      [{}, "nothing"],
      [{ pid: 2 ** 30 }, "nothing"],
      [{ pid: process.ppid }, "DIR: another run saves there"],
      [{ host: "elsewhere" }, "DIR: another run saves there: process"],
    ] as const) {
      writeFileSync(lock, of(owner));
      expect(await said({ save: folder }), JSON.stringify(owner)).toContain(found);
    }
    const old = new Date(Date.now() - 3_600_000);
    utimesSync(lock, old, old);
    expect(await said({ save: folder })).toBe("nothing");
    const robbed = await openRun(planOf(job), { baseDir: fixture(""), save: folder });
    await robbed.step();
    writeFileSync(lock, of({ host: "elsewhere" }));
    await expect(robbed.save()).rejects.toThrow("another run saves there");
    rmSync(lock);
    expect(await robbed.save()).toBe(join(folder, "step-00000001"));
    await robbed.close();
    expect(readdirSync(folder)).toEqual(["step-00000001"]);
  });

  test.each([
    ["a file", "file", "a part of the path is a file (ENOTDIR)"],
    ["a place below a file", "file/below", "a part of the path is a file (ENOTDIR)"],
    ["a place where nothing can be made", "/proc/rankc", "the folder does not exist (ENOENT)"],
  ])("%s is not a folder to save to, which is reported before the run", async (_, name, code) => {
    writeFileSync(join(place, "file"), "");
    expect(await said({ save: resolve(place, name) })).toContain(code);
    expect(() => expectWritableFolder(resolve(place, name))).toThrow(code);
  });

  test("an incomplete checkpoint is not used, and is written again", async () => {
    await run(job, 1, { save: folder });
    mkdirSync(join(folder, "step-00000002.part"));
    writeFileSync(join(folder, "step-00000002.part", "left"), "");
    const { at, notes } = chooseCheckpoint(folder);
    expect(openCheckpoint(at).progress.steps).toBe(1);
    expect(notes).toEqual([`${join(folder, "step-00000002.part")} is unfinished and not used`]);
    const all = await run(job, 1, { save: folder, resume: folder });
    expect(all[0]!.step).toBe(2);
    expect(readdirSync(folder).sort()).toEqual(["step-00000001", "step-00000002"]);
    expect(existsSync(join(folder, "step-00000002", "left"))).toBe(false);
  });
});

test("the command line saves, resumes and exports; a metrics file is appended to", async () => {
  const path = join(place, "job.yaml");
  writeFileSync(join(place, "corpus.txt"), readFileSync(fixture("corpus.txt")));
  writeFileSync(
    path,
    `name: saved
model: {layers: 1, hidden: 16, heads: 2, vocab: 256, seq: 8, moe: {experts: 2, top_k: 1, ffn: 8, router: {normalize_top_k: false, aux_coeff: 0.01}}}
parallel: {world: 2, expert: 2}
train: {global_batch: 2, steps: 4, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`,
  );
  const [all, metrics] = [join(place, "all.jsonl"), join(place, "metrics.jsonl")];
  expect((await rankc("run", path, "--metrics", all)).exit).toBe(0);
  const first = await rankc("run", path, "--steps", "2", "--save", folder, "--save-every", "1", "--metrics", metrics, "--format", "json");
  expect(JSON.parse(first.out)).toMatchObject({ steps: 2, saved: join(folder, "step-00000002") });
  expect(readdirSync(folder).sort()).toEqual(["step-00000001", "step-00000002"]);
  const second = await rankc("run", path, "--resume", folder, "--metrics", metrics, "--set", "parallel={world: 1, expert: 1}");
  expect(second.exit, second.err).toBe(0);
  const losses = (file: string) =>
    readFileSync(file, "utf8")
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line))
      .map(({ step, loss }) => [step, loss.toFixed(4)]);
  expect(losses(metrics)).toEqual(losses(all));

  const model = join(place, "model.safetensors");
  const exported = await rankc("export", "hf", folder, "-o", model);
  expect(exported.out).toMatch(/model\.safetensors: \d+ tensors of .*step-00000002, after step 2/);
  renameSync(join(folder, "step-00000001"), join(place, "moved"));
  const again = await rankc("run", path, "--init-from", model, "--steps", "1");
  expect(again.exit, again.err).toBe(0);

  const done = await rankc("run", path, "--resume", folder, "--steps", "2");
  expect([done.exit, done.err]).toEqual([2, expect.stringContaining("is of step 2, and the run ends at step 2")]);
  expect((await rankc("run", path, "--save-every", "2")).err).toContain("--save checkpoints/");
  expect((await rankc("run", path, "--resume", folder, "--init-from", model)).err).toContain("omit one of them");
  expect((await rankc("export", "hf", join(place, "nowhere"), "-o", model)).err).toContain("contains no checkpoint");
});
