/**
 * Checkpoints: a run that goes on from one has the numbers of a run that was never interrupted, on the same mesh to the bit, on any other
 * within rounding; a checkpoint is complete or absent; and one that does not fit is an error.
 */
import { mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, beforeEach, describe, expect, test } from "vitest";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { copyShared, firstHolders, shardRanges, sharedBy, visitRuns } from "../../runtime/shards.ts";
import { trainingSchedule } from "../../runtime/train/stepParameters.ts";
import type { Job } from "../../schemas/job.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { fixture, sameNumbers } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";
import { figures, jobWith, planOf, run } from "../support/savedRuns.ts";
import { noAdapter } from "../support/softwareAdapter.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
});

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
