/**
 * Evaluations: forward passes over held-out data between two steps. They write workspace and the accumulators that a step sets to zero, so
 * training goes on as if none had run.
 */
import type { HeldOutPart } from "../../schemas/heldOut.ts";
import type { Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import type { EvaluationResult } from "../../schemas/stepResult.ts";
import type { LocalRanks } from "../backend.ts";
import type { EvaluationBatch, HeldOut } from "../data/heldOut.ts";
import { IGNORED } from "../data/tokens.ts";
import type { RankPrograms } from "../rankPrograms.ts";
import { feedOf, inOrder } from "./feed.ts";
import type { Parameters } from "./parameters.ts";
import { runTogether, walkEvaluation } from "./rankStep.ts";

/** What an evaluation runs on. */
export interface EvaluationParts {
  readonly plan: Plan;
  readonly localRanks: LocalRanks;
  readonly programs: RankPrograms;
  readonly parameters: Parameters;
}

/** The sums of an evaluation: per source the loss of its tokens and their number. */
interface Sums {
  readonly losses: Float64Array;
  readonly tokens: Float64Array;
}

/** Evaluates the model on held-out data. `step`: the steps that the model is trained for. All processes of a run call it between the same steps. */
export async function evaluate(parts: EvaluationParts, data: HeldOut, part: HeldOutPart, step: number): Promise<EvaluationResult> {
  const begun = performance.now();
  const rows = parts.plan.job.train.global_batch;
  const sums: Sums = { losses: new Float64Array(data.names.length), tokens: new Float64Array(data.names.length) };
  let next = data.batch(0, rows);
  for (let first = 0; first < data.samples; first += rows) {
    const batch = next;
    await walkAll(parts, batch);
    const finished = parts.localRanks.finish();
    // read the next batch while the device computes
    if (first + rows < data.samples) next = data.batch(first + rows, rows);
    await finished;
    add(sums, batch, await readLosses(parts));
  }
  const seconds = (performance.now() - begun) / 1000;
  return { step, part, ...resultOf(sums.losses, sums.tokens), sources: sourcesOf(data.names, sums), seconds };
}

function walkAll({ plan, localRanks, programs, parameters }: EvaluationParts, batch: EvaluationBatch): Promise<void> {
  const { train, parallel } = plan.job;
  const microbatches = train.global_batch / (train.micro_batch * parallel.data);
  // no input of an evaluation depends on the step
  const step = { first: 0, batch: train.global_batch, microbatches, upscale: 1, lr: 0, weightDecay: 0, lossScale: 1, update: 0 };
  const feed = feedOf(plan.job, step, inOrder(plan.job, batch));
  const replayed = localRanks.beginStep?.(microbatches, "evaluation") ?? false;
  const walks = localRanks.ranks.map((rank): [number, Generator<string>] => [
    rank,
    walkEvaluation({
      ...{ rank, microbatches, replayed, comm: localRanks.comm, stage: programs.of(rank), device: localRanks.rankDevice(rank) },
      feed: (b, input, microbatch) => parameters.shardFor(feed(input, microbatch), b, rank),
      onCompute: () => {},
    }),
  ]);
  return runTogether(new Map(walks));
}

/** Reads the weighted loss of each source of the batch, and combines the stages. */
async function readLosses({ plan, localRanks, programs }: EvaluationParts): Promise<readonly number[]> {
  const { ranks, rankDevice, combine = async (values) => [...values] } = localRanks;
  let sums: number[] = [];
  for (const { stage, evaluation } of plan.programs) {
    const rank = rankAt(plan.mesh, stage, 0);
    for (const id of ranks.includes(rank) ? (evaluation?.losses ?? []) : []) {
      const read = await rankDevice(rank).read(programs.buffer(rank, id), 0);
      sums = Array.from(read, (x, k) => x + (sums[k] ?? 0));
    }
  }
  // stages without the head have no losses, and add zeros
  const most = Math.max(
    0,
    ...plan.programs.flatMap((p) => (p.evaluation?.losses ?? []).flatMap((id) => p.buffers.find((b) => b.id === id)?.sizes[0] ?? 0)),
  );
  return combine(Array.from({ length: most }, (_, k) => sums[k] ?? 0));
}

/** Adds a batch: its weights are 1 / its labels. */
function add({ losses, tokens }: Sums, { labels, sources }: EvaluationBatch, weighted: readonly number[]): void {
  let all = 0;
  for (const [t, label] of labels.entries()) {
    if (label === IGNORED) continue;
    const source = sources[t] ?? 0;
    tokens[source] = (tokens[source] ?? 0) + 1;
    all++;
  }
  for (const k of losses.keys()) losses[k] = (losses[k] ?? 0) + (weighted[k] ?? 0) * all;
}

function resultOf(losses: Float64Array, tokens: Float64Array) {
  const sum = (of: Float64Array): number => of.reduce((a, b) => a + b, 0);
  const loss = sum(losses) / sum(tokens);
  return { loss, perplexity: Math.exp(loss), tokens: sum(tokens) };
}

const sourcesOf = (names: readonly string[], { losses, tokens }: Sums): EvaluationResult["sources"] =>
  names.map((source, k) => ({ source, ...resultOf(losses.subarray(k, k + 1), tokens.subarray(k, k + 1)) }));
