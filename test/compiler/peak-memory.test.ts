/** The memory that rule C510 judges is that of the plan, to the byte, though equal chunks and layers are compiled once. */
import { readdirSync, readFileSync } from "node:fs";
import Handlebars from "handlebars";
import { expect, test, vi } from "vitest";
import type { Job } from "../../schemas/job.ts";
import { memoryBreakdown } from "../../src/analysis/memoryBreakdown.ts";
import { cpu, loadDeviceTargets, loadTarget, type Target } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJobWith } from "../../src/frontend/readJob.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { memoryBoundOfStages, memoryOfStages } from "../../src/peakMemory.ts";
import { peakOf } from "../../src/rules/all.ts";
import type { Peak } from "../../src/rules/memory.ts";
import { bytesText } from "../../src/units.ts";
import { withoutText } from "../../templates/fill.ts";
import { jobOf } from "../support/job.ts";
import { byTier, full } from "../support/tiers.ts";

const moe = (more: object = {}, router: object = { aux_coeff: 0.01 }) => ({ moe: { experts: 4, top_k: 2, ffn: 32, router, ...more } });
const job = (model: object, parallel: object = {}, train: object = {}) =>
  jobOf({
    name: "peak",
    model: { hidden: 32, heads: 4, head_dim: 8, vocab: 256, seq: 64, ffn: 64, ...model },
    parallel,
    train: { steps: 10, global_batch: 32, optimizer: { lr: 1e-3 }, ...train },
    data: { path: "corpus.txt", split: [9, 1] },
  });
const bias = { score: "sigmoid", expert_bias: true, balance: "none" };

const jobs: readonly (readonly [string, object, object, object])[] = [
  ["dense layers", { layers: 12 }, {}, {}],
  ["three dense layers, then experts", { layers: 14, ...moe({ layers: { first_dense: 3 } }) }, {}, {}],
  ["two long stretches", { layers: 20, ...moe({ layers: { first_dense: 8 } }) }, {}, {}],
  ["experts in every third layer", { layers: 23, ...moe({ layers: { every: 3 } }) }, {}, {}],
  ["layers in no order", { layers: 12, ...moe({ layers: [1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0] }) }, {}, {}],
  ["interleaved chunks", { layers: 16, ...moe() }, { world: 8, pipeline: 4, virtual_pipeline: 2, expert: 2 }, {}],
  [
    "chunks, biases of experts, distributed optimizer",
    { layers: 16, ...moe({}, bias) },
    { world: 8, pipeline: 2, virtual_pipeline: 4, expert: 2, distributed_optimizer: true },
    {},
  ],
  ["zero bubble", { layers: 24, ...moe() }, { world: 4, pipeline: 4, schedule: "zero_bubble" }, {}],
  ["zero bubble in chunks", { layers: 24, ...moe() }, { world: 2, pipeline: 2, virtual_pipeline: 2, schedule: "zero_bubble" }, {}],
  [
    "tied embeddings and dropout in chunks",
    { layers: 16, tie_embeddings: true, dropout: { hidden: 0.1, attention: 0.1 } },
    { world: 2, pipeline: 2, virtual_pipeline: 4 },
    {},
  ],
  [
    "a layout with multi-token prediction",
    { layers: 12, mtp: { layers: 2 }, ...moe() },
    { world: 4, pipeline: 2, layout: "Etttt|tt|ttt|tttmmL" },
    {},
  ],
  [
    "an evaluation in chunks",
    { layers: 16, dropout: { hidden: 0.1 }, ...moe() },
    { world: 4, pipeline: 2, virtual_pipeline: 2, expert: 2 },
    { evaluation: { steps: 2 } },
  ],
  ["pairs of microbatches", { layers: 12, ...moe() }, { world: 4, expert: 2, expert_overlap: "interleave" }, {}],
  [
    "pairs in chunks, dropout",
    { layers: 16, dropout: { hidden: 0.1 }, ...moe() },
    { world: 8, pipeline: 2, virtual_pipeline: 4, expert: 2, expert_overlap: "interleave" },
    {},
  ],
  [
    "too few microbatches for pairs on the first stages",
    { layers: 16, ...moe() },
    { world: 16, pipeline: 4, virtual_pipeline: 2, expert: 4, expert_overlap: "interleave" },
    {},
  ],
  ["groups of three computed again", { layers: 20 }, {}, { recompute: { mode: "full", layers: 3 } }],
  ["five layers computed again", { layers: 20 }, {}, { recompute: { mode: "full", method: "block", layers: 5 } }],
  [
    "modules computed again",
    { layers: 10, ...moe() },
    {},
    { recompute: { mode: "selective", modules: ["core_attn", "moe_act", "layernorm"] } },
  ],
];
// of layers without stages, of chunks, of another schedule, of a layout, of pairs, and of recomputation one
for (const { options, rows } of byTier(jobs, (_, i) => [1, 6, 7, 9, 12, 14].includes(i)))
  test.each(rows)("%s", options, (_, model, parallel, train) => {
    const of = job(model, parallel, train);
    const { memory, programs } = compile(of).plan;
    expect(memoryOfStages(of, cpu)).toEqual(programs.map((p, stage) => memoryBreakdown(p, memory[stage]!)));
  });

const readers = { load: loadDeviceTargets, chooseAuto: () => Promise.reject(new Error("no key of these jobs is auto")) };

