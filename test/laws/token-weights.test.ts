/** Weights of tokens in the loss: ignored labels have weight 0, the others that of train.loss_weighting; compared with numbers by hand and with slopes. */
import { afterAll, describe, expect, test } from "vitest";
import { IGNORED } from "../../runtime/data/tokens.ts";
import { weightsOf } from "../../runtime/train/tokenWeights.ts";
import type { Job } from "../../schemas/job.ts";
import { distance, fixture, jobOf } from "../support/job.ts";
import { labelsBeside } from "../support/labels.ts";
import { firstStep, slopeErrors } from "../support/slopes.ts";

const N = IGNORED;
const some = labelsBeside(fixture("corpus.txt"));
const all = labelsBeside(fixture("corpus.txt"), (ids) => Int32Array.from(ids));
afterAll(() => {
  some.remove();
  all.remove();
});

describe("weights, by hand", () => {
  // two sequences of four make a microbatch; of three microbatches one has no label
  const labels = Int32Array.of(...[1, N, 2, 3], ...[N, N, N, 4], ...[5, 6, 7, 8], ...[9, 1, 2, 3], ...[N, N, N, N], ...[N, N, N, N]);
  test("microbatches count alike, one without labels as 0", () => {
    const want = [1 / 12, 0, 1 / 12, 1 / 12, 0, 0, 0, 1 / 12, ...Array(8).fill(1 / 24), ...Array(8).fill(0)];
    expect(weightsOf(labels, { by: "microbatch", together: 8 })).toEqual(Float32Array.from(want));
  });
  test("tokens count alike", () => {
    expect(weightsOf(labels, { by: "token", together: 8 })).toEqual(Float32Array.from(labels, (l) => (l === N ? 0 : 1 / 12)));
  });
  test("a step without labels has no gradient", () => {
    expect(weightsOf(new Int32Array(8).fill(N), { by: "token", together: 4 })).toEqual(new Float32Array(8));
  });
});

const experts = { experts: 4, top_k: 2, ffn: 8, router: { score: "sigmoid", normalize_top_k: false, aux_coeff: 0.5, z_coeff: 0.1 } };
const jobWith = (labels: string | null, by: string, model: object = {}): Job =>
  jobOf({
    name: "learning",
    model: { layers: 1, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, ...model },
    train: {
      ...{ micro_batch: 2, global_batch: 6, steps: 1, precision: "fp32", init: { std: 0.2 }, loss_weighting: by },
      optimizer: { lr: 1e-2 },
    },
    data: { path: "corpus.txt", order: "shuffled", labels },
  });

const sumOf = (numbers: Iterable<number>): number => [...numbers].reduce((a, b) => a + b, 0);

describe("a step of three microbatches of two sequences", () => {
  const nll = async (job: Job) => {
    const { metrics, watched, given } = await firstStep(job, undefined, ["loss.nll"]);
    const each = watched.get("loss.nll")!.map(({ data }) => [...data]);
    const learnt = each.map((losses, m) => losses.filter((_, i) => given.labels[m * 16 + i] !== N));
    return { loss: metrics.loss, learnt };
  };
  test("microbatch: the mean of means", async () => {
    const { loss, learnt } = await nll(jobWith(some.path, "microbatch"));
    expect(new Set(learnt.map((l) => l.length)).size).toBe(3);
    expect(loss).toBeCloseTo(
      sumOf(learnt.filter((l) => l.length > 0).map((l) => sumOf(l) / l.length)) / learnt.filter((l) => l.length > 0).length,
      5,
    );
  });
  test("token: the mean", async () => {
    const { loss, learnt } = await nll(jobWith(some.path, "token"));
    expect(loss).toBeCloseTo(sumOf(learnt.flat()) / learnt.flat().length, 5);
  });
  test.each(["microbatch", "token"])("%s: with every token labelled, the numbers are those of no labels", async (by) => {
    const [plain, labelled] = [await firstStep(jobWith(null, "microbatch")), await firstStep(jobWith(all.path, by))];
    expect(labelled.metrics.loss).toBeCloseTo(plain.metrics.loss, 6);
    for (const [name, g] of plain.gradients) expect(distance(labelled.gradients.get(name)!.data, g.data), name).toBeLessThan(1e-6);
  });
  test.each(["microbatch", "token"])("%s: gradients are slopes of loss and balancing loss", async (by) => {
    const errors = await slopeErrors(jobWith(some.path, by, { moe: experts }), ({ loss, aux_loss }) => loss + aux_loss);
    expect(errors.size).toBeGreaterThan(8);
    for (const [name, error] of errors) expect(error, name).toBeLessThan(2e-3);
  });
});

test.each(["microbatch", "token"])("%s: a step without labels has no weight, not even by its balancing losses", async (by) => {
  const none = labelsBeside(fixture("corpus.txt"), (ids) => new Int32Array(ids.length).fill(N));
  const { metrics, gradients } = await firstStep(jobWith(none.path, by, { moe: experts }));
  none.remove();
  expect(metrics).toMatchObject({ loss: 0, labels: 0, aux_loss: 0, grad_norm: 0 });
  for (const [name, { data }] of gradients)
    expect(
      data.every((x) => x === 0),
      name,
    ).toBe(true);
});

test("the printed loss is the mean over the microbatches that have labels", async () => {
  // two sequences of eight tokens make a microbatch: some of them have no label
  const few = labelsBeside(fixture("corpus.txt"), (ids) => Int32Array.from(ids, (id, i) => (i % 48 < 8 ? id : N)));
  const mtp = { mtp: { layers: 1 } };
  const { metrics, watched, given } = await firstStep(jobWith(few.path, "microbatch", mtp), undefined, ["loss.nll", "mtp.0.loss.nll"]);
  few.remove();
  for (const [got, id, labels] of [
    [metrics.loss, "loss.nll", given.labels],
    [metrics.mtp_loss!, "mtp.0.loss.nll", given.labels_1!],
  ] as const) {
    const means = watched.get(id)!.flatMap(({ data }, m) => {
      const learnt = [...data].filter((_, i) => labels[m * 16 + i] !== N);
      return learnt.length > 0 ? [sumOf(learnt) / learnt.length] : [];
    });
    expect([1, 2]).toContain(means.length);
    expect(got).toBeCloseTo(sumOf(means) / means.length, 5);
  }
  expect(metrics.labels).toBe(given.labels.filter((l) => l !== N).length);
});

test("token: balancing losses are weighted by all tokens, labelled or not", async () => {
  const [each, token] = [
    await firstStep(jobWith(some.path, "microbatch", { moe: experts })),
    await firstStep(jobWith(some.path, "token", { moe: experts })),
  ];
  const labels = token.given.labels.filter((l) => l !== N).length;
  expect(labels).toBeLessThan(30);
  // the same routers on the same tokens: 48 of them, each microbatch's loss times its 16, over the labels
  expect(token.metrics.aux_loss).toBeCloseTo((each.metrics.aux_loss * 48) / labels, 5);
});
