/** B: the batch, the optimizer and its schedule, the data. */

import { stageRanks } from "./mesh.ts";
import { divisorsNear, downTo, rule, upTo } from "./rule.ts";

const MICROBATCHES = 65536; // a role's order of work names each of them, forward and backward

export const batch = [
  rule({
    code: "B201",
    title: "micro_batch x data divides global_batch",
    why: "A step is a whole number of microbatches on every data rank. Megatron-LM catches this too, in a message about another argument (eval_global_batch_size).",
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
    title: "the learning rate is above 0",
    why: "With 0 nothing is learnt, and below 0 the loss is climbed.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.lr > 0) return;
      const lr = o.lr < 0 ? -o.lr : 1e-4;
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
    title: "min_lr lies between 0 and lr",
    why: "The schedule falls from lr to min_lr.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.lr <= 0 || (o.min_lr >= 0 && o.min_lr <= o.lr)) return;
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
    code: "B204",
    title: "warm-up ends before the decay does",
    why: "decay_steps counts from the first step, warm-up included: with a longer warm-up nothing is left to decay over.",
    level: "error",
    *check({ train: { optimizer: o, steps } }) {
      if (o.schedule === "constant" || o.warmup_steps < o.decay_steps) return;
      yield {
        at: "train.optimizer.warmup_steps",
        related: ["train.optimizer.decay_steps"],
        found: `warmup_steps ${o.warmup_steps} with decay_steps ${o.decay_steps}`,
        fix: "shorten the warm-up, or lengthen the decay",
        tries: [
          { "train.optimizer.warmup_steps": Math.floor(o.decay_steps / 10) },
          { "train.optimizer.decay_steps": Math.max(steps, o.warmup_steps + 1) },
        ],
      };
    },
    bad: "train: {steps: 100, optimizer: {warmup_steps: 50, decay_steps: 40, schedule: cosine}}",
  }),
  rule({
    code: "B205",
    title: "the run ends within the warm-up",
    why: "The learning rate rises to lr over the warm-up; this run stops before it gets there.",
    level: "warning",
    *check({ train: { optimizer: o, steps } }) {
      // where warm-up swallows the decay too, B204 has said so
      if (o.warmup_steps < steps || (o.schedule !== "constant" && o.warmup_steps >= o.decay_steps)) return;
      yield {
        at: "train.optimizer.warmup_steps",
        related: ["train.steps"],
        found: `warmup_steps ${o.warmup_steps} with steps ${steps}`,
        fix: "a tenth of the steps at most is usual",
        tries: [{ "train.optimizer.warmup_steps": Math.floor(steps / 10) }],
      };
    },
    bad: "train: {steps: 10, optimizer: {warmup_steps: 20}}",
  }),
  rule({
    code: "B206",
    title: "the run ends before the decay does",
    why: "min_lr is reached at decay_steps; this run stops earlier, at a higher learning rate. That is right for a shortened run and wrong for a whole one.",
    level: "warning",
    *check({ train: { optimizer: o, steps } }) {
      if (o.schedule === "constant" || o.decay_steps <= steps || o.warmup_steps >= steps) return;
      yield {
        at: "train.optimizer.decay_steps",
        related: ["train.steps"],
        found: `decay_steps ${o.decay_steps} with steps ${steps}`,
        fix: "leave decay_steps out to decay over the whole run",
        tries: [{ "train.optimizer.decay_steps": steps }],
      };
    },
    bad: "train: {steps: 100, optimizer: {decay_steps: 200, schedule: linear}}",
  }),
  rule({
    code: "B207",
    title: "betas are at least 0 and below 1",
    why: "They are the weights of the past in running means; at 1 a mean never learns anything, and its bias correction divides by zero.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.betas.every((b) => b >= 0 && b < 1)) return;
      const good = o.betas.map((b, i) => (b >= 0 && b < 1 ? b : [0.9, 0.95][i]));
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
    title: "the optimizer's eps is above 0",
    why: "An update divides by the root of the second moment plus eps; an embedding row that was never used has a second moment of 0, and 0 / 0 is not a number.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.eps > 0) return;
      yield { at: "train.optimizer.eps", found: `eps ${o.eps}`, fix: "1.0e-8 is usual", tries: [{ "train.optimizer.eps": 1e-8 }] };
    },
    bad: "train: {optimizer: {eps: 0}}",
  }),
  rule({
    code: "B209",
    title: "weight decay is not negative",
    why: "Each step shrinks the weights by lr x weight_decay; a negative one lets them grow without end.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.weight_decay >= 0) return;
      yield {
        at: "train.optimizer.weight_decay",
        found: `weight_decay ${o.weight_decay}`,
        fix: "0 or more",
        tries: [{ "train.optimizer.weight_decay": -o.weight_decay }],
      };
    },
    bad: "train: {optimizer: {weight_decay: -0.1}}",
  }),
  rule({
    code: "B210",
    title: "clip is not negative",
    why: "The gradient is scaled down to this norm; a negative one would turn it around. 0 means no clipping.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.clip >= 0) return;
      yield {
        at: "train.optimizer.clip",
        found: `clip ${o.clip}`,
        fix: "0 for no clipping, else a norm",
        tries: [{ "train.optimizer.clip": 0 }],
      };
    },
    bad: "train: {optimizer: {clip: -1}}",
  }),
  rule({
    code: "B211",
    title: "init_std is above 0",
    why: "With all weights 0 every neuron of a layer gets the same gradient, and they stay equal for ever.",
    level: "error",
    *check({ train }) {
      if (train.init_std > 0) return;
      yield { at: "train.init_std", found: `init_std ${train.init_std}`, fix: "0.02 is usual", tries: [{ "train.init_std": 0.02 }] };
    },
    bad: "train: {init_std: 0}",
  }),
  rule({
    code: "B212",
    title: `a step has at most ${MICROBATCHES} microbatches`,
    why: "The plan names each microbatch in the order of work; this many are mostly a slip in global_batch, or a micro_batch that is far too small.",
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
        fix: `global_batch ${MICROBATCHES * mb * data} at most`,
        tries: [{ "train.global_batch": MICROBATCHES * mb * data }],
      };
    },
    bad: "train: {global_batch: 100000000}",
  }),
  rule({
    code: "B213",
    title: "min_lr is not used by a constant schedule",
    why: "A constant schedule stays at lr after warm-up.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      if (o.schedule !== "constant" || !(o.min_lr > 0) || o.min_lr > o.lr) return;
      yield {
        at: "train.optimizer.min_lr",
        related: ["train.optimizer.schedule"],
        found: `min_lr ${o.min_lr} with schedule: constant`,
        fix: "choose a schedule that falls, or leave min_lr out",
        tries: [{ "train.optimizer.schedule": "cosine" }, { "train.optimizer.min_lr": 0 }],
      };
    },
    bad: "train: {optimizer: {lr: 0.001, min_lr: 0.0001}}",
  }),
  rule({
    code: "B214",
    title: "data.path and data.labels name files",
    why: "There is nothing to train on, or nothing that says what is learnt.",
    level: "error",
    *check({ data }) {
      const found = "an empty path";
      if (!data.path.trim())
        yield {
          ...{ at: "data.path", found, fix: "name the training text, or its token ids, relative to the job file" },
          tries: [{ "data.path": "corpus.txt" }],
        };
      if (data.labels !== null && !data.labels.trim())
        yield { at: "data.labels", found, fix: "name the file of labels, or leave it out", tries: [{ "data.labels": null }] };
    },
    bad: 'data: {path: ""}',
  }),
  rule({
    code: "B215",
    title: "ids in u16 do not reach the end of the vocabulary",
    why: "Two bytes hold ids up to 65535; a file of larger ids that is read so is two other tokens in place of each.",
    level: "warning",
    *check({ model, data }) {
      if (data.format !== "tokens" || data.dtype !== "u16" || model.vocab <= 2 ** 16) return;
      yield {
        at: "data.dtype",
        related: ["model.vocab"],
        found: `dtype u16 with vocab ${model.vocab}`,
        fix: "u32, unless the file holds u16 all the same",
        tries: [{ "data.dtype": "u32" }],
      };
    },
    bad: "model: {vocab: 128256}\ndata: {path: tokens.bin, dtype: u16}",
  }),
  rule({
    code: "B216",
    title: "loss_weighting: token needs labels",
    why: "Where every token is learnt, all microbatches have as many of them, and means of means are the mean: nothing is weighted.",
    level: "warning",
    *check({ train, data }) {
      if (train.loss_weighting !== "token" || data.labels !== null) return;
      yield {
        at: "train.loss_weighting",
        related: ["data.labels"],
        found: "loss_weighting: token without data.labels",
        fix: "leave it out, or name the file that says which tokens are ignored",
        tries: [{ "train.loss_weighting": "microbatch" }],
      };
    },
    bad: "train: {loss_weighting: token}",
  }),
] as const;
