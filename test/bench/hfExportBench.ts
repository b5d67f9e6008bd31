/**
 * Exports models of every family that `import hf` reads, with rankc's logits beside them, for test/bench/hf_export.py, which loads each
 * folder with transformers and compares. The models are those of test/fixtures/hf and small dense ones of the other families. Each trains
 * five steps, so that no gain is 1 and no bias 0; a checkpoint, then `export hf`: in bf16 in small files, and with fused experts. rankc reads
 * the exported weights again for its logits, in fp32 and in bf16.
 *
 *   node --import tsx/esm test/bench/hfExportBench.ts OUT [NAME ...] && python3 test/bench/hf_export.py OUT
 */
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { root } from "../support/checkout.ts";
import { byPosition, fixture, jobOf } from "../support/job.ts";
import { references } from "../support/referenceJobs.ts";

const [SEQUENCES, SEQ, STEPS] = [2, 64, 5];
const small = {
  ...{ hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 2, intermediate_size: 96, vocab_size: 256 },
  ...{ max_position_embeddings: SEQ, rms_norm_eps: 1e-5, rope_theta: 1e4, tie_word_embeddings: false, hidden_act: "silu" },
};
/** Configs of families without a checkpoint in test/fixtures/hf. */
const others: Readonly<Record<string, object>> = {
  "mistral-tiny": { ...small, model_type: "mistral", head_dim: 16, sliding_window: null },
  "qwen2-tiny": { ...small, model_type: "qwen2" },
  "qwen3-tiny": { ...small, model_type: "qwen3", head_dim: 32 },
};

function jobFor(name: string, precision: "fp32" | "bf16") {
  const config = others[name] ?? JSON.parse(readFileSync(fixture(`hf/${name}/config.json`), "utf8"));
  const { model } = importHf(config, name).job;
  return jobOf({
    ...{ name, model: { ...model, seq: SEQ }, data: { path: "corpus.txt", tokenizer: "bytes", order: "sequential" } },
    train: { micro_batch: 1, global_batch: SEQUENCES, steps: STEPS, precision, init: { std: 0.05 }, optimizer: { lr: 1e-3 } },
  });
}

/** Trains a model and saves it. */
async function train(name: string, save: string): Promise<void> {
  const start = others[name] ? {} : { initFrom: fixture(`hf/${name}/model.safetensors`) };
  const run = await openRun(compile(jobFor(name, "fp32")).plan, { ...{ baseDir: fixture(""), save, version: "export" }, ...start });
  for (let step = 0; step < STEPS; step++) await run.step();
  await run.save();
  await run.close();
}

/** Returns rankc's logits [tokens, vocabulary] of the first batch, with the weights of a folder. */
async function logitsOf(name: string, precision: "fp32" | "bf16", initFrom: string): Promise<Float32Array> {
  const { plan } = compile(jobFor(name, precision));
  const run = await openRun(plan, { baseDir: fixture(""), initFrom, watch: ["logits"] });
  await run.step();
  const logits = (await run.watched("logits")).flatMap((tensor) => [...byPosition(tensor, plan.job)]);
  await run.close();
  return Float32Array.from(logits);
}

const [out = "exported", ...asked] = process.argv.slice(2);
mkdirSync(out, { recursive: true });
const corpus = readFileSync(fixture("corpus.txt"));
for (const name of asked.length > 0 ? asked : [...references, ...Object.keys(others)]) {
  const folder = join(out, name);
  const save = join(folder, "checkpoints");
  rmSync(folder, { recursive: true, force: true });
  await train(name, save);
  const kinds = { bf16: ["--max-shard", "200KB"], ...(/moe|mixtral|deepseek/.test(name) && { fused: ["--fused"] }) };
  for (const [kind, options] of Object.entries(kinds)) {
    const words = [join(root, "src/cli/main.ts"), "export", "hf", save, "-o", join(folder, kind), ...options];
    process.stdout.write(execFileSync(process.execPath, [...process.execArgv, ...words], { encoding: "utf8" }));
  }
  rmSync(save, { recursive: true });
  const shape = [SEQUENCES, SEQ, 256];
  writeSafetensors(join(folder, "logits.safetensors"), [
    { name: "input_ids", dtype: "F32", shape: [SEQUENCES, SEQ], data: Float32Array.from(corpus.subarray(0, SEQUENCES * SEQ)) },
    { name: "fp32", dtype: "F32", shape, data: await logitsOf(name, "fp32", join(folder, "bf16")) },
    { name: "bf16", dtype: "F32", shape, data: await logitsOf(name, "bf16", join(folder, "bf16")) },
  ]);
}
