/** P: the degrees of parallelism, and the two grids they make of the same ranks. */
import type { Job } from "../../schemas/job.ts";
import { divisorsNear, downTo, rule, upTo } from "./rule.ts";

/** Ranks in one pipeline stage, when `world` is a product as P101 asks. */
export function stageRanks({ parallel: p }: Job): number | undefined {
  return p.world === p.tensor * p.pipeline * p.context * p.data && Number.isInteger(p.data) ? p.world / p.pipeline : undefined;
}

/** The strides at which both grids cut the ranks of a stage, smallest first; `undefined` while P101 or P102 speaks. */
function strides(job: Job): { dense: number[]; expert: number[] } | undefined {
  const ranks = stageRanks(job);
  const { tensor, context, expert, expert_tensor: etp } = job.parallel;
  if (!ranks || ranks % (etp * expert)) return undefined;
  return { dense: [tensor, tensor * context, ranks], expert: [etp, etp * expert, ranks] };
}

const microbatches = (job: Job): number => job.train.global_batch / (job.train.micro_batch * job.parallel.data);

export const mesh = [
  rule({
    code: "P101",
    title: "world is the product of tensor, pipeline, context and data",
    why: "Every rank has one coordinate on each axis of the dense grid, so the degrees must multiply to the number of ranks exactly.",
    level: "error",
    *check({ parallel: p }) {
      const product = p.tensor * p.pipeline * p.context;
      if (p.world === product * p.data && Number.isInteger(p.data)) return;
      const ranks = `tensor ${p.tensor} x pipeline ${p.pipeline} x context ${p.context}`;
      const even = p.world % product === 0;
      yield {
        at: even ? "parallel.data" : "parallel.world",
        related: even
          ? ["parallel.world"]
          : (["tensor", "pipeline", "context"] as const).filter((axis) => p[axis] > 1).map((axis) => `parallel.${axis}` as const),
        found: even
          ? `${ranks} x data ${p.data} = ${product * p.data} ranks, but world is ${p.world}`
          : `world ${p.world} is not a multiple of ${ranks} = ${product}`,
        fix: even ? "leave data out: it is derived" : "change world or a degree so that they divide",
        tries: even
          ? [{ "parallel.data": p.world / product }]
          : [
              { "parallel.world": downTo(p.world, product) },
              { "parallel.world": upTo(p.world, product) },
              ...divisorsNear(p.world, p.tensor).map((tensor) => ({ "parallel.tensor": tensor })),
            ],
      };
    },
    bad: "parallel: {world: 6, tensor: 4}",
  }),
  rule({
    code: "P102",
    title: "the expert grid divides the ranks of a pipeline stage",
    why: "The experts' grid lies over the same ranks as the dense one: expert_tensor x expert x (expert data) = tensor x context x data. Megatron-LM notices a misfit only when it creates its process groups, on the cluster.",
    level: "error",
    *check(job) {
      const ranks = stageRanks(job);
      const { expert, expert_tensor: etp } = job.parallel;
      if (!job.model.moe || !ranks || ranks % (expert * etp) === 0) return;
      yield {
        at: expert > 1 ? "parallel.expert" : "parallel.expert_tensor",
        related: ["parallel.world"],
        found: `expert ${expert} x expert_tensor ${etp} = ${expert * etp} does not divide the ${ranks} ranks of a stage`,
        fix: `expert x expert_tensor must divide ${ranks}`,
        tries: [
          ...divisorsNear(ranks, expert).map((e) => ({ "parallel.expert": e })),
          ...divisorsNear(ranks, etp).map((e) => ({ "parallel.expert_tensor": e })),
          ...divisorsNear(ranks, expert).map((e) => ({ "parallel.expert": e, "parallel.expert_tensor": 1 })),
        ],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 4, expert: 8}\ntrain: {global_batch: 4}",
  }),
  rule({
    code: "P103",
    title: "the strides of both grids nest",
    why: "A value crosses from the dense grid to the expert grid by its shared factors. If neither stride divides the other, a rank's neighbours on one grid are no whole set of neighbours on the other, and no single collective can move the value.",
    level: "error",
    *check(job) {
      const both = strides(job);
      if (!job.model.moe || !both) return;
      const all = [...new Set([...both.dense, ...both.expert])].sort((a, b) => a - b);
      const i = all.findIndex((s, n) => n > 0 && s % all[n - 1]! !== 0);
      if (i < 0) return;
      const { expert, expert_tensor: etp } = job.parallel;
      yield {
        at: expert > 1 ? "parallel.expert" : "parallel.expert_tensor",
        related: ["parallel.tensor"],
        found: `dense groups repeat every ${both.dense.join(", ")} ranks and expert groups every ${both.expert.join(", ")}: ${all[i - 1]} does not divide ${all[i]}`,
        fix: "choose degrees whose running products divide each other; powers of two always do",
        tries: [
          ...divisorsNear(both.dense[2]!, expert).map((e) => ({ "parallel.expert": e })),
          ...divisorsNear(both.dense[2]!, etp).map((e) => ({ "parallel.expert_tensor": e })),
          ...divisorsNear(both.dense[2]!, expert).map((e) => ({ "parallel.expert": e, "parallel.expert_tensor": 1 })),
        ],
      };
    },
    bad: "model: {moe: {experts: 3, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 6, tensor: 2, sequence: true, expert: 3}",
  }),
  rule({
    code: "P104",
    title: "EP with TP requires SP: experts beside tensor parallelism need the sequence cut",
    why: "Without sequence parallelism every tensor rank holds the same tokens, so each routes and sends the same rows: redundant traffic and redundant expert work. Megatron-LM only warns while it reads the arguments and then stops at the first forward, after the cluster was booked (Megatron-LM #1587, NeMo-RL #1075).",
    level: "error",
    *check({ model, parallel: p }) {
      if (!model.moe || p.tensor === 1 || p.sequence) return;
      yield {
        at: "parallel.sequence",
        related: [p.expert > 1 ? "parallel.expert" : "model.moe", "parallel.tensor"],
        found: `tensor ${p.tensor} and ${p.expert > 1 ? `expert ${p.expert}` : "a mixture of experts"} with sequence: false`,
        fix: "cut the sequence over the tensor ranks, or give up tensor parallelism",
        tries: [{ "parallel.sequence": true }, { "parallel.tensor": 1 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 4, tensor: 2, expert: 4}",
  }),
  rule({
    code: "P105",
    title: "sequence does nothing without tensor",
    why: "Sequence parallelism cuts along the tensor ranks; with one of them there is nothing to cut. Megatron-LM switches it off without a word.",
    level: "warning",
    *check({ parallel: p }) {
      if (!p.sequence || p.tensor > 1) return;
      yield {
        at: "parallel.sequence",
        related: ["parallel.tensor"],
        found: "sequence: true with tensor 1",
        fix: "leave it out, or raise tensor",
        tries: [{ "parallel.sequence": false }],
      };
    },
    bad: "parallel: {sequence: true}",
  }),
  rule({
    code: "P106",
    title: "expert degrees need experts",
    why: "A dense model has no experts to spread; the ranks asked for here would repeat each other's work.",
    level: "error",
    *check({ model, parallel: p }) {
      if (model.moe) return;
      for (const axis of ["expert", "expert_tensor"] as const) {
        if (p[axis] > 1)
          yield {
            at: `parallel.${axis}`,
            related: ["model"],
            found: `${axis} ${p[axis]}, but the model has no moe`,
            fix: "describe the experts in model.moe, or leave the degree out",
            tries: [{ [`parallel.${axis}`]: 1 }],
          };
      }
    },
    bad: "parallel: {world: 2, expert: 2}",
  }),
  rule({
    code: "P107",
    title: "pipeline divides layers",
    why: "Every stage runs the same number of layers: the slowest stage sets the pace of all of them.",
    level: "error",
    *check({ model, parallel: p }) {
      if (model.layers % p.pipeline === 0) return;
      yield {
        at: "parallel.pipeline",
        related: ["model.layers"],
        found: `${model.layers} layers over ${p.pipeline} stages leaves ${model.layers % p.pipeline} over`,
        fix: `pipeline must divide ${model.layers}`,
        tries: [
          ...divisorsNear(model.layers, p.pipeline).map((pipeline) => ({ "parallel.pipeline": pipeline })),
          { "model.layers": upTo(model.layers, p.pipeline) },
        ],
      };
    },
    bad: "parallel: {world: 3, pipeline: 3}\ntrain: {global_batch: 12}",
  }),
  rule({
    code: "P108",
    title: "fewer microbatches than stages leave stages idle",
    why: "In 1F1B a stage waits while the pipeline fills and drains: of the step's time (pipeline - 1) / (microbatches + pipeline - 1) is lost, half and more when there are fewer microbatches than stages.",
    level: "warning",
    *check(job) {
      const { pipeline, data } = job.parallel;
      const m = microbatches(job);
      if (pipeline === 1 || !stageRanks(job) || !Number.isInteger(m) || m >= pipeline) return;
      const idle = Math.round((100 * (pipeline - 1)) / (m + pipeline - 1));
      const { micro_batch } = job.train;
      yield {
        at: "parallel.pipeline",
        related: ["train.global_batch"],
        found: `${m} microbatch${m > 1 ? "es" : ""} for ${pipeline} stages: ${idle} % of the step is idle`,
        fix: "more sequences in a step, or smaller microbatches",
        tries: [
          ...divisorsNear(micro_batch, micro_batch).map((b) => ({ "train.micro_batch": b })),
          { "train.global_batch": micro_batch * data * pipeline * 4 },
        ],
      };
    },
    bad: "parallel: {world: 2, pipeline: 2}\ntrain: {global_batch: 1}",
  }),
  rule({
    code: "P110",
    title: "distributed_optimizer has nothing to share out",
    why: "The optimizer's state is shared over ranks that hold the same parameter. With data, context and expert data all 1 there are none, and no memory is saved.",
    level: "warning",
    *check(job) {
      const p = job.parallel;
      const ranks = stageRanks(job);
      if (!p.distributed_optimizer || !ranks || p.data * p.context > 1) return;
      if (job.model.moe && ranks > p.expert * p.expert_tensor) return;
      yield {
        at: "parallel.distributed_optimizer",
        related: ["parallel.world"],
        found: "distributed_optimizer: true with data 1 and context 1",
        fix: "leave it out, or add data ranks",
        tries: [{ "parallel.distributed_optimizer": false }],
      };
    },
    bad: "parallel: {distributed_optimizer: true}",
  }),
  rule({
    code: "P111",
    title: "context, and tensor under sequence, divide the sequence",
    why: "Each rank holds an equal run of every sequence's tokens. Megatron-LM checks this neither for the context nor for the sequence cut while it reads the arguments.",
    level: "error",
    *check({ model, parallel: p }) {
      const parts = p.context * (p.sequence ? p.tensor : 1);
      if (model.seq % parts === 0) return;
      yield {
        at: "model.seq",
        related: [
          ...(p.context > 1 ? (["parallel.context"] as const) : []),
          ...(p.sequence && p.tensor > 1 ? (["parallel.tensor"] as const) : []),
        ],
        found: `${model.seq} tokens in ${parts} equal parts (context ${p.context}${p.sequence ? ` x tensor ${p.tensor}` : ""})`,
        fix: `seq must be a multiple of ${parts}`,
        tries: [{ "model.seq": downTo(model.seq, parts) }, { "model.seq": upTo(model.seq, parts) }],
      };
    },
    bad: "model: {seq: 10}\nparallel: {world: 4, context: 4}",
  }),
  rule({
    code: "P112",
    title: "some parameters stay whole under the distributed optimizer",
    why: "A parameter's state is shared out along one of its dims, in equal parts. Where no dim divides (norm gains have only `hidden`) every data rank keeps all of it.",
    level: "warning",
    *check(job) {
      const p = job.parallel;
      const shares = p.data * p.context;
      if (!p.distributed_optimizer || !stageRanks(job) || job.model.hidden % shares === 0) return;
      yield {
        at: "parallel.distributed_optimizer",
        related: ["model.hidden"],
        found: `hidden ${job.model.hidden} is not a multiple of data ${p.data} x context ${p.context} = ${shares}`,
        fix: `data x context should divide ${job.model.hidden}`,
      };
    },
    bad: "parallel: {world: 3, distributed_optimizer: true}\ntrain: {global_batch: 3}",
  }),
] as const;
