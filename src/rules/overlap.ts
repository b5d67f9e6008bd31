/** Rules P13x: communication beside compute. */
import { deviceOf } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { runsInPairs } from "../passes/pipelineStages.ts";
import { microbatches } from "./mesh.ts";
import { type Rule, rule } from "./rule.ts";

/** Returns how many streams of asynchronous collectives a job asks for. */
const streamsOf = (p: Job["parallel"]): number =>
  [p.gradient_bucket, p.parameter_bucket, p.expert_overlap, p.tensor_overlap].filter((key) => key !== "none").length;

/** Rows of a tile of a product on CUDA. */
const TILE_ROWS = 128;

/** Returns the tokens that a rank has between products: sequences of a microbatch, and positions of each. */
const tokensOf = ({ model, parallel: { context, tensor }, train }: Job): readonly [sequences: number, positions: number] => [
  train.micro_batch,
  model.seq / (context * tensor),
];

/** Returns whether the tokens of a rank have so many equal parts, within one sequence or of whole sequences. */
function dividesTokens(job: Job, parts: number): boolean {
  const [sequences, positions] = tokensOf(job);
  const rows = (sequences * positions) / parts;
  return Number.isInteger(rows) && (positions % rows === 0 || rows % positions === 0);
}

/** Returns the fix with the most parts, fewer than so many, that divide the tokens of a rank and leave the rows of a tile. */
function fewerParts(job: Job, parts: number): { "parallel.tensor_overlap": number }[] {
  const [sequences, positions] = tokensOf(job);
  const rows = sequences * positions * job.parallel.tensor;
  for (let n = parts - 1; n > 1; n--) if (dividesTokens(job, n) && rows / n >= TILE_ROWS) return [{ "parallel.tensor_overlap": n }];
  return [];
}

