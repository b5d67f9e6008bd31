/** `rankc init`: jobs for models and clusters. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { afterAll, expect, test } from "vitest";
import { type Device, deviceNames } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { memoryForecast } from "../../src/analysis/memoryForecast.ts";
import { askSettings } from "../../src/cli/initPrompts.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { importHfText } from "../../src/convert/hf/importHf.ts";
import { type ModelName, modelNames } from "../../src/convert/presets/models.ts";
import { fewestGpus, presetJob } from "../../src/convert/presets/presetJob.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { peakOf } from "../../src/rules/all.ts";
import { jobRules } from "../../src/rules/jobRules.ts";
import { choicesOf, jobWith } from "../../src/search/choice.ts";
import { forecast, forecastBase } from "../../src/search/forecast.ts";
import { root } from "../support/checkout.ts";
import { rankc } from "../support/rankc.ts";
import { byTier, isFull } from "../support/tiers.ts";

const write = (model: ModelName, gpus: number, device: Device): string =>
  presetJob({ model, gpus, device, gpusPerNode: 8, name: model, data: "corpus.txt" });
const read = (text: string) => readQuickly(text, "job.yaml", []);

/** Warnings about what a cluster makes necessary: groups over nodes, their traffic, and sizes that no degree divides. */
const accepted = ["C504", "C507", "P112"];

const devices: readonly Device[] = isFull ? deviceNames : ["h100-80gb", "cpu"];
const sizes = isFull ? [1, 4, 8, 16, 24, 64, 256, 1024, 2048] : [1, 24, 256, 2048];

for (const { options, rows } of byTier(modelNames, (_, i) => i % 3 === 0))
  test.each(rows)("%s passes check on every device, for every number of GPUs that it fits", options, (model) => {
    const found: string[] = [];
    let jobs = 0;
    for (const device of devices)
      for (const gpus of sizes) {
        let text: string;
        try {
          text = write(model, gpus, device);
        } catch (error) {
          if (!(error instanceof Trouble)) throw error;
          continue;
        }
        jobs++;
        const { job, findings } = read(text);
        if (!job) found.push(`${gpus} x ${device} is invalid`);
        found.push(...findings.filter(({ code }) => !accepted.includes(code)).map(({ code }) => `${gpus} x ${device}: ${code}`));
      }
    expect(found).toEqual([]);
    expect(jobs).toBeGreaterThan(0);
  });

test("a model that does not fit is refused with the number of GPUs that it fits", () => {
  expect(fewestGpus("llama-3.1-70b", "h100-80gb", 8)).toBe(32);
  expect(() => write("llama-3.1-70b", 16, "h100-80gb")).toThrow(
    expect.objectContaining({ name: "Trouble", fix: "32 GPUs are enough: --gpus 32" }),
  );
  expect(fewestGpus("llama-3.1-70b", "cpu", 8)).toBeUndefined();
});

const sampled: readonly [ModelName, number][] = [
  ["olmoe-1b-7b", 64],
  ["llama-3.1-70b", 64],
  ["mixtral-8x22b", 64],
  ["qwen3-235b-a22b", 512],
  ["deepseek-v3", 512],
  ["kimi-k2", 1024],
];
for (const { options, rows } of byTier(sampled, (_, i) => i === 0))
  test.each(rows)("the estimate of %s on %i GPUs is the compiled peak within 15 %, and the peak fits", options, async (model, gpus) => {
    const { job } = read(write(model, gpus, "h100-80gb"));
    if (!job) throw new Error("the job is invalid");
    const { bytes } = peakOf(job, await loadTarget("cuda:sm_90a"));
    expect(memoryForecast(job) / bytes).toBeGreaterThan(0.85);
    expect(memoryForecast(job) / bytes).toBeLessThan(1.15);
    expect(bytes).toBeLessThan(80 * 2 ** 30);
  });

