/**
 * Memory: the one rule that needs a compiled program. Where chunks repeat one layer, the peak of a job follows from its compiled form
 * at two and at three layers a chunk; where layers differ, all are compiled. The plan itself then holds the exact figure.
 */
import { depthsOf, devices, hasExperts, type Job } from "../../schemas/job.ts";
import { lower } from "../lower.ts";
import { layOut } from "../memory.ts";
import { buildMesh } from "../mesh.ts";
import { buildModel } from "../model.ts";
import { pipelineOf, stageOfVirtual } from "../pipeline.ts";
import { recomputed } from "../recompute.ts";
import { schedule } from "../schedule.ts";
import { shard } from "../shard.ts";
import { addBackward } from "../train.ts";
import { bytesText } from "../units.ts";
import { type Rule, rule } from "./rule.ts";

/** Bytes that the stage with the highest peak needs, and which stage it is. On the CPU one process holds all ranks. */
export function peakOf(job: Job): { bytes: number; who: string } {
  const perChunk = job.model.layers / (job.parallel.pipeline * job.parallel.virtual_pipeline);
  const two = alike(job) ? peaksAt(job, Math.min(2, perChunk)) : peaksOf(job);
  const three = alike(job) && perChunk > 2 ? peaksAt(job, 3) : two;
  const peaks = two.map((bytes, s) => bytes + Math.max(0, perChunk - 2) * (three[s]! - bytes));
  if (job.cluster.device === "cpu") {
    const ranks = job.parallel.world / job.parallel.pipeline;
    return { bytes: peaks.reduce((sum, n) => sum + n * ranks, 0), who: "all ranks together need" };
  }
  const bytes = Math.max(...peaks);
  return { bytes, who: `a rank of stage ${peaks.indexOf(bytes)} needs` };
}

/** Whether all chunks are as many layers of one kind. */
const alike = ({ model, parallel }: Job): boolean =>
  parallel.layout === null &&
  Array.from({ length: model.layers }, (_, i) => hasExperts(model, i)).every((has, _, [first]) => has === first);

const peaksAt = (job: Job, perChunk: number): number[] =>
  peaksOf({ ...job, model: { ...job.model, layers: perChunk * job.parallel.pipeline * job.parallel.virtual_pipeline } });

function peaksOf(job: Job): number[] {
  const mesh = buildMesh(job);
  const pipeline = pipelineOf(job);
  const graph = addBackward(buildModel(job), recomputed(job, pipeline));
  const sharded = shard(graph, mesh, {
    distributedOptimizer: job.parallel.distributed_optimizer,
    shares: (f) => mesh.factors[f]!.stride < mesh.per_stage / job.parallel.optimizer_instances,
    stageOf: (position) => pipeline.of[position]!,
    roleOf: (virtual) => stageOfVirtual(pipeline, virtual),
  });
  const order = schedule(job, pipeline.chunks);
  return lower(job, mesh, { graph, sharded, pipeline, order }).map((p) => layOut(p).peak);
}

/** More than one rank can possibly need, in closed form: when that fits easily, nothing is compiled. Bytes. */
function ceiling({ model: m, parallel: p, train }: Job): number {
  const { mla } = m;
  const latents = mla ? (mla.q_rank ?? 0) + mla.kv_rank + mla.rope_dim : 0;
  const heads = mla ? m.heads * (m.head_dim + mla.v_dim) + latents : (m.heads + m.kv_heads) * m.head_dim;
  const ffn = m.moe ? Math.max(m.ffn, m.moe.experts * m.moe.ffn + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const ahead = depthsOf(m);
  const layers = m.layers + ahead;
  const parameters =
    2 * m.vocab * m.hidden +
    layers * Math.max(m.hidden, latents) * (2 * heads + 3 * ffn + (m.moe?.experts ?? 0) + 2) +
    ahead * 3 * m.hidden ** 2;
  // rows of a token at most: capacity may be padded with any, and experts may all choose the same
  const rows = m.moe && (m.moe.capacity !== "dropless" || m.moe.router.type === "expert_choice") ? m.moe.experts : (m.moe?.top_k ?? 0);
  const active = m.moe ? Math.max(m.ffn, rows * (m.moe.ffn + m.hidden) + 4 * m.moe.experts + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const perToken = layers * (8 * m.hidden + 8 * heads + 8 * active) + (1 + ahead) * 8 * m.vocab + ahead * 16 * m.hidden;
  return 24 * parameters + 8 * perToken * train.micro_batch * p.data * m.seq * p.pipeline;
}

export const memory: Rule = rule({
  code: "C510",
  title: "the plan does not fit the device",
  why: "A rank that runs out of memory stops the whole job, often only after minutes of start-up. The peak is known now. The job can still be compiled and studied.",
  level: "warning",
  *check(job) {
    const device = devices[job.cluster.device];
    const ranks = job.cluster.device === "cpu" ? job.parallel.world : 1;
    if (ceiling(job) * ranks < device.memory) return;
    const { bytes, who } = peakOf(job);
    if (bytes <= device.memory) return;
    const { parallel: p, model } = job;
    const doubled = [
      ...(p.distributed_optimizer ? [] : [{ "parallel.distributed_optimizer": true }]),
      ...(model.moe ? [{ "parallel.expert": p.expert * 2 }, { "parallel.expert_tensor": p.expert_tensor * 2 }] : []),
      { "parallel.pipeline": p.pipeline * 2 },
      { "parallel.tensor": p.tensor * 2, "parallel.sequence": true },
      ...(model.moe
        ? [{ "parallel.expert_tensor": p.expert_tensor * 4 }, { "parallel.expert": p.expert * 2, "parallel.pipeline": p.pipeline * 2 }]
        : []),
      { "parallel.pipeline": p.pipeline * 4 },
      ...(model.moe ? [{ "parallel.expert": p.expert * 2, "parallel.pipeline": p.pipeline * 4 }] : []),
    ];
    // a job with room to grow: more ranks, each with a smaller part
    const grown = [2, 4, 8].map((n) => ({ "parallel.world": p.world * n, "parallel.tensor": p.tensor * n, "parallel.sequence": true }));
    const larger = Object.entries(devices)
      .filter(([, d]) => d.memory > device.memory)
      .sort(([, a], [, b]) => a.memory - b.memory);
    yield {
      at: "cluster.device",
      related: ["parallel.expert", "parallel.tensor"],
      found: `${who} ${bytesText(bytes)} at the peak; ${job.cluster.device} has ${bytesText(device.memory)}`,
      fix: "cut parameters or layers over more ranks, or take a larger device; `rankc inspect` shows what fills it",
      tries: [...doubled, ...grown, ...larger.map(([name]) => ({ "cluster.device": name }))],
    };
  },
  bad: "model: {layers: 32, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8, vocab: 32000, seq: 2048}",
});
