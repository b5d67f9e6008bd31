/** Drawn jobs whose estimates laws are about. */
import fc from "fast-check";
import type { Job } from "../../schemas/job.ts";
import { jobRules } from "../../src/rules/jobRules.ts";
import { jobOf } from "./job.ts";

/** Draws a job: a pipeline of layers, some of them with experts, with any recomputation, schedule and overlap. */
export const estimatedJobs = fc
  .record({
    pipeline: fc.constantFrom(2, 4, 8),
    virtual_pipeline: fc.constantFrom(1, 2),
    tensor: fc.constantFrom(1, 2),
    context: fc.constantFrom(1, 1, 2),
    data: fc.constantFrom(1, 2, 4),
    perChunk: fc.constantFrom(1, 2),
    ends: fc.constantFrom(0, 1),
    firstDense: fc.constantFrom(0, 1, 2),
    moe: fc.boolean(),
    tied: fc.boolean(),
    depths: fc.constantFrom(0, 1),
    recompute: fc.constantFrom("none", "selective", "full"),
    zeroBubble: fc.boolean(),
    buckets: fc.boolean(),
    shared: fc.boolean(),
    pairs: fc.boolean(),
    dispatch: fc.constantFrom(undefined, "once", "once_per_node"),
    parts: fc.boolean(),
    gpus_per_node: fc.constantFrom(2, 4, 8),
  })
  .map((d) => {
    const { pipeline, tensor, data, moe, buckets } = d;
    const virtual_pipeline = d.zeroBubble ? 1 : d.virtual_pipeline;
    const places = pipeline * virtual_pipeline * d.perChunk;
    const layers = places - d.ends * (d.perChunk > 1 ? 2 : 0);
    const middle = `t*${d.perChunk}`;
    const layout =
      layers === places
        ? `Et*${d.perChunk}|${`${middle}|`.repeat(pipeline * virtual_pipeline - 2)}${middle}${d.depths ? "m" : ""}L`
        : `Et|${`${middle}|`.repeat(pipeline * virtual_pipeline - 2)}t${d.depths ? "m" : ""}L`;
    const model = {
      ...{ layers, hidden: 64, ffn: 128, heads: 4, vocab: 256, seq: 64, tie_embeddings: d.tied },
      ...(d.depths > 0 && { mtp: { layers: 1 } }),
      ...(moe && {
        moe: {
          ...{ experts: 4, top_k: 2, ffn: 64, layers: { first_dense: Math.min(d.firstDense, layers - 1) } },
          ...(d.shared && { shared: { ffn: 64 } }),
          ...(d.dispatch && { dispatch: d.dispatch }),
        },
      }),
    };
    return jobOf({
      ...{ name: "drawn", model },
      parallel: {
        ...{
          world: pipeline * tensor * data * d.context,
          tensor,
          context: d.context,
          sequence: tensor > 1,
          pipeline,
          virtual_pipeline,
          layout,
        },
        ...{ schedule: d.zeroBubble ? "zero_bubble" : "1f1b", distributed_optimizer: true, ...(moe && { expert: data }) },
        ...(buckets && { gradient_bucket: 1, parameter_bucket: 1 }),
        ...(moe && data > 1 && (d.pairs && !d.zeroBubble ? { expert_overlap: "interleave" } : d.shared && { expert_overlap: "shared" })),
        ...(tensor > 1 && d.parts && { tensor_overlap: moe ? "backward" : 2 }),
      },
      train: {
        ...{ micro_batch: 1, global_batch: 2 * pipeline * data, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
        recompute: { mode: d.recompute, ...(d.recompute === "selective" && { modules: ["layernorm"] }) },
      },
      ...{ data: { path: "corpus.txt" }, cluster: { device: "h100-80gb", gpus_per_node: d.gpus_per_node } },
    });
  });

/** Whether no rule reports an error. */
export const isValidJob = (job: Job): boolean => jobRules.every((rule) => rule.level !== "error" || [...rule.check(job)].length === 0);