/** What identifies a model: sizes, and how its router chooses. */
const sizesOf = ({ model }: Job) => {
  const { layers, hidden, ffn, heads, kv_heads, head_dim, vocab, mla, moe, qk_norm, tie_embeddings } = model;
  const { score, groups, group_top_k, scaling, normalize_top_k, expert_bias } = moe?.router ?? {};
  const experts = moe && { count: moe.experts, top_k: moe.top_k, ffn: moe.ffn, layers: moe.layers, shared: moe.shared };
  return {
    ...{
      layers,
      hidden,
      ffn,
      heads,
      kv_heads,
      head_dim,
      vocab,
      mla,
      qk_norm,
      tie_embeddings,
      theta: model.rope.theta,
      eps: model.norm.eps,
    },
    ...{ experts, score, groups, group_top_k, scaling, normalize_top_k, expert_bias },
  };
};

test.each([
  ["llama-3.1-405b", "meta-llama--Meta-Llama-3.1-405B"],
  ["mistral-7b", "mistralai--Mistral-7B-v0.1"],
  ["qwen3-235b-a22b", "Qwen--Qwen3-235B-A22B"],
  ["moonlight-16b-a3b", "moonshotai--Moonlight-16B-A3B"],
  ["deepseek-v2-lite", "deepseek-ai--DeepSeek-V2-Lite"],
  ["deepseek-v3", "deepseek-ai--DeepSeek-V3"],
  ["kimi-k2", "moonshotai--Kimi-K2-Instruct"],
] as const)("%s has the sizes of its published config", (model, config) => {
  const published = JSON.parse(readFileSync(join(root, "test/fixtures/hf-configs", `${config}.json`), "utf8"));
  const imported = read(importHfText(published, model)).job;
  const own = read(write(model, 2048, "b200-192gb")).job;
  if (!imported || !own) throw new Error("a job is invalid");
  expect(sizesOf(own)).toEqual(sizesOf(imported));
});

test("the text is commented, in the order of the schema, and has the schema line", () => {
  expect(write("qwen3-30b-a3b", 16, "h200-141gb")).toMatchInlineSnapshot(`
    "# yaml-language-server: $schema=schemas/job.schema.json
    # Qwen3 30B-A3B, on 16 x h200-141gb. Written by rankc init; the mesh is the first that rankc search would try.
    # rankc check prints what is wrong with a change, rankc inspect shows memory, traffic and schedule.
    name: qwen3-30b-a3b

    model:
      layers: 48 # 30.5 billion parameters
      hidden: 2048
      ffn: 6144
      heads: 32
      kv_heads: 4
      head_dim: 128
      vocab: 151936 # ids of the tokenizer are below it
      seq: 4096 # tokens in one sequence
      norm: {eps: 0.000001}
      rope: {theta: 1000000}
      qk_norm: head
      moe:
        experts: 128
        top_k: 8 # experts that each token is sent to
        ffn: 768 # inner width of one expert
        router: {precision: fp32, aux_coeff: 0.001}

    parallel:
      world: 16 # ranks, one GPU each: tensor 1 x pipeline 4 x data 4
      pipeline: 4 # stages, each with a part of the layers
      virtual_pipeline: 2 # chunks of layers in each stage: less idle time
      distributed_optimizer: true # main weights and moments are sharded over the data ranks

    train:
      global_batch: 1024 # sequences of a step: 4,194,304 tokens
      steps: 100000 # 419.4 billion tokens
      precision: bf16
      optimizer:
        lr: 3.0e-4 # the largest learning rate, after the warm-up
        min_lr: 3.0e-5
        warmup_steps: 2000
        schedule: cosine

    data:
      path: corpus.txt # your text, token ids (.bin) or, as sources, data sets

    cluster:
      gpus_per_node: 8 # with fast links among them
      device: h200-141gb # 131.3 GiB of memory
    "
  `);
});

