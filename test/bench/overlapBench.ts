/**
 * Estimated steps of four jobs with and without each overlap, beside published steps of the same models: `npm run bench:overlap`, with
 * names of jobs for these alone, `--rows WORD,…` for rows with a word. Kernels and links are those of the profile of Megatron's stack on an H100, and steps are CUDA graphs;
 * nothing is assumed to be hidden: what is hidden stands in the plan. Takes about ten minutes of one core.
 */
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { parse } from "yaml";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { loadDeviceTargets } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { largest } from "../../src/units.ts";
import { jobOf } from "../support/job.ts";
import { readTable } from "./estimateRows.ts";

const read = (path: string): string => readFileSync(new URL(path, import.meta.url), "utf8");
const models = parse(read("../fixtures/estimate/models.yaml"));
const deepseek = parse(read("../../plans/deepseek-v3-1024gpu/job.yaml"));

/** A job of sequences of 4,096 tokens, whose experts have an even load, as in the published runs. */
const jobFor = (name: string, parallel: object, global_batch: number) => ({
  name,
  model: {
    ...{ ...models[name], seq: 4096 },
    ...(models[name].moe && { moe: { ...models[name].moe, rows_bound: 1, router: { precision: "fp32" } } }),
  },
  parallel: { distributed_optimizer: true, ...parallel },
  train: { micro_batch: 1, global_batch, steps: 1, precision: "bf16", optimizer: { lr: 1e-4 } },
  data: { path: "corpus.txt", tokenizer: "bytes" },
  cluster: { device: "h100-80gb" },
});
const jobs: Readonly<Record<string, { readonly job: ReturnType<typeof jobFor>; readonly perNode: boolean }>> = {
  "qwen3-30b-a3b, 16 H100": { job: jobFor("Qwen3-30B-A3B", { world: 16, expert: 16 }, 1024), perNode: true },
  "mixtral-8x7b, 64 H100": { job: jobFor("Mixtral-8x7B", { world: 64, pipeline: 4, virtual_pipeline: 8, expert: 8 }, 256), perNode: false },
  "llama3-70b, 64 H100": {
    job: jobFor("Llama3-70B", { world: 64, tensor: 8, sequence: true, pipeline: 4, virtual_pipeline: 5 }, 256),
    perNode: false,
  },
  "deepseek-v3, 1024 H100": { job: deepseek, perNode: true },
};

const buckets = { gradient_bucket: 160, parameter_bucket: 80 };
/** What a row adds to a job. `ofTensor`: only to one whose tensor ranks share activations. `plain`: no library of the stack sends rows once to each node. */
interface Added {
  readonly parallel?: object;
  readonly train?: object;
  readonly moe?: object;
  readonly ofTensor?: true;
  readonly plain?: true;
}
const allWith = (expert_overlap: string): Added => ({
  parallel: { ...buckets, parameter_gather: "forward", expert_overlap },
  train: { gradient_reduction: "bf16" },
});
const all = allWith("shared");
const pairs = allWith("interleave");
/** A second microbatch does not fit into 80 GiB of a job that keeps all activations, unless less of each is kept. */
const fewer = { mode: "selective", modules: ["moe_act", "layernorm"] };
const overlaps: Readonly<Record<string, Added>> = {
  none: {},
  "gradients sent in bf16": { train: { gradient_reduction: "bf16" } },
  "buckets of gradients": { parallel: { gradient_bucket: buckets.gradient_bucket } },
  "buckets of parameters in the step": { parallel: { parameter_bucket: buckets.parameter_bucket } },
  "buckets of parameters in forward": { parallel: { parameter_bucket: buckets.parameter_bucket, parameter_gather: "forward" } },
  "expert overlap: shared": { parallel: { expert_overlap: "shared" } },
  "expert overlap: interleave": { parallel: { expert_overlap: "interleave" } },
  "tensor overlap: backward": { parallel: { tensor_overlap: "backward" }, ofTensor: true },
  "tensor overlap: 2 parts": { parallel: { tensor_overlap: 2 }, ofTensor: true },
  "tensor overlap: 4 parts": { parallel: { tensor_overlap: 4 }, ofTensor: true },
  "tensor overlap: 8 parts": { parallel: { tensor_overlap: 8 }, ofTensor: true },
  "all of them": all,
  "all of them, interleave": pairs,
  "all of them, interleave, more recomputed": { ...pairs, train: { ...pairs.train, recompute: fewer } },
  "all of them, tensor overlap: 4 parts": { ...all, parallel: { ...all.parallel, tensor_overlap: 4 }, ofTensor: true },
  "dispatch: once": { moe: { dispatch: "once" } },
  "plain exchange": { plain: true },
  "plain exchange, dispatch: once": { moe: { dispatch: "once" }, plain: true },
  "plain exchange, all of them": { ...all, plain: true },
  "dispatch: once, interleave": { parallel: { expert_overlap: "interleave" }, moe: { dispatch: "once" } },
  "plain exchange, all of them, dispatch: once": { ...all, moe: { dispatch: "once" }, plain: true },
  "dispatch: once_per_node": { moe: { dispatch: "once_per_node" } },
  "dispatch: once_per_node, interleave": { parallel: { expert_overlap: "interleave" }, moe: { dispatch: "once_per_node" } },
  "plain exchange, dispatch: once_per_node": { moe: { dispatch: "once_per_node" }, plain: true },
  "plain exchange, dispatch: once_per_node, interleave": {
    parallel: { expert_overlap: "interleave" },
    moe: { dispatch: "once_per_node" },
    plain: true,
  },
  "plain exchange, all of them, dispatch: once_per_node": { ...all, moe: { dispatch: "once_per_node" }, plain: true },
};