test("the scratch of kernels is a part of it", async () => {
  const target = await loadTarget("cuda:sm_90a");
  const of = job({ layers: 8, ...moe() }, { world: 4, pipeline: 2, virtual_pipeline: 2, expert: 2 });
  const { memory } = compile(of, { target }).plan;
  expect(memoryOfStages(of, target).map(({ scratch }) => scratch)).toEqual(memory.map(({ scratch }) => scratch));
  expect(Math.max(...memory.map(({ scratch }) => scratch))).toBeGreaterThan(0);
});

test("the workspace of a chunk whose length decides what fits its holes is that of the whole chunk", async () => {
  const target = await loadTarget("cuda:sm_80");
  const { job: of } = readJob(published("mixtral-8x7b-16gpu"), "job.yaml", ["parallel.expert_tensor=1", "parallel.expert=4"]);
  const { memory, programs } = compile(of!, { target }).plan;
  expect(memoryOfStages(of!, target)).toEqual(programs.map((p, stage) => memoryBreakdown(p, memory[stage]!)));
});

const published = (name: string): string => readFileSync(new URL(`../../plans/${name}/job.yaml`, import.meta.url), "utf8");

test("for a recipe whose worst case does not fit, the rule states the memory with rows_bound, and its meaning", async () => {
  const sets = ["model.moe.rows_bound=worst", "cluster.device=h100-80gb", "model.seq=5120"];
  const { findings } = await readJobWith(readers, published("deepseek-v3-1024gpu"), "job.yaml", sets);
  const found = findings.find(({ code }) => code === "C510");
  expect(found?.found).toMatch(/needs .* at the peak \(\d+(\.\d+)? \wiB with model\.moe\.rows_bound 1\.5\)/);
  expect(found?.fix).toContain(
    "1.5 for 1.5 times the balanced load: a step with more rows ends the run with an error, and no row is dropped",
  );
  expect(found?.set).toMatchObject({ "model.moe.rows_bound": 1.5 });
});

const plans = readdirSync(new URL("../../plans", import.meta.url));
for (const { options, rows } of byTier(
  plans.map((name) => [name] as const),
  ([name]) => ["mixtral-8x7b-16gpu", "tiny-mla"].includes(name),
))
  test.each(rows)(
    "the bound of the memory of %s differs in scratch only, which is never below that of the kernels",
    options,
    async (name) => {
      const { job: of } = readJob(published(name), "job.yaml");
      for (const target of ["cuda:sm_90a", "cuda:sm_80", "webgpu:f16", "cpu"]) {
        const exact = memoryOfStages(of!, await lenient(target));
        const bound = memoryBoundOfStages(of!, target);
        expect(bound.map((stage, s) => ({ ...stage, scratch: exact[s]!.scratch }))).toEqual(exact);
        for (const [s, { scratch }] of exact.entries()) expect(bound[s]!.scratch, target).toBeGreaterThanOrEqual(scratch);
      }
    },
  );
/** Returns a target whose kernels that it cannot generate have no scratch. */
async function lenient(name: string): Promise<Target> {
  const { weights: _, ...target } = await loadTarget(name);
  const generate = (...of: Parameters<Target["generate"]>) => {
    try {
      return withoutText(() => target.generate(...of));
    } catch {
      return undefined;
    }
  };
  return { ...target, generate };
}

test("a job that surely fits is judged by the bound, without kernels; a later check of the same job takes it; the stated peak is exact", async () => {
  const known = new Map<string, Peak>();
  const loads: string[] = [];
  const asked = {
    ...readers,
    load: () => {
      loads.push("kernels");
      return loadDeviceTargets();
    },
    known: { get: (of: Job) => known.get(JSON.stringify(of)), set: (of: Job, peak: Peak) => void known.set(JSON.stringify(of), peak) },
  };
  const text = published("mixtral-8x7b-16gpu");
  for (const run of [1, 2]) {
    const { findings } = await readJobWith(asked, text, "job.yaml", []);
    expect(
      findings.filter(({ code }) => code === "C510"),
      `${run}`,
    ).toEqual([]);
    expect([...known.values()].map(({ isBound }) => isBound)).toEqual([true]);
    expect(loads).toEqual([]);
  }
  const tooLong = ["model.seq=65536", "model.max_positions=65536"];
  const large = await readJobWith(asked, text, "job.yaml", tooLong);
  expect(loads).toEqual(["kernels"]);
  const { job: of } = large;
  const exact = peakOf(of!, await loadTarget("cuda:sm_80"));
  expect(large.findings.find(({ code }) => code === "C510")?.found).toContain(bytesText(exact.bytes));
  expect(known.get(JSON.stringify(of))).toEqual(exact);
});

test("checking a job fills no template of a kernel in", async () => {
  const compileTemplate = vi.spyOn(Handlebars, "compile");
  await readJobWith(readers, published("deepseek-v3-1024gpu"), "job.yaml", []);
  expect(compileTemplate).not.toHaveBeenCalled();
  vi.restoreAllMocks();
});

test("C510 counts scratch of the device's kernels", full, async () => {
  const sets = ["cluster.device=h100-80gb", "parallel.expert=1", "parallel.world=2", "parallel.distributed_optimizer=false"];
  const { job: read, findings } = await readJobWith(readers, published("qwen3-30b-a3b-16gpu"), "job.yaml", sets);
  const peaks = memoryOfStages(read!, await loadTarget("cuda:sm_90a")).map((m) => Object.values(m).reduce((a, b) => a + b));
  expect(findings.find(({ code }) => code === "C510")?.found).toContain(bytesText(Math.max(...peaks)));
  expect(readJob(published("qwen3-30b-a3b-16gpu"), "job.yaml").job).toBeDefined();
});
