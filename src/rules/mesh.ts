/** Rules P: the parallelism degrees, and the dense and the expert grid. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { pipelineOf, readLayout } from "../passes/pipelineStages.ts";
import { bubbleOf, schedule, timesOf } from "../passes/schedule.ts";
import { divisorsNear, downTo, rule, upTo } from "./rule.ts";

/** Returns the ranks per pipeline stage; undefined if the job violates P101. */
export function stageRanks({ parallel: p }: Job): number | undefined {
  return p.world === p.tensor * p.pipeline * p.context * p.data && Number.isInteger(p.data) ? p.world / p.pipeline : undefined;
}

/** Largest number of blocks of a schedule that is simulated to compute its bubble. */
const PLAYED = 4096;

/** Returns the idle fraction of a step: simulated, or for long schedules by the formula of 1F1B. */
export function idleShare(job: Job, m: number, chunks: number): number {
  const { pipeline } = job.parallel;
  if (m * pipeline * chunks > PLAYED) return (pipeline - 1) / (m * chunks + pipeline - 1);
  const orders = schedule(job, chunks).map(({ order }) => order);
  return bubbleOf(timesOf(orders, chunks));
}

/** Returns the number of microbatches of a step; it may be fractional. */
export const microbatches = (job: Job): number => job.train.global_batch / (job.train.micro_batch * job.parallel.data);

