/** Multi-token prediction: what the host makes for it, its losses by plain loops, its gradients by slopes, where it stands in a plan. */
import { afterAll, describe, expect, test } from "vitest";
import { IGNORED } from "../../runtime/data/tokens.ts";
import { shiftLeft } from "../../runtime/train/tokenWeights.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { printInspect } from "../../src/report/inspectText.ts";
import { fixture, jobOf } from "../support/job.ts";
import { labelsBeside } from "../support/labels.ts";
import { plainLosses } from "../support/plainModel.ts";
import { firstStep, slopeErrors } from "../support/slopes.ts";
import { byTier } from "../support/tiers.ts";

const N = IGNORED;
const some = labelsBeside(fixture("corpus.txt"));
afterAll(some.remove);

const experts = { experts: 4, top_k: 2, ffn: 8, router: { score: "sigmoid", normalize_top_k: false, aux_coeff: 0.5, z_coeff: 0.1 } };
const shape = { layers: 2, hidden: 16, ffn: 24, heads: 4, kv_heads: 2, head_dim: 4, vocab: 256, seq: 8, mtp: { layers: 2, coeff: 0.3 } };
const jobWith = (model: object = {}, parallel: object = {}, train: object = {}, data: object = {}): Job =>
  jobOf({
    name: "ahead",
    model: { ...shape, ...model },
    parallel,
    train: { ...{ micro_batch: 1, global_batch: 4, steps: 1, precision: "fp32", init: { std: 0.2 } }, optimizer: { lr: 1e-2 }, ...train },
    data: { path: "corpus.txt", order: "shuffled", ...data },
  });

describe("inputs made on the host", () => {
  test("no depth reads beyond its sequence", () => {
    const whole = Int32Array.of(1, 2, 3, 4, 5, 6, 7, 8);
    expect([...shiftLeft(whole, 4, 1, 0)]).toEqual([2, 3, 4, 0, 6, 7, 8, 0]);
    expect([...shiftLeft(whole, 4, 3, N)]).toEqual([4, N, N, N, 8, N, N, N]);
  });
  test("depth k has k labels less in each sequence, and the depths together weigh as one loss", async () => {
    const { given } = await firstStep(jobWith());
    const { ids, labels, ids_1, labels_2, weights_1, weights_2 } = given as typeof given & Record<string, Float32Array>;
    const row = (x: ArrayLike<number>) => Array.from(x).slice(8, 16);
    expect(row(ids_1!)).toEqual([...row(ids).slice(1), 0]);
    expect(row(labels_2!)).toEqual([...row(labels).slice(2), N, N]);
    expect(row(weights_1!)).toEqual([...Array(7).fill(Math.fround(1 / 56)), 0]);
    expect(row(weights_2!)).toEqual([...Array(6).fill(Math.fround(1 / 48)), 0, 0]);
  });
  test("an ignored label is ignored at every depth, at the token that would predict it", async () => {
    for (const loss_weighting of ["microbatch", "token"]) {
      const { given } = await firstStep(jobWith({}, {}, { micro_batch: 2, loss_weighting }, { labels: some.path }));
      const { labels, labels_1, weights_1 } = given as typeof given & Record<string, Float32Array>;
      for (let t = 0; t < 32; t++) {
        expect(labels_1![t]).toBe(t % 8 === 7 ? N : labels[t + 1]);
        expect(weights_1![t]! > 0).toBe(labels_1![t] !== N);
      }
      const labelled = [0, 16].map((from) => labels_1!.subarray(from, from + 16).filter((l) => l !== N).length);
      expect(labelled[0]).not.toBe(labelled[1]);
      const all = labelled[0]! + labelled[1]!;
      // half of the loss is this depth's
      const want = labelled.map((n) => (loss_weighting === "token" ? n / all / 2 : n > 0 ? 1 / 4 : 0));
      for (const m of [0, 1]) expect(weights_1!.subarray(16 * m, 16 * m + 16).reduce((a, b) => a + b)).toBeCloseTo(want[m]!, 6);
    }
  });
});