const { values, positionals: asked } = parseArgs({ options: { rows: { type: "string" } }, allowPositionals: true });
const words = values.rows?.split(",") ?? [];
const profile = packageProfile("h100-80gb.megatron")!;
const target = (await loadDeviceTargets())("h100-80gb");
const print = (...cells: readonly string[]): void => console.log(`| ${cells.join(" | ")} |`);
for (const [name, { job: base, perNode }] of Object.entries(jobs)) {
  if (asked.length > 0 && !asked.some((word) => name.startsWith(word))) continue;
  console.log("");
  print(name, "step, s", "TFLOP/s a GPU", "waits for data, s", "waits for experts, s", "waits for tensor, s", "peak, GiB");
  print(..."-------".split(""));
  for (const [what, { parallel = {}, train = {}, moe = {}, ofTensor, plain }] of Object.entries(overlaps)) {
    // jobs that recompute anyway choose their modules themselves
    if ("recompute" in train && "recompute" in base.train) continue;
    if (words.length > 0 && !words.some((word) => what.includes(word))) continue;
    const isDense = base.model.moe === undefined;
    if ((ofTensor && !("sequence" in base.parallel)) || (isDense && /expert|interleave|dispatch|plain/.test(what))) continue;
    const model = isDense ? base.model : { ...base.model, moe: { ...base.model.moe, ...moe } };
    const job = jobOf({ ...base, model, parallel: { ...base.parallel, ...parallel }, train: { ...base.train, ...train } });
    const { plan } = compile(job, { target });
    const { seconds, model_flops_per_second, stages } = estimate(plan, {
      profile,
      assumed: { sendsPerNode: perNode && !plain, captured: true },
    });
    const exposed = (has: (axes: string) => boolean): number =>
      largest(stages, ({ parts }) => [...parts.exposed].reduce((sum, [axes, s]) => sum + (has(axes) ? s : 0), 0));
    print(
      what,
      seconds.toFixed(2),
      (model_flops_per_second / 1e12).toFixed(0),
      ...[
        exposed((axes) => axes !== "ep" && axes.includes("dp")),
        exposed((axes) => /^ep\b/.test(axes)),
        exposed((axes) => axes === "tp"),
      ].map((s) => s.toFixed(3)),
      (largest(plan.memory, (m) => m.peak) / 2 ** 30).toFixed(1),
    );
  }
  for (const row of readTable("overlap.tsv").filter(({ job }) => job === name))
    print(`published: ${row.what}`, row.seconds ?? "", row.tflops ?? "", "", "", "", "");
}
