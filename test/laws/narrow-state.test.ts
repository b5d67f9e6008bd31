/** Main gradients and moments in bf16, and gradients that are sent in bf16: their memory, what stays in f32, and losses near those of f32 on any mesh. */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf, sameNumbers } from "../support/job.ts";
import { byTier } from "../support/tiers.ts";

const narrow = { gradients: "bf16" };
const jobWith = (train: object, optimizer: object = {}, parallel: object = {}, model: object = {}) =>
  jobOf({
    name: "narrow",
    model: { layers: 2, hidden: 32, ffn: 48, heads: 4, vocab: 256, seq: 16, ...model },
    parallel,
    train: { global_batch: 8, steps: 4, precision: "bf16", init_std: 0.2, optimizer: { lr: 1e-2, ...optimizer }, ...train },
    data: { path: "corpus.txt" },
  });

async function losses(job: ReturnType<typeof jobOf>): Promise<number[]> {
  const run = await openRun(compile(job).plan, { baseDir: fixture("") });
  const all: number[] = [];
  for (let n = 0; n < 4; n++) all.push((await run.step()).loss);
  await run.close();
  return all;
}
const typesOf = (job: ReturnType<typeof jobOf>, pattern: RegExp): string[] => [
  ...new Set(
    compile(job).plan.programs.flatMap((p) =>
      p.buffers.flatMap((b) => (pattern.test(b.id) && ["gradient", "optimizer"].includes(b.kind) ? [b.dtype] : [])),
    ),
  ),
];

test("gradients of weights of products take bf16; those of gains and of the embedding stay f32", () => {
  const job = jobWith(narrow);
  expect(typesOf(job, /\.(wq|wk|wv|wo|w1|w2|w3)\.grad$|^head\.grad$/)).toEqual(["bf16"]);
  expect(typesOf(job, /norm\d?\.grad$|^embed\.grad$/)).toEqual(["f32"]);
  expect(typesOf(jobWith({}), /\.grad$/)).toEqual(["f32"]);
});

test("moments take bf16, main weights stay f32", () => {
  for (const type of ["adamw", "sgd", "muon"]) {
    const job = jobWith({}, { type, moments: "bf16" });
    expect(typesOf(job, /\.(m|v)$/), type).toEqual(["bf16"]);
    expect(typesOf(job, /\.master$/), type).toEqual(["f32"]);
  }
});

test("the plan's memory has 4 bytes less for each element of a matrix, and 4 less for each pair of moments", () => {
  const memory = (job: ReturnType<typeof jobOf>) => compile(job).plan.memory[0]!;
  const model = { hidden: 256, ffn: 512, heads: 4 };
  const [wide, grads, moments] = [{}, narrow, {}].map((train, n) => memory(jobWith(train, n === 2 ? { moments: "bf16" } : {}, {}, model)));
  const matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 256;
  expect(wide!.gradient - grads!.gradient).toBe(2 * matrices);
  expect(wide!.optimizer - moments!.optimizer).toBeGreaterThanOrEqual(4 * (matrices + 256 * 256));
});

describe("reduction in bf16", () => {
  const open = (train: object, parallel: object) =>
    openRun(compile(jobWith({ precision: "fp32", ...train }, { lr: 1e-30 }, parallel)).plan, { baseDir: fixture("") });
  const bf16 = (x: number): number => {
    const [bits = 0] = new Uint32Array(Float32Array.of(x).buffer);
    return new Float32Array(Uint32Array.of((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000).buffer)[0]!;
  };

  test.each([{}, { distributed_optimizer: true }])(
    "a reduced gradient is the rounded sum of the ranks' rounded gradients: %j",
    async (own) => {
      // weights stay: a step of one rank has the gradient of the next sequence, twice what it is as a half of a batch
      const alone = await open({ global_batch: 1 }, {});
      await alone.step();
      const first = await alone.gradients();
      await alone.step();
      const second = await alone.gradients();
      await alone.close();
      const both = await open({ global_batch: 2, gradient_reduction: "bf16" }, { world: 2, ...own });
      await both.step();
      const reduced = await both.gradients();
      await both.close();
      expect(reduced.size).toBe(first.size);
      for (const [name, { data }] of reduced) {
        const [x, y] = [first, second].map((g) => g.get(name)!.data);
        const want = data.map((_, i) => bf16(Math.fround(bf16(x![i]! / 2) + bf16(y![i]! / 2))));
        expect(sameNumbers(Float32Array.from(want), Float32Array.from(data)), name).toBe(true);
      }
    },
  );

  test("gradients are summed over microbatches in f32, sent in half of the bytes, and nothing is rounded on one rank", () => {
    const sent = (train: object, parallel: object) =>
      compile(jobWith(train, {}, parallel)).plan.programs[0]!.step.reduce(
        (sum, i) => sum + (i.kind === "collective" && i.from.includes(".grad") ? i.bytes : 0),
        0,
      );
    const parallel = { world: 4 };
    expect(sent({ gradient_reduction: "bf16" }, parallel)).toBe(sent({}, parallel) / 2);
    expect(typesOf(jobWith({ gradient_reduction: "bf16" }, {}, parallel), /\.grad$/)).toEqual(["f32"]);
    const rounded = compile(jobWith({ gradient_reduction: "bf16" })).plan;
    expect(rounded.programs).toEqual(compile(jobWith({})).plan.programs);
  });

  test("counts of tokens, by which an expert bias moves, are sent exactly", () => {
    const moe = { experts: 4, top_k: 2, ffn: 16, router: { score: "sigmoid", expert_bias: true, bias_rate: 0.05, balance: "none" } };
    const { plan } = compile(jobWith({ gradient_reduction: "bf16" }, {}, { world: 2 }, { moe }));
    const { buffers, parameters } = plan.programs[0]!;
    const types = parameters.map(({ gradient, rule }) => [rule, buffers.find(({ id }) => id === gradient)!.dtype].join(" "));
    expect([...new Set(types)].sort()).toEqual(["adamw bf16", "expert_bias f32"]);
  });
});

const meshes = {
  "one rank": {},
  "data 2 with sharded state": { world: 2, distributed_optimizer: true },
  "tensor 2, two stages": { world: 4, tensor: 2, sequence: true, pipeline: 2 },
};
describe.each(Object.entries(meshes).map(([name, parallel], n) => ({ name, parallel, n })))("$name", ({ parallel, n }) => {
  for (const { options, rows } of byTier(["muon", "sgd", "adamw"], (_, i) => i === n))
    test.each(rows)("%s: losses are near those with f32", options, async (type) => {
      const wide = await losses(jobWith({}, { type }, parallel));
      const thin = await losses(jobWith(narrow, { type, moments: "bf16" }, parallel));
      for (const [n, loss] of wide.entries()) expect(Math.abs(thin[n]! / loss - 1), `step ${n}`).toBeLessThan(0.02);
      expect(thin).not.toEqual(wide);
    });
});