describe("by plain loops", () => {
  test.each([
    ["a head of its own", {}],
    ["the embedding as the head", { tie_embeddings: true }],
    ["geglu", { activation: "geglu" }],
    ["gelu without a gate", { activation: "gelu" }],
  ])("%s", async (_, model) => {
    const job = jobWith(model);
    const { metrics, weights, given } = await firstStep(job);
    const rows = Array.from({ length: 4 }, (_, r) => [...given.ids.subarray(8 * r, 8 * r + 8), given.labels[8 * r + 7]!]);
    const { loss, depths } = plainLosses(job, weights, rows);
    expect(metrics.loss).toBeCloseTo(loss, 5);
    expect(depths.length).toBe(2);
    expect(metrics.mtp_loss).toBeCloseTo((depths[0]! + depths[1]!) / 2, 5);
    expect(metrics.mtp_losses).toEqual(depths.map((loss) => expect.closeTo(loss, 5)));
  });
});

describe("gradients are slopes of loss + coeff x mtp_loss + balancing loss", () => {
  const cases: Readonly<Record<string, Job>> = {
    dense: jobWith(),
    "dense, tied": jobWith({ tie_embeddings: true, layers: 1 }),
    "experts, some labels": jobWith({ layers: 1, moe: experts, mtp: { layers: 1, coeff: 0.5 } }, {}, {}, { labels: some.path }),
    "experts, some labels, all alike": jobWith(
      { layers: 1, moe: experts, mtp: { layers: 1, coeff: 0.5 } },
      {},
      { loss_weighting: "token" },
      { labels: some.path },
    ),
  };
  for (const { options, rows } of byTier(Object.entries(cases), ([name]) => name === "experts, some labels"))
    test.each(rows)("%s", options, async (_, job) => {
      const { coeff } = job.model.mtp!;
      const errors = await slopeErrors(job, ({ loss, mtp_loss, aux_loss }) => loss + coeff * mtp_loss! + aux_loss);
      expect([...errors.keys()].filter((name) => name.startsWith("mtp.")).length).toBeGreaterThan(10);
      for (const [name, error] of errors) expect(error, name).toBeLessThan(2e-3);
    });
});

test("layers of the kind of the last one: experts where the model ends in experts", () => {
  const names = (moe: object) =>
    compile(jobWith({ moe: { ...experts, ...moe } })).plan.programs[0]!.parameters.flatMap(({ name }) =>
      name.startsWith("mtp.0.") ? [name.replace("mtp.0.", "")] : [],
    );
  const own = ["enorm", "hnorm", "proj", "norm1", "wq", "wk", "wv", "wo", "norm2"];
  expect(names({ layers: [0, 1] })).toEqual([...own, "router", "w1", "w3", "w2", "norm"]);
  expect(names({ layers: [1, 0] })).toEqual([...own, "w1", "w3", "w2", "norm"]);
});

test("it is in the last stage with a copy of the embedding, or where a layout places it, with the head elsewhere", () => {
  const on = (layout: string | null, model: object = {}) => {
    const { plan } = compile(jobWith({ layers: 4, ...model }, { world: 4, pipeline: 4, layout }));
    const all = inspectPlan(plan);
    const embeddings = plan.programs.flatMap((p) => p.parameters.flatMap((q) => (q.name === "embed" ? [p.stage] : [])));
    return {
      roles: printInspect(all)
        .match(/^ +stages? .*?(?= {2,}\d)/gm)!
        .map((s) => s.trim().replace(/ +/g, " ")),
      embeddings,
    };
  };
  expect(on(null)).toEqual({
    roles: ["stage 0 layers 0..0", "stage 1 layers 1..1", "stage 2 layers 2..2", "stage 3 layers 3..3, mtp 0..1"],
    embeddings: [0, 3],
  });
  expect(on("Ett|tt|mm|L")).toEqual({
    roles: ["stage 0 layers 0..1", "stage 1 layers 2..3", "stage 2 layers none, mtp 0..1", "stage 3 layers none"],
    embeddings: [0, 2],
  });
  expect(on("Ett|tt|mm|L", { tie_embeddings: true }).embeddings).toEqual([0, 2, 3]);
});