/** Rules of overlap. */
export const overlap: readonly Rule[] = [
  rule({
    code: "P130",
    title: "gradient_bucket has no gradients to reduce",
    why: "Gradients are reduced over the ranks that hold the same parameter and saw other tokens. A stage of one rank reduces none, so that buckets have no effect.",
    level: "warning",
    *check({ parallel: p }) {
      if (p.gradient_bucket === "none" || p.world > p.pipeline) return;
      yield {
        at: "parallel.gradient_bucket",
        related: ["parallel.world"],
        found: `gradient_bucket ${p.gradient_bucket} with one rank in a stage`,
        fix: "leave it out, or add ranks",
        tries: [{ "parallel.gradient_bucket": "none" }],
      };
    },
    bad: "parallel: {gradient_bucket: 40}",
  }),
  rule({
    code: "P131",
    title: "parameter_bucket without distributed_optimizer",
    why: "Parameters are gathered over the ranks that share their optimizer state. Without distributed_optimizer each rank updates whole parameters and gathers none.",
    level: "error",
    *check({ parallel: p }) {
      if (p.parameter_bucket === "none" || p.distributed_optimizer) return;
      yield {
        at: "parallel.parameter_bucket",
        related: ["parallel.distributed_optimizer"],
        found: `parameter_bucket ${p.parameter_bucket} without distributed_optimizer`,
        fix: "set distributed_optimizer, or leave parameter_bucket out",
        tries: [{ "parallel.distributed_optimizer": true }, { "parallel.parameter_bucket": "none" }],
      };
    },
    bad: "parallel: {world: 2, parameter_bucket: 40}\ntrain: {global_batch: 2}",
  }),
  rule({
    code: "P135",
    title: "parameter_gather without parameter_bucket",
    why: "Parameters are gathered ahead of their use in buckets. Without parameter_bucket each is gathered by itself after its update.",
    level: "warning",
    *check({ parallel: p }) {
      if (p.parameter_gather === "step" || p.parameter_bucket !== "none") return;
      yield {
        at: "parallel.parameter_gather",
        related: ["parallel.parameter_bucket"],
        found: `parameter_gather ${p.parameter_gather} with parameter_bucket none`,
        fix: "set parameter_bucket, or leave parameter_gather out",
        tries: [{ "parallel.parameter_gather": "step" }],
      };
    },
    bad: "parallel: {parameter_gather: forward}",
  }),
  rule({
    code: "P132",
    title: "expert_overlap has no exchange of rows",
    why: "Rows are exchanged between the ranks over which experts are spread. With expert 1, or with the dispatcher all_gather, there is no dispatch and no combine beside which something could run.",
    level: "warning",
    *check({ model, parallel: p }) {
      if (p.expert_overlap === "none" || (model.moe && p.expert > 1 && model.moe.dispatch !== "all_gather")) return;
      yield {
        at: "parallel.expert_overlap",
        related: ["parallel.expert", "model.moe.dispatch"],
        found: `expert_overlap ${p.expert_overlap} with ${model.moe ? (p.expert > 1 ? "the dispatcher all_gather" : "expert 1") : "a dense model"}`,
        fix: "leave it out",
        tries: [{ "parallel.expert_overlap": "none" }],
      };
    },
    bad: "parallel: {expert_overlap: shared}",
  }),
  rule({
    code: "P136",
    title: "tensor_overlap has no exchange between tensor ranks",
    why: "With sequence, activations are gathered before the products of a layer and reduce-scattered after them. Without it, or with tensor 1, nothing is gathered beside which something could run.",
    level: "warning",
    *check({ parallel: p }) {
      if (p.tensor_overlap === "none" || (p.sequence && p.tensor > 1)) return;
      yield {
        at: "parallel.tensor_overlap",
        related: ["parallel.sequence", "parallel.tensor"],
        found: `tensor_overlap ${p.tensor_overlap} with ${p.tensor > 1 ? "sequence false" : "tensor 1"}`,
        fix: p.tensor > 1 ? "set sequence, or leave it out" : "leave it out",
        tries: [...(p.tensor > 1 ? [{ "parallel.sequence": true }] : []), { "parallel.tensor_overlap": "none" }],
      };
    },
    bad: "parallel: {tensor_overlap: backward}",
  }),
  rule({
    code: "P137",
    title: "tensor_overlap does not divide the tokens of a rank",
    why: "Between products a rank has train.micro_batch x model.seq / (context x tensor) tokens. A part is an equal number of them, within one sequence or of whole sequences; otherwise the exchanges of forward stay whole.",
    level: "warning",
    *check(job) {
      const { tensor_overlap: parts, sequence, tensor } = job.parallel;
      if (typeof parts === "string" || !sequence || tensor === 1 || dividesTokens(job, parts)) return;
      yield {
        at: "parallel.tensor_overlap",
        related: ["model.seq", "train.micro_batch", "parallel.tensor"],
        found: `${parts} parts of ${tokensOf(job).join(" x ")} tokens`,
        fix: "choose a number that divides them, or backward",
        tries: [...fewerParts(job, parts), { "parallel.tensor_overlap": "backward" }],
      };
    },
    bad: "model: {seq: 64}\nparallel: {world: 4, tensor: 4, sequence: true, tensor_overlap: 3}",
  }),
  rule({
    code: "P138",
    title: "tensor_overlap leaves few rows for a product",
    why: "A product of fewer rows than a tile of its kernel, 128, takes as long as one of a whole tile, so that parts take longer than they hide.",
    level: "warning",
    *check(job) {
      const { tensor_overlap: parts, sequence, tensor } = job.parallel;
      if (typeof parts === "string" || !sequence || tensor === 1 || !dividesTokens(job, parts)) return;
      const [sequences, positions] = tokensOf(job);
      const rows = (sequences * positions * tensor) / parts;
      if (rows >= TILE_ROWS) return;
      yield {
        at: "parallel.tensor_overlap",
        related: ["model.seq", "train.micro_batch"],
        found: `${rows} rows in each of ${parts} parts`,
        fix: "choose fewer parts, or backward",
        tries: [...fewerParts(job, parts), { "parallel.tensor_overlap": "backward" }],
      };
    },
    bad: "model: {seq: 256}\nparallel: {world: 2, tensor: 2, sequence: true, tensor_overlap: 4}",
  }),
  rule({
    code: "P139",
    title: "expert_overlap interleave with zero_bubble",
    why: "In pairs the forward of one microbatch alternates with the whole backward of another. zero_bubble computes gradients of weights in blocks of their own, and orders blocks so that these fill the waits for other stages; its stages cannot run forwards and backwards in pairs.",
    level: "error",
    *check({ parallel: p }) {
      if (p.expert_overlap !== "interleave" || p.schedule !== "zero_bubble") return;
      yield {
        at: "parallel.expert_overlap",
        related: ["parallel.schedule"],
        found: "expert_overlap interleave with schedule zero_bubble",
        fix: "use one of the two: shared runs gradients of weights beside the exchanges, without pairs",
        tries: [{ "parallel.expert_overlap": "shared" }, { "parallel.schedule": "1f1b" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, ffn: 16, router: {aux_coeff: 0.01}}}\nparallel: {world: 4, pipeline: 2, expert: 2, schedule: zero_bubble, expert_overlap: interleave}\ntrain: {global_batch: 8}",
  }),
  rule({
    code: "P140",
    title: "expert_overlap interleave has one microbatch",
    why: "The forward of a microbatch alternates with the backward of an earlier one. A step of one microbatch has no earlier one, so that nothing alternates.",
    level: "warning",
    *check(job) {
      if (!runsInPairs(job) || microbatches(job) !== 1) return;
      yield {
        at: "parallel.expert_overlap",
        related: ["train.global_batch"],
        found: "expert_overlap interleave with one microbatch in a step",
        fix: "use shared, or a smaller micro_batch or a larger global_batch",
        tries: [{ "parallel.expert_overlap": "shared" }, { "train.global_batch": 2 * job.train.global_batch }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, ffn: 16, router: {aux_coeff: 0.01}}}\nparallel: {world: 2, expert: 2, expert_overlap: interleave}\ntrain: {global_batch: 2}",
  }),
  rule({
    code: "P133",
    title: "communication_sms leaves no multiprocessor for kernels",
    why: "The collectives of each stream occupy up to communication_sms multiprocessors of the device. If all streams together take every one, kernels wait until a collective ends, and nothing runs beside it.",
    level: "error",
    *check({ parallel: p, cluster }) {
      if (p.communication_sms === "none") return;
      const { multiprocessors } = deviceOf(cluster.device);
      const streams = Math.max(1, streamsOf(p));
      const most = Math.ceil(multiprocessors / streams) - 1;
      if (p.communication_sms <= most) return;
      yield {
        at: "parallel.communication_sms",
        related: ["cluster.device"],
        found: `${p.communication_sms} for each of ${streams} streams, and ${cluster.device} has ${multiprocessors}`,
        fix: `use at most ${most}; 8 to 16 are usual`,
        tries: [{ "parallel.communication_sms": 8 }],
      };
    },
    bad: "parallel: {world: 2, gradient_bucket: 40, communication_sms: 200}\ntrain: {global_batch: 2}",
  }),
  rule({
    code: "P134",
    title: "communication_sms without asynchronous collectives",
    why: "The limit holds for collectives that run beside kernels. Without gradient_bucket, parameter_bucket, expert_overlap and tensor_overlap each collective runs alone and may occupy the whole device.",
    level: "warning",
    *check({ parallel: p }) {
      if (p.communication_sms === "none" || streamsOf(p) > 0) return;
      yield {
        at: "parallel.communication_sms",
        related: ["parallel.gradient_bucket"],
        found: `communication_sms ${p.communication_sms}, and all collectives run in order`,
        fix: "leave it out, or set gradient_bucket",
        tries: [{ "parallel.communication_sms": "none" }],
      };
    },
    bad: "parallel: {communication_sms: 8}",
  }),
];