/** Rules of parallelism degrees. */
export const mesh = [
  rule({
    code: "P101",
    title: "world is not the product of tensor, pipeline, context and data",
    why: "Every rank has one coordinate on each axis of the dense grid, so the product of the degrees is the number of ranks.",
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
        fix: even ? "leave data out: it is derived" : "change world or a degree so that the product divides world",
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
    title: "the expert grid does not divide the ranks of a pipeline stage",
    why: "The expert grid and the dense grid cover the same ranks: expert_tensor x expert x (expert data) = tensor x context x data. Megatron-LM reports a mismatch only on the cluster, when it creates process groups.",
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
    code: "P104",
    title: "expert and tensor parallelism need sequence parallelism",
    why: "Without sequence parallelism every tensor rank holds the same tokens and sends the same rows, so that traffic and expert work are redundant. Megatron-LM warns when it reads the arguments and stops in the first forward pass, on the cluster (Megatron-LM #1587, NeMo-RL #1075).",
    level: "error",
    *check({ model, parallel: p }) {
      if (!model.moe || p.tensor === 1 || p.sequence) return;
      yield {
        at: "parallel.sequence",
        related: [p.expert > 1 ? "parallel.expert" : "model.moe", "parallel.tensor"],
        found: `tensor ${p.tensor} and ${p.expert > 1 ? `expert ${p.expert}` : "a mixture of experts"} with sequence: false`,
        fix: "shard the sequence over the tensor ranks, or use tensor 1",
        safe: { "parallel.sequence": true },
        tries: [{ "parallel.tensor": 1 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 4, tensor: 2, expert: 4}",
  }),
  rule({
    code: "P105",
    title: "sequence has no effect without tensor",
    why: "Sequence parallelism shards the sequence over the tensor ranks; one rank has nothing to shard. Megatron-LM disables it without a message.",
    level: "warning",
    *check({ parallel: p }) {
      if (!p.sequence || p.tensor > 1) return;
      yield {
        at: "parallel.sequence",
        related: ["parallel.tensor"],
        found: "sequence: true with tensor 1",
        fix: "leave it out, or raise tensor",
        safe: { "parallel.sequence": undefined },
      };
    },
    bad: "parallel: {sequence: true}",
  }),
  rule({
    code: "P106",
    title: "expert degrees without experts",
    why: "A dense model has no experts to distribute; these ranks would repeat the same work.",
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
    title: "pipeline x virtual_pipeline does not divide layers",
    why: "Every chunk of every stage has the same number of layers, because the slowest stage determines the speed of the pipeline. parallel.layout describes stages of different sizes.",
    level: "error",
    *check({ model, parallel: p }) {
      const parts = p.pipeline * p.virtual_pipeline;
      if (p.layout !== null || model.layers % parts === 0) return;
      const chunks = p.virtual_pipeline > 1 ? ` x ${p.virtual_pipeline} chunks` : "";
      yield {
        at: p.virtual_pipeline > 1 ? "parallel.virtual_pipeline" : "parallel.pipeline",
        related: ["model.layers"],
        found: `${model.layers} layers over ${p.pipeline} stages${chunks} leaves ${model.layers % parts} over`,
        fix: `pipeline${chunks ? " x virtual_pipeline" : ""} must divide ${model.layers}, or parallel.layout must assign the layers`,
        tries: [
          ...divisorsNear(model.layers, p.virtual_pipeline).map((chunks) => ({ "parallel.virtual_pipeline": chunks })),
          ...divisorsNear(model.layers, p.pipeline).map((pipeline) => ({ "parallel.pipeline": pipeline, "parallel.virtual_pipeline": 1 })),
          { "model.layers": upTo(model.layers, parts) },
        ],
      };
    },
    bad: "parallel: {world: 3, pipeline: 3}\ntrain: {global_batch: 12}",
  }),
  rule({
    code: "P108",
    title: "fewer microbatches than stages leave stages idle",
    why: "A stage is idle while the pipeline fills and drains: with 1F1B for (pipeline - 1) / (microbatches + pipeline - 1) of the step, which is half or more if there are fewer microbatches than stages. With interleaved chunks Megatron-LM stops in the first step.",
    level: "warning",
    *check(job) {
      const { pipeline, data } = job.parallel;
      const m = microbatches(job);
      if (pipeline === 1 || !stageRanks(job) || !Number.isInteger(m) || m >= pipeline) return;
      const { chunks } = pipelineOf(job);
      if (!Number.isInteger(chunks)) return;
      const idle = Math.round(100 * idleShare(job, m, chunks));
      const { micro_batch } = job.train;
      yield {
        at: "parallel.pipeline",
        related: ["train.global_batch"],
        found: `${m} microbatch${m > 1 ? "es" : ""} for ${pipeline} stages: ${idle} % of the step is idle`,
        fix: "use more sequences per step, or smaller microbatches",
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
    title: "distributed_optimizer has no ranks to shard over",
    why: "Optimizer state is sharded over the ranks that hold the same parameter. If data, context and expert data are 1, each parameter is on one rank, and no memory is saved.",
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
        safe: { "parallel.distributed_optimizer": undefined },
      };
    },
    bad: "parallel: {distributed_optimizer: true}",
  }),
  rule({
    code: "P111",
    title: "context and sequence shards do not divide the sequence",
    why: "All ranks hold equally many tokens of every sequence; with context parallelism, a block of the first half and the mirrored block of the second half. Megatron-LM does not check the sharding over tensor ranks when it reads the arguments.",
    level: "error",
    *check({ model, parallel: p }) {
      const tensor = p.sequence ? p.tensor : 1;
      // the two zigzag blocks of a context rank have whole lengths, also after division over tensor ranks
      const parts = p.context * (p.context > 1 && tensor % 2 === 1 ? 2 * tensor : tensor);
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
    code: "P113",
    title: "layout does not match the layers, stages or chunks",
    why: "The layout alone assigns layers to stages. With a missing or an additional layer, the run would train another model. All stages need equally many chunks, because the schedule interleaves them. The notation is Megatron-LM's.",
    level: "error",
    *check({ model, parallel: p }) {
      if (p.layout === null) return;
      const parts = readLayout(p.layout);
      const say = (found: string, fix: string) => ({
        at: "parallel.layout" as const,
        related: ["parallel.pipeline" as const],
        ...{ found, fix },
        tries: [{ "parallel.layout": null }],
      });
      if (typeof parts === "string") {
        yield say(parts, "write it like Et|(tt|)*3tL, or leave it out: layers are then split evenly");
        return;
      }
      const placed = (letter: string) => parts.join("").split(letter).length - 1;
      const [layers, ahead] = [placed("t"), placed("m")];
      if (layers !== model.layers)
        yield say(
          `it places ${layers} layers, and the model has ${model.layers}`,
          `write ${model.layers} t, or set model.layers: ${layers}`,
        );
      if (ahead !== depthsOf(model))
        yield say(
          `it places ${ahead} layers of multi-token prediction, and the model has ${depthsOf(model)}`,
          `write ${depthsOf(model)} m, or set model.mtp.layers: ${ahead}`,
        );
      if (parts.length % p.pipeline !== 0)
        yield say(
          `it has ${parts.length} parts for ${p.pipeline} stages`,
          `the parts, | between them, must be a multiple of pipeline ${p.pipeline}`,
        );
      else if (p.virtual_pipeline !== 1 && p.virtual_pipeline * p.pipeline !== parts.length)
        yield say(
          `it makes ${parts.length / p.pipeline} chunks a stage, and virtual_pipeline says ${p.virtual_pipeline}`,
          "leave virtual_pipeline out: the layout says it",
        );
    },
    bad: "parallel: {world: 2, pipeline: 2, layout: Ettt|tttL}\ntrain: {global_batch: 8}",
  }),
  rule({
    code: "P114",
    title: "virtual_pipeline and zero_bubble need a pipeline",
    why: "Interleaved chunks and delayed weight gradients fill the idle time in which a stage waits for another stage. A single stage never waits.",
    level: "error",
    *check({ parallel: p }) {
      if (p.pipeline > 1) return;
      if (p.virtual_pipeline > 1)
        yield {
          at: "parallel.virtual_pipeline",
          related: ["parallel.pipeline"],
          found: `virtual_pipeline ${p.virtual_pipeline} with pipeline 1`,
          fix: "leave it out, or raise pipeline",
          tries: [{ "parallel.virtual_pipeline": 1 }],
        };
      if (p.schedule === "zero_bubble")
        yield {
          at: "parallel.schedule",
          related: ["parallel.pipeline"],
          found: "schedule zero_bubble with pipeline 1",
          fix: "leave it out, or raise pipeline",
          tries: [{ "parallel.schedule": "1f1b" }],
        };
    },
    bad: "parallel: {virtual_pipeline: 2}",
  }),
  rule({
    code: "P116",
    title: "optimizer_instances does not divide the data ranks",
    why: "Each group of neighbouring data ranks holds one sharded copy of the optimizer state, so both the dense and the expert data ranks must divide into that many equal groups. Megatron-LM reports a mismatch when it creates its groups.",
    level: "error",
    *check(job) {
      const p = job.parallel;
      const ranks = stageRanks(job);
      if (p.optimizer_instances === 1 || !ranks) return;
      const n = p.optimizer_instances;
      const say = {
        at: "parallel.optimizer_instances" as const,
        fix: "the number of instances must divide data and expert data",
        tries: [{ "parallel.optimizer_instances": 1 }],
      };
      if (!p.distributed_optimizer) {
        yield {
          ...say,
          related: ["parallel.distributed_optimizer"],
          found: `${n} instances of a state that is not sharded`,
          fix: "set distributed_optimizer, or leave optimizer_instances out",
          tries: [{ "parallel.distributed_optimizer": true }, ...say.tries],
        };
        return;
      }
      const edp = job.model.moe ? ranks / (p.expert * p.expert_tensor) : n;
      if (p.data % n !== 0) yield { ...say, related: ["parallel.data"], found: `${n} instances over data ${p.data}` };
      else if (Number.isInteger(edp) && edp % n !== 0)
        yield { ...say, related: ["parallel.expert"], found: `${n} instances over expert data ${edp}` };
    },
    bad: "parallel: {world: 2, distributed_optimizer: true, optimizer_instances: 4}\ntrain: {global_batch: 2}",
  }),
  rule({
    code: "P117",
    title: "order tp-cp-ep-pp-dp with dense and expert grids of different size within a stage",
    why: "In the order tp-cp-ep-pp-dp the ranks of a stage are runs of tensor x context ranks on the dense grid, and runs of expert_tensor x expert ranks on the expert grid. Unless both runs have the same length, a rank would belong to two stages. Megatron-LM accepts the arguments and stops when it creates its groups.",
    level: "error",
    *check({ model, parallel: p }) {
      const [dense, expert] = [p.tensor * p.context, p.expert_tensor * p.expert];
      if (!model.moe || p.order !== "tp-cp-ep-pp-dp" || p.pipeline === 1 || dense === expert) return;
      yield {
        at: "parallel.order",
        related: ["parallel.expert", "parallel.tensor"],
        found: `runs of tensor ${p.tensor} x context ${p.context} = ${dense} and of expert_tensor ${p.expert_tensor} x expert ${p.expert} = ${expert}`,
        fix: "make them equal, or use the order tp-cp-ep-dp-pp",
        tries: [{ "parallel.order": "tp-cp-ep-dp-pp" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 4, pipeline: 2, expert: 2, order: tp-cp-ep-pp-dp}\ntrain: {global_batch: 8}",
  }),
  rule({
    code: "P112",
    title: "some parameters stay replicated under the distributed optimizer",
    why: "The state of a parameter is sharded along one dim, in equal parts. If no dim is divisible (norm gains have only `hidden`), every data rank holds all of it.",
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
