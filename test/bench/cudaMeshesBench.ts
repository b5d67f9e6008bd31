/**
 * Ranks on a GPU host: plans of mixtral-tiny on one GPU and on meshes of two, rankc packed as a user packs it, and what transformers
 * found, in a folder; then test/bench/cuda_meshes.py on it, where the GPUs are. `--out FOLDER` (.rankc/host). `--no-pack`: no archive, for
 * cuda_meshes.py --rankc with a command line that is installed there.
 */
import { cpSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { compileOptions, cubinFile } from "../../runtime/cuda/kernels.ts";
import { pack } from "../../src/cli/archive.ts";
import { compileCubins } from "../../src/codegen/cubins.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { root } from "../support/checkout.ts";
import { fixture } from "../support/job.ts";
import { expectedOf, referenceJob } from "../support/referenceJobs.ts";

const ARCH = "sm_90a";
const MODEL = "mixtral-tiny";
const meshes: Readonly<Record<string, { readonly parallel: object; readonly dispatch?: "all_gather" }>> = {
  "one GPU": { parallel: {} },
  "tensor 2, sequence": { parallel: { world: 2, tensor: 2, sequence: true } },
  "tensor 2, expert 2": { parallel: { world: 2, tensor: 2, sequence: true, expert: 2 } },
  "expert 2": { parallel: { world: 2, expert: 2 } },
  "expert 2, tokens gathered": { parallel: { world: 2, expert: 2 }, dispatch: "all_gather" },
  "pipeline 2": { parallel: { world: 2, pipeline: 2 } },
  "pipeline 2, two chunks": { parallel: { world: 2, pipeline: 2, virtual_pipeline: 2, layout: "E|t|t|L" } },
  "pipeline 2, zero-bubble": { parallel: { world: 2, pipeline: 2, schedule: "zero_bubble" } },
  "context 2, ring": { parallel: { world: 2, context: 2, context_method: "ring", expert: 2 } },
  "context 2, all-gather": { parallel: { world: 2, context: 2, context_method: "all_gather", expert: 2 } },
  "data 2, distributed optimizer": { parallel: { world: 2, distributed_optimizer: true } },
};

const { values } = parseArgs({
  options: { out: { type: "string", default: join(root, ".rankc/host") }, "no-pack": { type: "boolean", default: false } },
});
const folder = values.out;
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });

const runs: object[] = [];
for (const [name, { parallel, dispatch }] of Object.entries(meshes)) {
  const plan = `plan-${name.replaceAll(/[^a-z0-9]+/g, "-")}`;
  const job = referenceJob(MODEL, parallel);
  const { moe } = job.model;
  const onProgress = dispatch && moe ? { ...job, model: { ...job.model, moe: { ...moe, dispatch } } } : job;
  const compiled = compile(onProgress, { target: await loadTarget(`cuda:${ARCH}`) });
  mkdirSync(join(folder, plan, "kernels"), { recursive: true });
  writeFileSync(join(folder, plan, "plan.json"), printPlan(compiled.plan));
  for (const [file, text] of compiled.sources) writeFileSync(join(folder, plan, "kernels", file), text);
  runs.push({ name, plan, ranks: compiled.plan.mesh.world });
  // one plan goes into the archive with its cubins; the host compiles the kernels of the others
  if (name !== "one GPU" || values["no-pack"]) continue;
  const units = compiled.plan.kernels.map((k) => ({
    kernel: k.id,
    text: compiled.sources.get(k.source!.file)!,
    cubin: cubinFile(k, ARCH),
  }));
  await compileCubins(join(folder, plan, "kernels"), units, { arch: ARCH, options: compileOptions, onProgress: () => {} });
  const { bytes } = await pack({ plan: join(folder, plan), out: join(folder, "rankc.tar.xz") });
  process.stdout.write(`rankc.tar.xz: ${bytes} bytes, with ${units.length} cubins\n`);
  rmSync(join(folder, plan), { recursive: true });
}
cpSync(fixture("corpus.txt"), join(folder, "corpus.txt"));
cpSync(fixture(`hf/${MODEL}/model.safetensors`), join(folder, "model.safetensors"));
writeFileSync(join(folder, "host.json"), `${JSON.stringify({ model: MODEL, losses: expectedOf(MODEL).losses, runs }, null, 1)}\n`);
process.stdout.write(
  `${runs.length} plans in ${folder}. Where there are two GPUs: python3 test/bench/cuda_meshes.py ${folder} --out RESULTS\n`,
);
