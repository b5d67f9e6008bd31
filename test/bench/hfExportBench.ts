/**
 * Exports the models of test/fixtures/hf with the command line: a checkpoint of the initial weights, then `export hf` in bf16 and fp32, with
 * tensors for each expert and fused. test/bench/hf_export.py then loads every folder with transformers and compares logits.
 *
 *   node --import tsx/esm test/bench/hfExportBench.ts OUT && python3 test/bench/hf_export.py OUT
 */
import { execFileSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { root } from "../support/checkout.ts";
import { fixture } from "../support/job.ts";
import { referenceJob, references } from "../support/referenceJobs.ts";

const [out = "exported"] = process.argv.slice(2);
mkdirSync(out, { recursive: true });
for (const name of references) {
  const folder = join(out, name);
  rmSync(folder, { recursive: true, force: true });
  const save = join(folder, "checkpoints");
  const run = await openRun(compile(referenceJob(name)).plan, {
    ...{ baseDir: fixture(""), initFrom: fixture(`hf/${name}/model.safetensors`), save, version: "export" },
  });
  await run.save();
  await run.close();
  for (const [kind, options] of Object.entries({
    fp32: ["--dtype", "fp32", "--max-shard", "200KB"],
    "fp32-fused": ["--dtype", "fp32", "--fused"],
    bf16: [],
  }))
    process.stdout.write(
      execFileSync(
        process.execPath,
        [...process.execArgv, join(root, "src/cli/main.ts"), "export", "hf", save, "-o", join(folder, kind), ...options],
        { encoding: "utf8" },
      ),
    );
}
