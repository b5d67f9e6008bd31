/**
 * Memory: the one rule that needs a compiled program. Where stages repeat one layer, the peak of a job follows from its
 * compiled form at two and at three layers a stage; where some layers have experts and some not, all are compiled. The plan itself
 * then holds the exact figure.
 */
import { devices, isMoe, type Job } from "../../schemas/job.ts";
import { lower } from "../lower.ts";
import { layOut } from "../memory.ts";
import { buildMesh, stageOf } from "../mesh.ts";
import { buildModel } from "../model.ts";
import { schedule } from "../schedule.ts";
import { shard } from "../shard.ts";
import { addBackward } from "../train.ts";
import { bytesText } from "../units.ts";
import { type Rule, rule } from "./rule.ts";

/** Bytes that the stage with the highest peak needs, and which stage it is. On the CPU one process holds all ranks. */
export function peakOf(job: Job): { bytes: number; who: string } {
  const perStage = job.model.layers / job.parallel.pipeline;
  const two = peaksAt(job, alike(job) ? Math.min(2, perStage) : perStage);
  const three = alike(job) && perStage > 2 ? peaksAt(job, 3) : two;
  const peaks = two.map((bytes, s) => bytes + Math.max(0, perStage - 2) * (three[s]! - bytes));
  if (job.cluster.device === "cpu") {
    const ranks = job.parallel.world / job.parallel.pipeline;
    return { bytes: peaks.reduce((sum, n) => sum + n * ranks, 0), who: "all ranks together need" };
  }
  const bytes = Math.max(...peaks);
  return { bytes, who: `a rank of stage ${peaks.indexOf(bytes)} needs` };
}

/** Whether all layers are of one kind. */
const alike = ({ model }: Job): boolean =>
  Array.from({ length: model.layers }, (_, i) => isMoe(model, i)).every((moe, _, [first]) => moe === first);

function peaksAt(job: Job, layersPerStage: number): number[] {
  const small = { ...job, model: { ...job.model, layers: layersPerStage * job.parallel.pipeline } };
  const mesh = buildMesh(small);
  const graph = addBackward(buildModel(small));
  const sharded = shard(graph, mesh, {
    distributedOptimizer: small.parallel.distributed_optimizer,
    stageOf: (position) => stageOf(small, position),
  });
  return lower(small, mesh, graph, sharded, schedule(small)).map((p) => layOut(p).peak);
}

/** More than one rank can possibly need, in closed form: when that fits easily, nothing is compiled. Bytes. */
function ceiling({ model: m, parallel: p, train }: Job): number {
  const heads = (m.heads + m.kv_heads) * m.head_dim;
  const ffn = m.moe ? Math.max(m.ffn, m.moe.experts * m.moe.ffn + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const parameters = 2 * m.vocab * m.hidden + m.layers * m.hidden * (2 * heads + 3 * ffn + (m.moe?.experts ?? 0) + 2);
  // rows of a token at most: capacity may be padded with any, and experts may all choose the same
  const rows = m.moe && (m.moe.capacity !== "dropless" || m.moe.router.type === "expert_choice") ? m.moe.experts : (m.moe?.top_k ?? 0);
  const active = m.moe ? Math.max(m.ffn, rows * (m.moe.ffn + m.hidden) + 4 * m.moe.experts + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const perToken = m.layers * (8 * m.hidden + 8 * heads + 8 * active) + 8 * m.vocab;
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
