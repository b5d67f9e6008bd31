/**
 * Exports the models of test/fixtures/hf, or of another folder like it, with the command line: a checkpoint of the initial weights, then
 * `export hf` in bf16 and fp32, with tensors for each expert and fused. test/bench/hf_export.py then loads every folder with transformers and
 * compares logits; `hf_export.py --make MODELS` makes models of the families that the fixtures lack.
 *
 *   node --import tsx/esm test/bench/hfExportBench.ts OUT [MODELS] && python3 test/bench/hf_export.py OUT [MODELS]
 */
import { execFileSync } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { root } from "../support/checkout.ts";
import { fixture, jobOf } from "../support/job.ts";

const [out = "exported", models = fixture("hf")] = process.argv.slice(2);
const names = readdirSync(models, { withFileTypes: true }).flatMap((entry) => (entry.isDirectory() ? [entry.name] : []));
const kinds = { fp32: ["--dtype", "fp32", "--max-shard", "200KB"], "fp32-fused": ["--dtype", "fp32", "--fused"], bf16: [] };

mkdirSync(out, { recursive: true });
for (const name of names) {
  const [folder, from] = [join(out, name), join(models, name)];
  const { model } = importHf(JSON.parse(readFileSync(join(from, "config.json"), "utf8")), name).job;
  const job = jobOf({
    ...{ name, model: { ...model, seq: 64 }, data: { path: "corpus.txt" } },
    train: { micro_batch: 1, global_batch: 4, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
  });
  rmSync(folder, { recursive: true, force: true });
  const save = join(folder, "checkpoints");
  const run = await openRun(compile(job).plan, {
    ...{ baseDir: fixture(""), initFrom: join(from, "model.safetensors"), save, version: "export" },
  });
  await run.save();
  await run.close();
  for (const [kind, options] of Object.entries(kinds)) {
    const words = [join(root, "src/cli/main.ts"), "export", "hf", save, "-o", join(folder, kind), ...options];
    process.stdout.write(execFileSync(process.execPath, [...process.execArgv, ...words], { encoding: "utf8" }));
  }
}
