/** Evaluations: the losses of the forward pass that training computes, on held-out data, on every mesh; training goes on as if none ran. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { littleEndian } from "../support/labels.ts";
import { megatronIndex } from "../support/megatronIndex.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-evaluation-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Writes a data set of these documents. */
function writeDataset(prefix: string, documents: readonly (readonly number[])[]): void {
  writeFileSync(`${prefix}.bin`, littleEndian(documents.flat(), "u16"));
  writeFileSync(
    `${prefix}.idx`,
    megatronIndex(
      8,
      2,
      documents.map(({ length }) => length),
    ),
  );
}

const evaluation = { every: 1, steps: 2 };
const moe = { experts: 4, top_k: 2, ffn: 16, router: { aux_coeff: 0.01, z_coeff: 0.001, expert_bias: true, score: "sigmoid" } };
const job = (parallel: object = {}, { model = {}, train = {}, data = {} } = {}): Job =>
  jobOf({
    name: "evaluated",
    model: { layers: 2, hidden: 16, heads: 4, vocab: 256, seq: 16, moe, ...model },
    parallel,
    train: { global_batch: 8, steps: 4, precision: "fp32", optimizer: { lr: 1e-2 }, evaluation, ...train },
    data: { path: "corpus.txt", split: [8, 1, 1], ...data },
  });

/** Trains two steps, and evaluates before each and after the last. */
async function evaluatedAnew(of: Job) {
  const run = await openRun(compile(of).plan, { baseDir: fixture("") });
  const losses: number[] = [];
  const results = [];
  for (let step = 0; step < 2; step++) {
    if (of.train.evaluation) results.push(await run.evaluate("validation"));
    losses.push((await run.step()).loss);
  }
  if (of.train.evaluation) results.push(await run.evaluate("validation"), await run.evaluate("test"));
  const parameters = await run.parameters();
  await run.close();
  return { losses, results, parameters };
}

/** The same, computed once for a job. */
function evaluated(of: Job): ReturnType<typeof evaluatedAnew> {
  const key = JSON.stringify(of);
  const found = known.get(key) ?? evaluatedAnew(of);
  known.set(key, found);
  return found;
}
const known = new Map<string, ReturnType<typeof evaluatedAnew>>();

test("training is the same to the bit with evaluations, dropout and jitter included", async () => {
  const random = { model: { dropout: { hidden: 0.1, attention: 0.1 }, moe: { ...moe, router: { ...moe.router, jitter: 0.1 } } } };
  const [withThem, without] = await Promise.all([
    evaluated(job({}, random)),
    evaluated(job({}, { ...random, train: { evaluation: null } })),
  ]);
  expect(withThem.losses).toEqual(without.losses);
  expect(withThem.parameters).toEqual(without.parameters);
  expect(withThem.results.map(({ part, step }) => [part, step])).toEqual([
    ["validation", 0],
    ["validation", 1],
    ["validation", 2],
    ["test", 2],
  ]);
});

test.each([
  ["tensor, expert and sequence parallelism", { world: 4, tensor: 2, expert: 2, sequence: true }],
  ["interleaved pipeline stages", { world: 4, pipeline: 2, virtual_pipeline: 2, expert: 2 }, { layers: 4 }],
  ["zero bubble", { world: 2, pipeline: 2, schedule: "zero_bubble" }],
  ["context parallelism", { world: 4, context: 2 }],
  ["sharded optimizer state", { world: 4, expert: 4, distributed_optimizer: true }],
] as [string, object, object?][])("the losses are those of one rank: %s", async (_, parallel, model = {}) => {
  const [one, many] = await Promise.all([evaluated(job({}, { model })), evaluated(job(parallel, { model }))]);
  for (const [i, { loss, tokens, perplexity }] of one.results.entries()) {
    expect(Math.abs((many.results[i]?.loss ?? 0) - loss), `evaluation ${i}`).toBeLessThan(1e-4);
    expect(many.results[i]?.tokens).toBe(tokens);
    expect(perplexity).toBeCloseTo(Math.exp(loss), 10);
  }
});

test("the loss of an evaluation is that of a training step on the same tokens", async () => {
  const text = readFileSync(fixture("corpus.txt"));
  writeFileSync(join(folder, "held-out.txt"), text.subarray(Math.round(0.8 * text.length), Math.round(0.9 * text.length)));
  const one = { evaluation: { every: null, steps: 1 } };
  const { results } = await evaluated(job({}, { train: one }));
  const { losses } = await evaluated(
    job({}, { data: { split: undefined, path: join(folder, "held-out.txt") }, train: { evaluation: null } }),
  );
  expect(results[0]?.loss).toBeCloseTo(losses[0] ?? 0, 5);
});

test("steps: all reads each token once, and reports the loss of each source", async () => {
  const prefixes = ["first", "second"].map((name) => join(folder, name));
  const documents = [
    [11, 1, 40],
    [3, 90],
  ];
  for (const [k, prefix] of prefixes.entries())
    writeDataset(
      prefix,
      (documents[k] ?? []).map((length, d) => Array.from({ length }, (_, i) => (7 * i + 31 * d + 3 * k) % 256)),
    );
  const all = { evaluation: { every: null, steps: "all" } };
  const on = async (names: readonly string[]) => {
    const data = { split: undefined, test: names.map((path) => ({ path })) };
    const run = await openRun(compile(job({}, { data, train: all })).plan, { baseDir: fixture("") });
    const result = await run.evaluate("test");
    await run.close();
    return result;
  };
  const [both, ...each] = await Promise.all([on(prefixes), ...prefixes.map((prefix) => on([prefix]))]);
  expect(both.sources.map(({ source, tokens }) => [source, tokens])).toEqual([
    [prefixes[0], 51],
    [prefixes[1], 92],
  ]);
  expect(both.tokens).toBe(143);
  for (const [k, { loss }] of both.sources.entries()) expect(loss).toBeCloseTo(each[k]?.loss ?? 0, 5);
  expect(both.loss).toBeCloseTo((51 * (each[0]?.loss ?? 0) + 92 * (each[1]?.loss ?? 0)) / 143, 5);
});
