/** The memory rule, the only rule that needs the memory of compiled programs. The caller supplies the peaks (all.ts), so that a job that needs none loads no compiler. */
import { deviceOf, devices } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { type MemoryBreakdown, peakOfParts } from "../analysis/memoryBreakdown.ts";
import { bytesText } from "../units.ts";
import { type Rule, rule } from "./rule.ts";

/** Returns whether one process has the memory of all ranks. */
const inOneProcess = ({ cluster }: Job): boolean => deviceOf(cluster.device).links === null;

/** The highest peak in bytes, and who has it: the start of a sentence. */
export interface Peak {
  readonly bytes: number;
  readonly who: string;
  /** The bytes are an upper bound. */
  readonly isBound?: true;
}

/** Returns the highest peak of a job. With `room`, the caller asks whether it is at most so many bytes: the peak may then be an upper bound that is. */
export type PeakOf = (job: Job, room?: number) => Peak;

/** Returns the highest peak of the stages of a job. On the CPU one process holds all ranks. */
export function highestPeak(job: Job, stages: readonly MemoryBreakdown[]): Peak {
  const peaks = stages.map(peakOfParts);
  if (inOneProcess(job)) {
    const ranks = job.parallel.world / job.parallel.pipeline;
    return { bytes: peaks.reduce((sum, n) => sum + n * ranks, 0), who: "all ranks together need" };
  }
  const bytes = peaks.reduce((most, n) => Math.max(most, n), 0);
  return { bytes, who: `a rank of stage ${peaks.indexOf(bytes)} needs` };
}