const folder = mkdtempSync(join(tmpdir(), "rankc-init-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const at = (path: string): string => join(folder, path);

test("the command writes the job and the schema beside it, and replaces no file without --force", async () => {
  const first = await rankc("init", "--model", "tiny-mixtral", "--device", "cpu", "-o", at("new/ä b.yaml"));
  expect(first).toMatchObject({ exit: 0, err: "" });
  expect(first.out).toContain("tiny-mixtral on 1 x cpu");
  expect(readFileSync(at("new/ä b.yaml"), "utf8")).toMatch(/^# yaml-language-server: \$schema=schemas\/job\.schema\.json\n/);
  expect(readFileSync(at("new/schemas/job.schema.json"), "utf8")).toBe(readFileSync(join(root, "schemas/job.schema.json"), "utf8"));
  const again = await rankc("init", "--model", "tiny-llama", "-o", at("new/ä b.yaml"));
  expect(again).toMatchObject({ exit: 2, out: "" });
  expect(again.err).toContain("exists\n  fix: name another file with -o, or add --force");
  expect((await rankc("init", "--model", "tiny-llama", "--force", "-o", at("new/ä b.yaml"))).exit).toBe(0);
  expect(readFileSync(at("new/ä b.yaml"), "utf8")).toContain("name: tiny-llama");
  // a folder below finds the schema above
  expect((await rankc("init", "--model", "tiny-llama", "-o", at("new/deep/job.yaml"))).exit).toBe(0);
  expect(readFileSync(at("new/deep/job.yaml"), "utf8")).toContain("$schema=../schemas/job.schema.json");
  expect(existsSync(at("new/deep/schemas"))).toBe(false);
});

test("without a terminal, a missing model is an error; --list describes models and devices", async () => {
  const { exit, err } = await rankc("init", "-o", at("none.yaml"));
  expect(exit).toBe(2);
  expect(err).toContain("--model is missing\n  fix: write --model NAME; rankc init --list");
  writeFileSync(at("file"), "");
  expect((await rankc("init", "--model", "tiny-llama", "-o", at("file/job.yaml"))).exit).toBe(2);
  const list = JSON.parse((await rankc("init", "--list", "--format", "json")).out);
  expect(list.models.map(({ name }: { name: string }) => name)).toEqual(modelNames);
  expect(list.devices).toHaveLength(deviceNames.length);
  expect(existsSync(at("none.yaml"))).toBe(false);
});

/** A person at a terminal: keys are sent when the question that they answer is on the screen. */
function terminal(answers: readonly (readonly [question: string, keys: string])[]) {
  const input = Object.assign(new PassThrough(), { isTTY: true, setRawMode: () => input });
  const output = Object.assign(new PassThrough(), { isTTY: true, columns: 100, rows: 40 });
  let [seen, next] = ["", 0];
  output.on("data", (chunk) => {
    seen += chunk;
    const answer = answers[next];
    if (!answer || !seen.includes(answer[0])) return;
    next++;
    seen = "";
    setImmediate(() => input.write(answer[1]));
  });
  return { input, output };
}
const down = "\u001b[B";

test("at a terminal the questions are model, device and GPUs; the escape key ends without an answer", async () => {
  const nothing = { device: undefined, gpus: undefined, gpusPerNode: 8 };
  const whole = terminal([
    ["Which model?", `${down}${down}\r`],
    ["Which device?", `${down}\r`],
    ["How many GPUs?", "\r"],
  ]);
  expect(await askSettings(nothing, whole)).toEqual({
    model: "llama-3.1-8b",
    device: "h200-141gb",
    gpus: fewestGpus("llama-3.1-8b", "h200-141gb", 8),
  });
  const given = terminal([["Which model?", "\r"]]);
  expect(await askSettings({ ...nothing, device: "cpu", gpus: 2 }, given)).toEqual({ model: "tiny-llama", device: "cpu", gpus: 2 });
  expect(await askSettings(nothing, terminal([["Which model?", "\u0003"]]))).toBeUndefined();
});

test("init writes the choice that a search forecasts to be the fastest of those that fit and break no rule", () => {
  const { job } = read(write("qwen3-8b", 16, "h100-80gb"));
  if (!job) throw new Error("the job is invalid");
  const profile = packageProfile("h100-80gb");
  if (!profile) throw new Error("there is no profile of the H100");
  const { tensor, pipeline, virtual_pipeline } = job.parallel;
  const base = forecastBase(job, profile);
  const order = [...choicesOf(job, { context: 1, micro_batch: 1, expert_tensor: 1 })]
    .map((choice) => ({ choice, ...forecast(base, choice) }))
    .filter(({ bytes }) => bytes <= 0.85 * 80 * 2 ** 30)
    .sort((a, b) => a.seconds - b.seconds);
  const first = order.find(({ choice }) => jobRules.every((rule) => [...rule.check(jobWith(job, choice))].length === 0));
  expect(first?.choice).toMatchObject({ tensor, pipeline, virtual_pipeline });
});
