/** Published configurations (fixtures/hf-configs): what `rankc import hf` makes of each, and the files it reads. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { parse } from "yaml";
import { parametersOf, sizesOf } from "../../runtime/checkpoint/hfLayout.ts";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { parameterCount } from "../../src/analysis/parameterCount.ts";
import { readConfigFile } from "../../src/cli/inputFiles.ts";
import { parseConfig } from "../../src/convert/hf/configReader.ts";
import { importHf, importHfText } from "../../src/convert/hf/importHf.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { buildModel } from "../../src/model/model.ts";
import { addBackward } from "../../src/passes/backward.ts";
import { fixture, jobOf } from "../support/job.ts";
import { references } from "../support/referenceJobs.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-configs-"));
afterAll(() => rmSync(folder, { recursive: true }));
const published = readdirSync(fixture("hf-configs"))
  .sort()
  .map((file) => file.replace(/\.json$/, ""));
const read = (name: string): unknown => parseConfig(readFileSync(fixture(`hf-configs/${name}.json`), "utf8"), name);
const modelOf = (config: unknown): Job["model"] => completeJob(JobText.parse(importHf(config, "a").job)).model;

function complaint(act: () => unknown): string {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return `${(error as Trouble).message}; ${(error as Trouble).fix}`;
  }
  throw new Error("no Trouble");
}

const taken = [
  ...["Qwen--Qwen3-235B-A22B", "Qwen--Qwen3-30B-A3B-FP8", "deepseek-ai--DeepSeek-V2-Lite", "deepseek-ai--DeepSeek-V3"],
  ...["meta-llama--Meta-Llama-3.1-405B", "mistralai--Mistral-7B-v0.1", "moonshotai--Kimi-K2-Instruct", "moonshotai--Moonlight-16B-A3B"],
];

test.each(taken)("%s becomes a job in which `check` finds nothing but its memory", (name) => {
  // the memory of few layers is found quickly
  const { findings } = readJob(importHfText({ ...(read(name) as object), num_hidden_layers: 4 }, name), "job.yaml");
  expect(findings.map(({ code }) => code).filter((code) => code !== "C510")).toEqual([]);
});

test("every other published config is refused by the key that rankc lacks", () => {
  const refused = published
    .filter((name) => !taken.includes(name))
    .map((name) => complaint(() => importHf(read(name), name)).split(";")[0]);
  expect(refused.join("\n")).toMatchInlineSnapshot(`
    "model_type "minimax_m2" cannot be imported
    model_type "olmo2" cannot be imported
    model_type "gemma2" cannot be imported
    model_type "granitemoe" cannot be imported
    model_type "bailing_moe" cannot be imported
    model_type "llama4" cannot be imported
    model_type "phi3" cannot be imported
    this gpt_oss config cannot be imported:
      rope truncate false is not supported: the pairs between which scaling sets in are whole numbers
      sliding_window 128 is shorter than a sequence of 4096: attention here covers all earlier tokens
      self_attn.sinks are not supported: softmax here is over the keys alone
      swiglu_limit is not supported: gate and up are not clamped, and silu has no other slope
      mlp.experts.gate_up_proj_bias and down_proj_bias are not supported: experts have no biases
      mlp.router.bias is not supported: the router has no bias
    model_type "glm4_moe" cannot be imported"
  `);
});

test("the balancing loss of DeepSeek's configs is aux_loss_alpha and seq_aux, and a note says so", () => {
  const lite = read("deepseek-ai--DeepSeek-V2-Lite") as object;
  for (const name of ["deepseek-ai--DeepSeek-V2-Lite", "moonshotai--Moonlight-16B-A3B", "moonshotai--Kimi-K2-Instruct"]) {
    expect(modelOf(read(name)).moe?.router, name).toMatchObject({ balance: "seq_aux_loss", aux_coeff: 0.001 });
    expect(importHf(read(name), name).notes.join("\n"), name).toContain("aux_loss_alpha and seq_aux");
  }
  const routerOf = (change: object) => modelOf({ ...lite, ...change }).moe?.router;
  expect(routerOf({ seq_aux: undefined })).toMatchObject({ balance: "seq_aux_loss", aux_coeff: 0.001 });
  expect(routerOf({ seq_aux: false })).toMatchObject({ balance: "aux_loss", aux_coeff: 0.001 });
  for (const off of [0, null, undefined]) expect(routerOf({ aux_loss_alpha: off })).toMatchObject({ balance: "none", aux_coeff: 0 });
  expect(complaint(() => importHf({ ...lite, aux_loss_alpha: "x" }, "a"))).toContain('aux_loss_alpha is "x"; expected a number');
});

test("kimi_k2 is deepseek_v3 under another name", () => {
  const kimi = read("moonshotai--Kimi-K2-Instruct") as object;
  expect(modelOf(kimi)).toEqual(modelOf({ ...kimi, model_type: "deepseek_v3" }));
  expect(complaint(() => importHf({ ...kimi, topk_method: "greedy" }, "a"))).toMatch(/this kimi_k2 config.*\n.*topk_method "greedy"/);
});

test("parameters are counted exactly, in layers of both kinds", () => {
  const graphCount = (job: Job) =>
    addBackward(buildModel(job)).parameters.reduce((sum, v) => sum + (v.leaf?.tiedTo ? 0 : elementsOf(v.sizes)), 0);
  const of = (model: object, name: string) => jobOf({ name, model, train: { steps: 1, optimizer: { lr: 1 } }, data: { path: "x" } });
  const jobs = references.map((name) =>
    of(importHf(JSON.parse(readFileSync(fixture(`hf/${name}/config.json`), "utf8")), name).job.model, name),
  );
  const kinds = { hidden: 64, heads: 4, vocab: 256, seq: 64, tie_embeddings: true, qkv_bias: true, out_bias: true };
  const moe = { experts: 4, top_k: 2, ffn: 32, latent: 16, shared: { ffn: 64, gate: true }, router: { aux_coeff: 0.01 } };
  jobs.push(of({ ...kinds, layers: 3, moe: { ...moe, layers: { first_dense: 1, every: 2 } }, mtp: { layers: 2 } }, "latent and mtp"));
  const layernorm = { norm: { type: "layernorm" }, activation: "gelu", mlp_bias: true, positions: "learned", max_positions: 80 };
  jobs.push(of({ ...kinds, ...layernorm, layers: 2, qk_norm: "head" }, "layer norms, biases, positions"));
  const biased = { ...moe, bias: true, router: { ...moe.router, bias: true } };
  jobs.push(of({ ...kinds, ...layernorm, layers: 2, moe: biased }, "experts with biases and without gates"));
  const mla = { kv_rank: 12, q_rank: 10, nope_dim: 6, rope_dim: 4, v_dim: 5 };
  const latent = { ...kinds, qkv_bias: false, layers: 2 };
  for (const norm of [false, true])
    jobs.push(of({ ...latent, norm: { type: "layernorm" }, mla: { ...mla, norm } }, `latents, norm ${norm}`));
  for (const job of jobs) expect(parameterCount(job.model), job.name).toBe(graphCount(job));
  // a checkpoint of rankc has the same parameters
  for (const job of jobs) {
    const graph = addBackward(buildModel(job)).parameters.flatMap(({ leaf, sizes }) =>
      leaf && !leaf.tiedTo ? [[leaf.name, [...sizes]]] : [],
    );
    const names = new Map(parametersOf(job.model).map(({ name, shape }) => [name, sizesOf(shape)]));
    expect([...names].sort(), job.name).toEqual([...new Map(graph as [string, number[]][])].sort());
  }

  expect(parameterCount(modelOf(read("deepseek-ai--DeepSeek-V3")))).toBe(671_026_419_200);
});

test("the memory note and the device follow from 18 bytes a parameter", () => {
  const { job, notes } = importHf(read("deepseek-ai--DeepSeek-V3"), "v3");
  expect(notes.join("\n")).toContain("take about 12,078 GB");
  expect(job.cluster?.device).toBe("b200-192gb");
});

test("a window shorter than the model's context is a limit on model.seq", () => {
  const mistral = read("mistralai--Mistral-7B-v0.1") as object;
  const notes = (change: object) => importHf({ ...mistral, ...change }, "a").notes.join("\n");
  expect(notes({})).toContain("model.seq: keep it at 4096 or less. In this model a token attends to the last 4096 tokens (sliding_window)");
  for (const wide of [null, 32768]) expect(notes({ sliding_window: wide })).not.toContain("sliding_window");
  expect(complaint(() => notes({ sliding_window: 1024 }))).toContain("sliding_window 1024 is shorter than a sequence of 4096");
  expect(complaint(() => notes({ layer_types: ["full_attention", "linear_attention"] }))).toContain('layer_types "linear_attention"');
});

test.each(["rope_scaling", "rope_parameters", "quantization_config"])("%s that is not an object is refused", (key) => {
  const mistral = read("mistralai--Mistral-7B-v0.1") as object;
  for (const value of ["yarn", [4], 2]) expect(complaint(() => importHf({ ...mistral, [key]: value }, "a"))).toContain(`${key} is `);
  expect(importHf({ ...mistral, [key]: null }, "a").job.model.rope).toEqual(importHf(mistral, "a").job.model.rope);
});

test("the model of quantized weights is imported, with a note on converting them", () => {
  const fp8 = read("Qwen--Qwen3-30B-A3B-FP8") as object;
  expect(modelOf(fp8)).toEqual(modelOf({ ...fp8, quantization_config: undefined }));
  expect(importHf(fp8, "a").notes.join("\n")).toContain(
    'quantized (quantization_config, "fp8"): convert them to 16 bits before --init-from',
  );
  expect(importHf({ ...fp8, quantization_config: undefined }, "a").notes.join("\n")).not.toContain("quantiz");
});

test("many experts get a router in fp32, with a note", () => {
  const qwen = read("Qwen--Qwen3-235B-A22B") as object;
  expect(modelOf(qwen).moe?.router.precision).toBe("fp32");
  expect(importHf(qwen, "a").notes.join("\n")).toContain("logits of 128 experts are often equal in bf16");
  expect(modelOf({ ...qwen, num_experts: 16 }).moe?.router.precision).toBe("model");
});

test("types that cannot be imported are not listed; a text_config that can is named", () => {
  const message = complaint(() => importHf({ model_type: "gpt2" }, "a"));
  expect(message).toContain("kimi_k2, llama, mistral");
  expect(message).not.toContain("gpt_oss");
  for (const key of ["text_config", "language_config", "llm_config"]) {
    const outer = { model_type: "several", [key]: read("moonshotai--Kimi-K2-Instruct") };
    expect(complaint(() => importHf(outer, "a"))).toContain(`its ${key}, of type "kimi_k2", can; write the value of ${key} to a file`);
  }
});

test("values are shown with at most 300 characters, however long or deep", () => {
  const llama = read("meta-llama--Meta-Llama-3.1-405B") as object;
  const deep = JSON.parse(`${"[".repeat(1e5)}${"]".repeat(1e5)}`);
  for (const value of ["x".repeat(1e6), [..."x".repeat(1e5)], deep, { a: "x".repeat(1e4) }])
    for (const key of [
      "model_type",
      "hidden_size",
      "hidden_act",
      "rope_theta",
      "mlp_bias",
      "rope_scaling",
      "layer_types",
      "partial_rotary_factor",
    ])
      try {
        importHf({ ...llama, [key]: key === "rope_scaling" ? { type: value } : value }, "a");
      } catch (error) {
        expect(error).toBeInstanceOf(Trouble);
        expect((error as Trouble).message.length, key).toBeLessThan(600);
      }
  expect(importHf({ ...llama, torch_dtype: "x".repeat(1e4) }, "a").notes.join("\n").length).toBeLessThan(1200);
});

test("Python's literals, a byte order mark, a directory and 3 MB are read; the name is the directory's", () => {
  const model = join(folder, "some\rmodel");
  mkdirSync(model);
  const text = readFileSync(fixture("hf-configs/meta-llama--Meta-Llama-3.1-405B.json"), "utf8");
  const labels = Object.fromEntries(Array.from({ length: 1e5 }, (_, i) => [i, `a label "NaN" \\ of 30 letters ${i}`]));
  const extra = `"a": [0.0, Infinity, -Infinity], "b": NaN, "id2label": ${JSON.stringify(labels)},`;
  writeFileSync(join(model, "config.json"), `\ufeff${text.replace("{", `{${extra}`)}`);
  const file = readConfigFile(model);
  expect(file.text.length).toBeGreaterThan(3e6);
  expect(file).toMatchObject({ file: join(model, "config.json"), name: "some\rmodel" });
  const config = parseConfig(file.text, file.file) as Record<string, unknown>;
  expect(config).toMatchObject({ a: [0, Infinity, -Infinity], id2label: { 7: 'a label "NaN" \\ of 30 letters 7' } });
  expect(parse(importHfText(config, file.name))).toEqual(importHf(config, file.name).job);
  for (const literal of ["NaN", "Infinity"])
    expect(complaint(() => importHf(parseConfig(text.replace("500000.0", literal), "a"), "a"))).toMatch(
      /rope_theta is "?(NaN|Infinity)"?; expected/,
    );
  for (const broken of ['{"a', '{"a\\', "{a: 1}", "NaN NaN", '{"a": nan}']) complaint(() => parseConfig(broken, "a"));
  expect(complaint(() => readConfigFile(folder))).toContain("config.json does not exist");
  expect(readConfigFile(fixture("hf-configs/mistralai--Mistral-7B-v0.1.json")).name).toBe("mistralai--Mistral-7B-v0.1");
});

test("a long list of dense layers is looked up in constant time", () => {
  const qwen = read("Qwen--Qwen3-235B-A22B") as object;
  const many = { ...qwen, num_hidden_layers: 4096, mlp_only_layers: Array.from({ length: 4e5 }, (_, i) => i + 4096) };
  expect(modelOf(many).moe?.layers).toBe("all");
});
