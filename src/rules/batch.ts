/** Rules B: batch, optimizer and data. trainingSchedule.ts has the rules of schedules. */

import { SMALLEST } from "../../schemas/float32.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import { pipelineOf } from "../passes/pipelineStages.ts";
import { stageRanks } from "./mesh.ts";
import { divisorsNear, downTo, isShare, rule, upTo } from "./rule.ts";

/** Limit of microbatches per step: the order of a stage lists each of them, forward and backward. */
const MICROBATCHES = 65536;
/** Limit of blocks of all stages together. */
const BLOCKS = 2 ** 19;

/** Rules of batch, optimizer and data. */
export const batch = [
  rule({
    code: "B201",
    title: "micro_batch x data does not divide global_batch",
    why: "A step is a whole number of microbatches on every data rank. Megatron-LM reports it as an error of another argument (eval_global_batch_size).",
    level: "error",
    *check(job) {
      const { micro_batch: mb, global_batch: gb } = job.train;
      const { data } = job.parallel;
      const one = mb * data;
      if (!stageRanks(job) || gb % one === 0) return;
      yield {
        at: "train.global_batch",
        related: ["train.micro_batch", "parallel.world"],
        found: `global_batch ${gb} with micro_batch ${mb} x data ${data} = ${one}`,
        fix: `global_batch must be a multiple of ${one}`,
        tries: [
          { "train.global_batch": downTo(gb, one) },
          { "train.global_batch": upTo(gb, one) },
          ...divisorsNear(gb, mb).map((b) => ({ "train.micro_batch": b })),
        ],
      };
    },
    bad: "parallel: {world: 4}\ntrain: {global_batch: 6}",
  }),
  rule({
    code: "B202",
    title: "the learning rate is not above 0",
    why: "With 0 no parameter changes; a negative rate increases the loss. Some devices treat a float32 below 2^-126 as 0.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.lr >= SMALLEST) return;
      const lr = o.lr <= -SMALLEST ? -o.lr : 1e-4;
      yield {
        at: "train.optimizer.lr",
        found: `lr ${o.lr}`,
        fix: "a positive number; 1.0e-4 is usual",
        tries: [{ "train.optimizer.lr": lr }, { "train.optimizer.lr": lr, "train.optimizer.min_lr": 0 }],
      };
    },
    bad: "train: {optimizer: {lr: 0}}",
  }),
  rule({
    code: "B203",
    title: "min_lr is not between 0 and lr",
    why: "The schedule falls from lr to min_lr.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.lr < SMALLEST || (o.min_lr >= 0 && o.min_lr <= o.lr)) return;
      yield {
        at: "train.optimizer.min_lr",
        related: ["train.optimizer.lr"],
        found: `min_lr ${o.min_lr} with lr ${o.lr}`,
        fix: "a tenth of lr is usual",
        tries: [{ "train.optimizer.min_lr": Number((o.lr / 10).toPrecision(3)) }, { "train.optimizer.min_lr": 0 }],
      };
    },
    bad: "train: {optimizer: {lr: 0.001, min_lr: 0.01, schedule: cosine}}",
  }),
  rule({
    code: "B207",
    title: "a beta is not from 0 to below 1",
    why: "A beta is the decay of a running mean. With 1 the mean never changes, and its bias correction divides by zero. As a float32, 1 - 2^-26 is 1.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.type === "sgd" || o.betas.every(isShare)) return;
      const good = o.betas.map((b, i) => (isShare(b) ? b : [0.9, 0.95][i]));
      yield {
        at: "train.optimizer.betas",
        found: `betas [${o.betas.join(", ")}]`,
        fix: "for example [0.9, 0.95]",
        tries: [{ "train.optimizer.betas": good }],
      };
    },
    bad: "train: {optimizer: {betas: [0.9, 1]}}",
  }),
  rule({
    code: "B208",
    title: "the optimizer's eps is not above 0",
    why: "An update divides by the square root of the second moment plus eps. An unused embedding row has a second moment of 0, and 0 / 0 is not a number. Some devices treat a float32 below 2^-126 as 0.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.type === "sgd" || o.eps >= SMALLEST) return;
      yield { at: "train.optimizer.eps", found: `eps ${o.eps}`, fix: "1.0e-8 is usual", tries: [{ "train.optimizer.eps": 1e-8 }] };
    },
    bad: "train: {optimizer: {eps: 0}}",
  }),
  rule({
    code: "B209",
    title: "weight decay is negative",
    why: "Each step shrinks the weights by lr x weight_decay; with a negative value they would grow without bound.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      for (const key of ["weight_decay", "weight_decay_start", "weight_decay_end"] as const) {
        const decay = o[key];
        if (decay === null || decay >= 0) continue;
        yield {
          at: `train.optimizer.${key}`,
          found: `${key} ${decay}`,
          fix: "0 or more",
          tries: [{ [`train.optimizer.${key}`]: -decay }, { [`train.optimizer.${key}`]: 0 }],
        };
      }
    },
    bad: "train: {optimizer: {weight_decay: -0.1}}",
  }),
  rule({
    code: "B210",
    title: "clip is negative, or rounds to 0 in float32",
    why: "The gradient is scaled down to this norm. A negative norm would reverse its direction. Kernels receive the norm as float32, in which a positive number below 1.2e-38 is 0 on some devices; 0 means no clipping.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.clip === 0 || o.clip >= SMALLEST) return;
      yield {
        at: "train.optimizer.clip",
        found: `clip ${o.clip}`,
        fix: "0 disables clipping; otherwise give a norm",
        tries: [{ "train.optimizer.clip": 0 }],
      };
    },
    bad: "train: {optimizer: {clip: -1}}",
  }),
  rule({
    code: "B211",
    title: "init.std is not above 0",
    why: "If all weights are 0, all neurons of a layer get equal gradients and stay equal.",
    level: "error",
    *check({ train }) {
      if (train.init.std >= SMALLEST) return;
      yield { at: "train.init.std", found: `init.std ${train.init.std}`, fix: "0.02 is usual", tries: [{ "train.init.std": 0.02 }] };
    },
    bad: "train: {init: {std: 0}}",
  }),
  rule({
    code: "B212",
    title: `a step has at most ${MICROBATCHES} microbatches`,
    why: "The plan lists each microbatch in its order. Such a number is usually a mistake in global_batch or in micro_batch.",
    level: "error",
    *check(job) {
      const { micro_batch: mb, global_batch: gb } = job.train;
      const { data } = job.parallel;
      const n = gb / (mb * data);
      if (!stageRanks(job) || n <= MICROBATCHES) return;
      yield {
        at: "train.global_batch",
        related: ["train.micro_batch"],
        found: `global_batch ${gb} in microbatches of ${mb} x data ${data}: ${Math.ceil(n)} of them`,
        fix: `at most global_batch ${MICROBATCHES * mb * data}`,
        tries: [{ "train.global_batch": MICROBATCHES * mb * data }],
      };
    },
    bad: "train: {global_batch: 100000000}",
  }),
  rule({
    code: "B237",
    title: `a step has more than ${BLOCKS} blocks`,
    why: "The plan lists every microbatch on every stage and chunk, forward and backward. A plan with so many entries cannot be compiled; the usual cause is a mistake in pipeline or global_batch.",
    level: "error",
    *check(job) {
      const { micro_batch: mb, global_batch: gb } = job.train;
      const { data, pipeline } = job.parallel;
      const n = gb / (mb * data);
      const { chunks } = pipelineOf(job);
      const each = 2 * pipeline * chunks;
      if (!stageRanks(job) || n > MICROBATCHES || n * each <= BLOCKS) return;
      const most = Math.floor(BLOCKS / each);
      yield {
        at: "train.global_batch",
        related: ["parallel.pipeline", "parallel.virtual_pipeline"],
        found: `${Math.ceil(n)} microbatches on ${pipeline} stages${chunks > 1 ? ` of ${chunks} chunks` : ""}: ${Math.ceil(n) * each} blocks`,
        fix: most > 0 ? `at most global_batch ${most * mb * data}` : "use fewer stages",
        tries: most > 0 ? [{ "train.global_batch": most * mb * data }] : [],
      };
    },
    bad: "model: {layers: 8}\nparallel: {world: 8, pipeline: 8}\ntrain: {global_batch: 65536}",
  }),
  rule({
    code: "B222",
    title: "momentum is not from 0 to below 1",
    why: "Momentum is the share of the previous update that a step keeps. With 1 no update would ever decay.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.type === "sgd" && !isShare(o.momentum))
        yield {
          at: "train.optimizer.momentum",
          found: `momentum ${o.momentum}`,
          fix: "0.9 is usual",
          tries: [{ "train.optimizer.momentum": 0.9 }],
        };
      if (o.type === "muon" && o.muon && !isShare(o.muon.momentum))
        yield {
          at: "train.optimizer.muon.momentum",
          found: `momentum ${o.muon.momentum}`,
          fix: "0.95 is usual",
          tries: [{ "train.optimizer.muon.momentum": 0.95 }],
        };
    },
    bad: "train: {optimizer: {type: sgd, momentum: 1}}",
  }),
  rule({
    code: "B223",
    title: "a key of another optimizer is set",
    why: "sgd has a momentum and no second moment; adamw, adam and muon have betas; the options of muon are in the section muon. A key of another optimizer has no effect.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      const unused: readonly [at: "train.optimizer.momentum" | "train.optimizer.betas", written: string][] =
        o.type !== "sgd"
          ? o.momentum === 0.9
            ? []
            : [["train.optimizer.momentum", `momentum ${o.momentum}`]]
          : o.betas[0] === 0.9 && o.betas[1] === 0.95
            ? []
            : [["train.optimizer.betas", `betas [${o.betas.join(", ")}]`]];
      for (const [at, written] of unused)
        yield {
          at,
          related: ["train.optimizer.type"],
          found: `${written} with type: ${o.type}`,
          fix: "leave it out",
          safe: { [at]: undefined },
        };
      if (o.type !== "muon" && o.muon)
        yield {
          at: "train.optimizer.muon",
          related: ["train.optimizer.type"],
          found: `section muon with type: ${o.type}`,
          fix: "set type: muon, or leave the section out",
          tries: [{ "train.optimizer.type": "muon" }],
        };
    },
    bad: "train: {optimizer: {type: adam, momentum: 0.5}}",
  }),
  rule({
    code: "B238",
    title: "muon's extra_scale_factor is not above 0",
    why: "It multiplies the updates of matrices. With 0 no matrix changes; a negative value increases the loss.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.type !== "muon" || !o.muon || o.muon.extra_scale_factor >= SMALLEST) return;
      yield {
        at: "train.optimizer.muon.extra_scale_factor",
        found: `extra_scale_factor ${o.muon.extra_scale_factor}`,
        fix: "0.2 is usual with scale_mode spectral",
        tries: [{ "train.optimizer.muon.extra_scale_factor": 0.2 }],
      };
    },
    bad: "train: {optimizer: {type: muon, muon: {extra_scale_factor: 0}}}",
  }),
  rule({
    code: "B214",
    title: "data.path or data.labels names no file",
    why: "Training needs a file of text or token ids; labels, if given, need a file, too.",
    level: "error",
    *check({ data }) {
      const fault = (path: string): string | undefined =>
        path.trim() === "" ? "an empty path" : path.includes("\0") ? "a path with a NUL character, which no file has" : undefined;
      const found = fault(data.path);
      if (found)
        yield {
          ...{ at: "data.path", found, fix: "name the training text, or its token ids, relative to the job file" },
          tries: [{ "data.path": "corpus.txt" }],
        };
      const inLabels = data.labels === null ? undefined : fault(data.labels);
      if (inLabels)
        yield { at: "data.labels", found: inLabels, fix: "name the file of labels, or leave it out", tries: [{ "data.labels": null }] };
    },
    bad: 'data: {path: ""}',
  }),
  rule({
    code: "B234",
    title: "u16 ids do not cover the vocabulary",
    why: "Two bytes hold ids up to 65535. If a file of 4-byte ids is read as u16, every id becomes two other tokens.",
    level: "warning",
    *check({ model, data }) {
      if (data.format !== "tokens" || data.dtype !== "u16" || model.vocab <= 2 ** 16) return;
      yield {
        at: "data.dtype",
        related: ["model.vocab"],
        found: `dtype u16 with vocab ${model.vocab}`,
        fix: "u32; keep u16 if the file has 2-byte ids",
        tries: [{ "data.dtype": "u32" }],
      };
    },
    bad: "model: {vocab: 128256}\ndata: {path: tokens.bin, dtype: u16}",
  }),
  rule({
    code: "B235",
    title: "loss_weighting: token needs labels",
    why: "Without labels every token counts in every microbatch, so that weighting by token and by microbatch are the same.",
    level: "warning",
    *check({ train, data }) {
      if (train.loss_weighting !== "token" || hasTokenWeights({ data })) return;
      yield {
        at: "train.loss_weighting",
        related: ["data.labels"],
        found: "loss_weighting: token without data.labels and data.documents.loss",
        fix: "leave it out, or name the file of labels, which marks ignored tokens",
        safe: { "train.loss_weighting": undefined },
      };
    },
    bad: "train: {loss_weighting: token}",
  }),
  rule({
    code: "B240",
    title: "init_std is the older name of init.std",
    why: "The initial weights have a section of their own, train.init. The older key is still read where init.std is not given.",
    level: "warning",
    *check({ train }) {
      if (train.init_std === null) return;
      yield {
        at: "train.init_std",
        related: ["train.init.std"],
        found: `init_std ${train.init_std}`,
        fix: `write init: {std: ${train.init.std}}`,
        safe: { "train.init_std": undefined, "train.init.std": train.init.std },
      };
    },
    bad: "train: {init_std: 0.02}",
  }),
] as const;
