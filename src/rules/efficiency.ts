/** Rules P, C: time that is lost to idle stages, to the order of ranks, and to communication. The estimates are of the plan, in closed form. */
import { type Device, deviceOf } from "../../schemas/devices.ts";
import { bytesOf } from "../../schemas/dtypes.ts";
import { hopsOfRows } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { pipelineOf } from "../passes/pipelineStages.ts";
import { idleShare, microbatches, stageRanks } from "./mesh.ts";
import { divisorsNear, type JobPath, type Rule, type RuleResult, rule } from "./rule.ts";

/** The largest share of a step that stages may be idle without a warning. */
const MOST_IDLE = 1 / 3;

/** The shortest layer in seconds that is judged: in shorter ones latency decides, not bandwidth. */
const SHORTEST = 1e-5;

/** What a layer costs one rank for one microbatch, forward and backward, at the peak rates of its device. */
interface LayerTimes {
  readonly arithmetic: number;
  readonly tensor: number;
  readonly expert: number;
}

const types = { fp32: "f32", bf16: "bf16", fp16: "f16" } as const;

/** Returns the times of a layer with experts, or of a dense one; undefined where the device has no links. */
function timesOf({ model: m, parallel: p, train, cluster }: Job): LayerTimes | undefined {
  const { links, peak } = deviceOf(cluster.device as Device);
  const rate = peak[types[train.precision]];
  if (links === null || rate === null) return undefined;
  const bytes = bytesOf[types[train.precision]];
  const tokens = (train.micro_batch * m.seq) / p.context;
  const own = tokens / p.tensor;
  const heads = m.heads * m.head_dim;
  const attention = m.hidden * (2 * heads + 2 * m.kv_heads * m.head_dim) + m.seq * heads;
  const matrices = m.activation.endsWith("glu") ? 3 : 2;
  const width = m.moe?.latent ?? m.hidden;
  const perToken = m.moe
    ? m.moe.top_k * matrices * width * m.moe.ffn + matrices * m.hidden * (m.moe.shared?.ffn ?? 0)
    : matrices * m.hidden * m.ffn;
  // two operations for a product and a sum; backward has twice the products of forward
  const arithmetic = (6 * own * (attention + perToken)) / rate;
  const others = (n: number): number => (n - 1) / n;
  const linkOf = (span: number): number =>
    p.world > cluster.gpus_per_node && cluster.gpus_per_node % span !== 0 ? links.network : links.host;
  // attention and a dense part gather and scatter tokens, forward and backward
  const parts = m.moe && !m.moe.shared ? 1 : 2;
  const tensor = (4 * parts * tokens * m.hidden * bytes * others(p.tensor)) / linkOf(p.tensor);
  // rows go to their experts and come back, forward and backward; or all tokens of the group are gathered
  const hops = m.moe ? hopsOfRows({ model: { moe: m.moe }, parallel: p, cluster }) : [];
  const expert = hops.reduce(
    (sum, { ranks, stride, rows }) => sum + (4 * own * rows * width * bytes * others(ranks)) / linkOf(ranks * stride),
    0,
  );
  return { arithmetic, tensor, expert };
}

const microseconds = (seconds: number): string => `${Math.round(seconds * 1e6)} µs`;

/** Rules of efficiency. */
export const efficiency: readonly Rule[] = [
  rule({
    code: "P119",
    title: "stages are idle for more than a third of the step",
    why: "A stage is idle while the pipeline fills and drains. The share falls with the number of microbatches, and with chunks that interleave.",
    level: "warning",
    *check(job) {
      const { pipeline, data } = job.parallel;
      const m = microbatches(job);
      // P108 reports fewer microbatches than stages
      if (pipeline === 1 || !stageRanks(job) || !Number.isInteger(m) || m < pipeline) return;
      const { chunks } = pipelineOf(job);
      if (!Number.isInteger(chunks) || (pipeline - 1) / (m * chunks + pipeline - 1) <= MOST_IDLE) return;
      const idle = idleShare(job, m, chunks);
      if (idle <= MOST_IDLE) return;
      yield {
        at: "parallel.pipeline",
        related: ["train.global_batch"],
        found: `${m} microbatches for ${pipeline} stages: ${Math.round(100 * idle)} % of the step is idle`,
        fix: "use more sequences per step, smaller microbatches, or chunks",
        tries: [
          ...divisorsNear(job.train.micro_batch, job.train.micro_batch).map((b) => ({ "train.micro_batch": b })),
          { "train.global_batch": job.train.micro_batch * data * pipeline * 4 },
        ],
      };
    },
    bad: "parallel: {world: 4, pipeline: 4}\ntrain: {global_batch: 4}",
  }),
  rule({
    code: "C506",
    title: "data groups cross nodes, and the other order keeps them within",
    why: "Data ranks sum the gradients of all parameters in each step; stages exchange one activation per microbatch. Between nodes a GPU has about a tenth of the bandwidth it has within one.",
    level: "warning",
    *check(job) {
      const { parallel: p, cluster: c } = job;
      const span = p.tensor * p.context * p.data;
      const isWithin = c.gpus_per_node % span === 0;
      if (p.order !== "tp-cp-ep-pp-dp" || p.pipeline === 1 || p.data === 1 || !stageRanks(job)) return;
      if (p.world <= c.gpus_per_node || !isWithin) return;
      yield {
        at: "parallel.order",
        related: ["parallel.pipeline", "cluster.gpus_per_node"],
        found: `${p.data} data ranks are ${p.tensor * p.context * p.pipeline} ranks apart on nodes of ${c.gpus_per_node} GPUs`,
        fix: "tp-cp-ep-dp-pp lets stages cross nodes instead",
        tries: [{ "parallel.order": "tp-cp-ep-dp-pp" }],
      };
    },
    bad: "parallel: {world: 16, pipeline: 4, order: tp-cp-ep-pp-dp}\ntrain: {global_batch: 64}",
  }),
  rule({
    code: "C507",
    title: "a collective takes longer than the arithmetic of a layer",
    why: "At the peak rates of the device and its links, ranks would wait for the collective most of the time, even if it ran beside the arithmetic.",
    level: "warning",
    *check(job) {
      const { parallel: p, cluster: c } = job;
      const times = stageRanks(job) ? timesOf(job) : undefined;
      if (!times || times.arithmetic < SHORTEST) return;
      const found = (at: JobPath, what: string, time: number, degree: number): RuleResult[] =>
        time <= times.arithmetic
          ? []
          : [
              {
                at,
                related: ["cluster.device"],
                found: `${what} take ${microseconds(time)} a layer, and its arithmetic ${microseconds(times.arithmetic)}`,
                fix: `a smaller degree, or one within a node of ${c.gpus_per_node} GPUs`,
                tries: divisorsNear(degree, degree).map((n) => ({ [at]: n })),
              },
            ];
      yield* found("parallel.tensor", "gathering and scattering tokens", times.tensor, p.tensor);
      yield* found("parallel.expert", "dispatch and combine", times.expert, p.expert);
    },
    bad: "model: {hidden: 2048, heads: 16, kv_heads: 16, seq: 2048, moe: {experts: 16, top_k: 8, ffn: 64, router: {aux_coeff: 0.01}}}\nparallel: {world: 8, expert: 8}\ncluster: {device: h100-80gb}",
  }),
];