/** Returns an upper bound of a rank's memory in bytes, in closed form. If it fits, nothing is compiled. */
function ceiling({ model: m, parallel: p, train }: Job): number {
  const { mla } = m;
  const latents = mla ? (mla.q_rank ?? 0) + mla.kv_rank + mla.rope_dim : 0;
  const heads = mla ? m.heads * (m.head_dim + mla.v_dim) + latents : (m.heads + m.kv_heads) * m.head_dim;
  const ffn = m.moe ? Math.max(m.ffn, m.moe.experts * m.moe.ffn + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const ahead = depthsOf(m);
  const layers = m.layers + ahead;
  const parameters =
    (2 * paddedVocab(m) + m.max_positions) * m.hidden +
    layers * Math.max(m.hidden, latents) * (2 * heads + 3 * ffn + (m.moe?.experts ?? 0) + 2) +
    ahead * 3 * m.hidden ** 2;
  // the most rows of a token: capacity may be padded, and all experts may choose the same token
  const rows = m.moe && (m.moe.capacity !== "dropless" || m.moe.router.type === "expert_choice") ? m.moe.experts : (m.moe?.top_k ?? 0);
  const active = m.moe ? Math.max(m.ffn, rows * (m.moe.ffn + m.hidden) + 4 * m.moe.experts + (m.moe.shared?.ffn ?? 0)) : m.ffn;
  const perToken = layers * (8 * m.hidden + 8 * heads + 8 * active) + (1 + ahead) * 8 * paddedVocab(m) + ahead * 16 * m.hidden;
  return 24 * parameters + 8 * perToken * train.micro_batch * p.data * m.seq * p.pipeline;
}

/** Returns whether the bound is not sufficient, so that programs must be compiled. */
export const needsPrograms = (job: Job): boolean =>
  ceiling(job) * (inOneProcess(job) ? job.parallel.world : 1) >= devices[job.cluster.device].memory;

/** The multiple of the balanced load for expert rows, if the worst case does not fit. */
const ROWS_BOUND = 1.5;

type Try = Readonly<Record<string, unknown>>;
/** Candidate changes with the largest factor that each can save, so that insufficient ones are not compiled. */
function changes({ parallel: p, model }: Job): readonly (readonly [number, Try])[] {
  const wider = (n: number) => ({ "parallel.tensor": p.tensor * n, "parallel.sequence": true });
  return [
    ...(p.distributed_optimizer ? [] : [[8, { "parallel.distributed_optimizer": true }] as const]),
    ...(model.moe
      ? ([
          [2, { "parallel.expert": p.expert * 2 }],
          [2, { "parallel.expert_tensor": p.expert_tensor * 2 }],
        ] as const)
      : []),
    [2, { "parallel.pipeline": p.pipeline * 2 }],
    [2, wider(2)],
    ...(model.moe
      ? ([
          [4, { "parallel.expert_tensor": p.expert_tensor * 4 }],
          [4, { "parallel.expert": p.expert * 2, "parallel.pipeline": p.pipeline * 2 }],
        ] as const)
      : []),
    [4, { "parallel.pipeline": p.pipeline * 4 }],
    ...(model.moe ? ([[8, { "parallel.expert": p.expert * 2, "parallel.pipeline": p.pipeline * 4 }]] as const) : []),
    // more ranks with smaller shards
    ...[2, 4, 8].map((n) => [n, { "parallel.world": p.world * n, ...wider(n) }] as const),
  ];
}

/** Returns the rule. `peakOf` is called once per job, and once more if the first peak is a bound and the exact one is needed. */
export function memoryRule(peakOf: PeakOf): Rule {
  const peaks = new Map<string, Peak>();
  const peak: PeakOf = (job, room) => {
    const key = JSON.stringify(job);
    const known = peaks.get(key);
    if (known && (!known.isBound || room !== undefined)) return known;
    const found = peakOf(job, room);
    peaks.set(key, found);
    return found;
  };
  const fits = (job: Job): boolean => {
    const { memory } = devices[job.cluster.device];
    return !needsPrograms(job) || peak(job, memory).bytes <= memory;
  };
  return rule({
    code: "C510",
    title: "the plan does not fit the device",
    why: "A rank that runs out of memory stops the job, often after minutes of start-up. rankc knows the exact peak before the run. A job with this finding can still be compiled and inspected.",
    level: "warning",
    holds: fits,
    *check(job) {
      if (fits(job)) return;
      const { device } = job.cluster;
      const room = devices[device].memory;
      const { bytes, who } = peak(job);
      const bounded = job.model.moe?.rows_bound === "worst" && job.parallel.expert > 1 ? withBound(job) : undefined;
      const less = bounded && peak(bounded).bytes;
      const bound: Try = { "model.moe.rows_bound": ROWS_BOUND };
      const larger = Object.entries(devices)
        .filter(([, d]) => d.memory > room && d.memory >= bytes)
        .sort(([, a], [, b]) => a.memory - b.memory);
      const enough = (need: number) => (of: ReturnType<typeof changes>[number]) => need <= of[0] * room;
      yield {
        at: "cluster.device",
        related: ["parallel.expert", "parallel.tensor"],
        found: `${who} ${bytesText(bytes)} at the peak${less === undefined ? "" : ` (${bytesText(less)} with model.moe.rows_bound ${ROWS_BOUND})`}; ${device} has ${bytesText(room)}`,
        fix: `shard parameters or layers over more ranks, or use a larger device; \`rankc inspect\` shows the parts of the memory${less === undefined ? "" : `. rows_bound "worst" reserves memory for all rows that routing can send to a rank, ${ROWS_BOUND} for ${ROWS_BOUND} times the balanced load: a step with more rows ends the run with an error, and no row is dropped`}`,
        tries: [
          ...(less === undefined ? [] : [bound]),
          ...changes(job)
            .filter(enough(bytes))
            .map(([, set]) => set),
          ...larger.map(([name]) => ({ "cluster.device": name })),
          ...(less === undefined
            ? []
            : changes(job)
                .filter(enough(less))
                .map(([, set]) => ({ ...bound, ...set }))),
        ],
      };
    },
    bad: "model: {layers: 32, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8, vocab: 32000, seq: 2048}",
  });
}

const withBound = (job: Job): Job => ({
  ...job,
  model: { ...job.model, moe: job.model.moe && { ...job.model.moe, rows_bound: ROWS_BOUND } },
});
