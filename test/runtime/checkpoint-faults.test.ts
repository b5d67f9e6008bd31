/** Checkpoints that do not fit the job, are damaged or incomplete, and folders that cannot be saved to: each is reported with a fix. */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterAll, beforeEach, describe, expect, test } from "vitest";
import type { RankDevice } from "../../runtime/backend.ts";
import { openCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors, streamSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { chooseCheckpoint, expectWritableFolder } from "../../runtime/checkpoint/saveFolder.ts";
import { CheckpointSaver } from "../../runtime/checkpoint/saver.ts";
import { printCheckpointText, readCheckpointText } from "../../runtime/checkpoint/snapshotFile.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { fixture } from "../support/job.ts";
import { jobWith, planOf, run } from "../support/savedRuns.ts";
import { full, isFull } from "../support/tiers.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
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

  test("a resumed run states the keys of train that round differently", async () => {
    await run(jobWith({ world: 1 }, { precision: "fp32" }), 1, { save: folder });
    const { expectFor } = openCheckpoint(chooseCheckpoint(folder).at);
    const notesFor = (train: object): readonly string[] => expectFor(compile(jobWith({ world: 1 }, train)).plan, []);
    expect(notesFor({ precision: "fp32" })).toEqual([]);
    expect(notesFor({ precision: "fp32", matmul: "tf32" })).toEqual(['train.matmul is "f32" in the checkpoint, "tf32" in the job']);
    expect(notesFor({ precision: "bf16", gradients: "bf16" })).toEqual([
      'train.precision is "fp32" in the checkpoint, "bf16" in the job',
      'train.gradients is "f32" in the checkpoint, "bf16" in the job',
    ]);
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
