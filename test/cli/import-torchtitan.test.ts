/** `rankc import torchtitan`: configurations of its mixture-of-experts models. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { parameterCount } from "../../src/analysis/parameterCount.ts";
import { importTorchtitan, type TorchtitanSettings } from "../../src/convert/torchtitan/importTorchtitan.ts";
import { problemsOf } from "../support/importProblems.ts";
import { fixture } from "../support/job.ts";

const published = readFileSync(fixture("torchtitan/deepseek_v3_671b.toml"), "utf8");
const imported = (text: string, settings: Partial<TorchtitanSettings> = {}) =>
  importTorchtitan(text, "config.toml", { name: "a", world: 256, ...settings });
const jobOf = (text: string, settings: Partial<TorchtitanSettings> = {}): Job =>
  completeJob(JobText.parse(parse(imported(text, settings).text)));
const model = (name: string, flavor: string, rest = "") => `[model]\nname = "${name}"\nflavor = "${flavor}"\n${rest}`;

test("the published DeepSeek-V3 imports, with its sizes, its bias and its learning rates", () => {
  const { model: sizes, parallel, train } = jobOf(published);
  // DeepSeek-V3 has 671.03e9 parameters
  expect(parameterCount(sizes) / 1e9).toBeCloseTo(671.03, 1);
  expect(sizes.moe?.router).toMatchObject({ score: "sigmoid", expert_bias: true, balance: "none", groups: 8, group_top_k: 4 });
  expect(parallel).toMatchObject({ world: 256, data: 256, distributed_optimizer: true });
  expect(train).toMatchObject({ micro_batch: 4, global_batch: 1024, steps: 10000 });
  const rates = { schedule: "wsd", warmup_steps: 2000, wsd_decay: "cosine", wsd_decay_steps: 8000, min_lr: 2.2e-5 };
  expect(train.optimizer).toMatchObject(rates);
});

test("every setting is mapped, or without effect with a reason", () => {
  const { mapped, withoutEffect, notes } = imported(published);
  expect(mapped.length + withoutEffect.length).toBe(33);
  for (const { why } of withoutEffect) expect(why).toBeTruthy();
  expect(notes.join()).toContain("torchtitan shards weights and gradients over data ranks");
});

test("YaRN sets in with sequences that are longer than the original ones", () => {
  expect(jobOf(published).model.rope.scaling).toBeNull();
  const { scaling } = jobOf(published.replace("seq_len = 4096", "seq_len = 8192")).model.rope;
  expect(scaling).toMatchObject({ type: "yarn", factor: 40, original_seq: 4096, mscale: 1, mscale_all_dim: 1 });
});

test("a bias beside softmax scores is refused, and can be left out", () => {
  const qwen = model("qwen3", "30B-A3B");
  expect(problemsOf(() => imported(qwen))).toEqual([
    "an expert bias of rate 0.001 beside softmax scores, as in flavor 30B-A3B: a bias needs sigmoid or softplus scores; --drop load_balance_coeff, and set model.moe.router.balance",
  ]);
  const job = jobOf(qwen, { drop: ["load_balance_coeff"] });
  expect(parameterCount(job.model) / 1e9).toBeCloseTo(30.5, 1);
  expect(job.train).toMatchObject({
    micro_batch: 8,
    optimizer: { lr: 8e-4, warmup_steps: 200, wsd_decay: "linear", wsd_decay_steps: 9800 },
  });
  expect(job.train.recompute.mode).toBe("selective");
});

test("stages count the embedding and the head as layers", () => {
  const parallel =
    '[parallelism]\ndata_parallel_shard_degree = 4\npipeline_parallel_degree = 4\npipeline_parallel_schedule = "Interleaved1F1B"\n';
  const job = jobOf(model("deepseek_v3", "671B", parallel), { world: 16 });
  // 63 over 8 parts: 7 have 8, the last 7; the first and the last lose one
  expect(job.parallel).toMatchObject({ virtual_pipeline: 2, layout: "Et*7|(t*8|)*6t*6L", world: 16, data: 4 });
  expect(job.train.micro_batch).toBe(1);
});

test("unknown values are requested or named", () => {
  expect(problemsOf(() => importTorchtitan(published, "c.toml", { name: "a" }))).toEqual([expect.stringContaining("--world N")]);
  expect(() => imported(model("llama4", "17bx16e"))).toThrow("model.name llama4 with flavor 17bx16e cannot be imported");
  const wrong = published.replace("steps = 10_000", 'step = 10_000\nsteps = "many"');
  expect(problemsOf(() => imported(wrong))).toEqual([
    expect.stringContaining("training.step = 10000: rankc knows no such setting of torchtitan; training.steps is the nearest"),
    expect.stringContaining("training.steps = many: torchtitan reads a number here"),
  ]);
  const float8 = published.replace('flavor = "671B"', 'flavor = "671B"\nconverters = ["float8"]');
  expect(problemsOf(() => imported(float8))).toEqual([expect.stringContaining("--drop model.converters")]);
  expect(() => imported("[model\n")).toThrow(/config\.toml:\d+: not TOML/);
});

test("values that torchtitan does not take are errors, not defaults", () => {
  const base = model("deepseek_v3", "16B");
  const rest = [
    "[lr_scheduler]\ndecay_type = 'exponential'",
    "[training]\nmixed_precision_param = 'float16'\ndtype = 'bfloat16'",
    "[parallelism]\ncontext_parallel_degree = 2\ncontext_parallel_rotate_method = 'ring'",
    "[activation_checkpoint]\nmode = 'memory_budget'",
    "[debug]\nmoe_force_load_balance = 'yes'",
    "[constructor]\nwhen = 2026-01-01",
    "[toString]\nx = 1",
  ];
  const names = problemsOf(() => imported(`${base}\n${rest.join("\n")}`)).map((problem) => problem.replace(/:.*/, ""));
  for (const name of [
    "lr_scheduler.decay_type = exponential",
    "training.mixed_precision_param = float16",
    "training.dtype = bfloat16",
    "parallelism.context_parallel_rotate_method = ring",
    "activation_checkpoint.mode = memory_budget",
    "debug.moe_force_load_balance = yes",
    "toString.x = 1",
  ])
    expect(names).toContain(name);
  expect(names.some((name) => name.startsWith("constructor.when"))).toBe(true);
});

test("a forced balance of experts holds without the bias, too", () => {
  const text = model("qwen3", "30B-A3B", "[debug]\nmoe_force_load_balance = true\n");
  expect(jobOf(text, { drop: ["load_balance_coeff"] }).model.moe?.router.force).toBe("uniform");
});
