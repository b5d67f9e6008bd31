/** Rules B: schedules of learning rate and weight decay. */
import { lengthOf } from "../../schemas/batchRampup.ts";
import { rule } from "./rule.ts";

/** Rules of schedules. */
export const trainingSchedule = [
  rule({
    code: "B204",
    title: "warm-up does not end before the decay",
    why: "decay_steps counts from the first step, warm-up included: with a longer warm-up nothing is left to decay over.",
    level: "error",
    *check({ train }) {
      const { optimizer: o } = train;
      if (o.schedule === "constant" || o.warmup_steps < o.decay_steps) return;
      yield {
        at: "train.optimizer.warmup_steps",
        related: ["train.optimizer.decay_steps"],
        found: `warmup_steps ${o.warmup_steps} with decay_steps ${o.decay_steps}`,
        fix: "shorten the warm-up, or lengthen the decay",
        tries: [
          { "train.optimizer.warmup_steps": Math.floor(o.decay_steps / 10) },
          { "train.optimizer.decay_steps": Math.max(lengthOf(train), o.warmup_steps + 1) },
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
    *check({ train }) {
      const { optimizer: o } = train;
      const length = lengthOf(train);
      // if warm-up also exceeds the decay, B204 reports it
      if (o.warmup_steps < length || (o.schedule !== "constant" && o.warmup_steps >= o.decay_steps)) return;
      yield {
        at: "train.optimizer.warmup_steps",
        related: ["train.steps"],
        found: `warmup_steps ${o.warmup_steps} with ${lengthText(train)}`,
        fix: "a tenth of the steps at most is usual",
        tries: [{ "train.optimizer.warmup_steps": Math.floor(length / 10) }],
      };
    },
    bad: "train: {steps: 10, optimizer: {warmup_steps: 20}}",
  }),
  rule({
    code: "B206",
    title: "the run ends before the decay does",
    why: "min_lr is reached at decay_steps; this run stops earlier, at a higher learning rate. That is right for a shortened run and wrong for a whole one.",
    level: "warning",
    *check({ train }) {
      const { optimizer: o } = train;
      const length = lengthOf(train);
      if (o.schedule === "constant" || o.decay_steps <= length || o.warmup_steps >= length) return;
      yield {
        at: "train.optimizer.decay_steps",
        related: ["train.steps"],
        found: `decay_steps ${o.decay_steps} with ${lengthText(train)}`,
        fix: "leave decay_steps out to decay over the whole run",
        tries: [{ "train.optimizer.decay_steps": length }],
      };
    },
    bad: "train: {steps: 100, optimizer: {decay_steps: 200, schedule: linear}}",
  }),
  rule({
    code: "B213",
    title: "min_lr has no effect with a constant schedule",
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
    code: "B215",
    title: "warmup_init is not between 0 and lr",
    why: "The warm-up rises from warmup_init to lr.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      if (o.lr <= 0 || (o.warmup_init >= 0 && o.warmup_init <= o.lr)) return;
      yield {
        at: "train.optimizer.warmup_init",
        related: ["train.optimizer.lr"],
        found: `warmup_init ${o.warmup_init} with lr ${o.lr}`,
        fix: "0 is usual",
        tries: [{ "train.optimizer.warmup_init": 0 }],
      };
    },
    bad: "train: {optimizer: {lr: 0.001, warmup_steps: 2, warmup_init: 0.01}}",
  }),
  rule({
    code: "B216",
    title: "schedule wsd needs wsd_decay_steps",
    why: "Warm-up, stable, decay: the last part has a length of its own, which only you can know.",
    level: "error",
    *check({ train }) {
      const { optimizer: o } = train;
      if (o.schedule !== "wsd" || o.wsd_decay_steps !== null) return;
      yield {
        at: "train.optimizer.wsd_decay_steps",
        related: ["train.optimizer.schedule"],
        found: "schedule: wsd without wsd_decay_steps",
        fix: "a tenth of the run is usual",
        tries: [{ "train.optimizer.wsd_decay_steps": Math.ceil(o.decay_steps / 10) }],
      };
    },
    bad: "train: {optimizer: {schedule: wsd}}",
  }),
  rule({
    code: "B217",
    title: "wsd_decay_steps needs schedule wsd",
    why: "Other schedules fall from the end of the warm-up on, or not at all.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      if (o.schedule === "wsd" || o.wsd_decay_steps === null) return;
      yield {
        at: "train.optimizer.wsd_decay_steps",
        related: ["train.optimizer.schedule"],
        found: `wsd_decay_steps ${o.wsd_decay_steps} with schedule: ${o.schedule}`,
        fix: "choose schedule wsd, or leave it out",
        tries: [{ "train.optimizer.wsd_decay_steps": null }, { "train.optimizer.schedule": "wsd" }],
      };
    },
    bad: "train: {optimizer: {schedule: cosine, wsd_decay_steps: 2}}",
  }),
  rule({
    code: "B218",
    title: "schedule wsd has no stable phase",
    why: "A fall that is longer than what the warm-up leaves of decay_steps has begun before the warm-up ends: the learning rate jumps down there, and never stays at lr. Megatron-LM accepts it in silence.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      const room = o.decay_steps - o.warmup_steps;
      if (o.schedule !== "wsd" || o.wsd_decay_steps === null || room <= 0 || o.wsd_decay_steps <= room) return;
      yield {
        at: "train.optimizer.wsd_decay_steps",
        related: ["train.optimizer.decay_steps", "train.optimizer.warmup_steps"],
        found: `wsd_decay_steps ${o.wsd_decay_steps} with decay_steps ${o.decay_steps} and warmup_steps ${o.warmup_steps}`,
        fix: "a tenth of the run is usual",
        tries: [{ "train.optimizer.wsd_decay_steps": Math.min(room, Math.ceil(o.decay_steps / 10)) }],
      };
    },
    bad: "train: {optimizer: {schedule: wsd, wsd_decay_steps: 20}}",
  }),
  rule({
    code: "B219",
    title: "a weight decay schedule needs its start and end",
    why: "With weight_decay_schedule linear or cosine, weight_decay itself is not used.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      const [start, end] = [o.weight_decay_start, o.weight_decay_end];
      if (o.weight_decay_schedule === "constant" || (start !== null && end !== null)) return;
      const at = start === null ? "train.optimizer.weight_decay_start" : "train.optimizer.weight_decay_end";
      yield {
        at,
        related: ["train.optimizer.weight_decay_schedule"],
        found: `weight_decay_schedule: ${o.weight_decay_schedule} without ${start === null ? "weight_decay_start" : "weight_decay_end"}`,
        fix: "write both ends, or leave weight_decay_schedule out",
        tries: [
          {
            "train.optimizer.weight_decay_start": start ?? 0,
            "train.optimizer.weight_decay_end": end ?? Math.max(o.weight_decay, start ?? 0),
          },
        ],
      };
    },
    bad: "train: {optimizer: {weight_decay_schedule: linear, weight_decay_end: 0.1}}",
  }),
  rule({
    code: "B220",
    title: "a constant weight decay has a start or an end",
    why: "Nothing would read them: weight_decay is what counts.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      const [start, end] = [o.weight_decay_start, o.weight_decay_end];
      if (o.weight_decay_schedule !== "constant" || (start === null && end === null)) return;
      yield {
        at: start === null ? "train.optimizer.weight_decay_end" : "train.optimizer.weight_decay_start",
        related: ["train.optimizer.weight_decay_schedule"],
        found: `${start === null ? `weight_decay_end ${end}` : `weight_decay_start ${start}`} with weight_decay_schedule: constant`,
        fix: "choose linear or cosine, or leave both out",
        tries: [
          { "train.optimizer.weight_decay_schedule": "linear" },
          { "train.optimizer.weight_decay_start": null, "train.optimizer.weight_decay_end": null },
        ],
      };
    },
    bad: "train: {optimizer: {weight_decay_start: 0, weight_decay_end: 0.1}}",
  }),
  rule({
    code: "B221",
    title: "weight decay falls over the run",
    why: "A weight decay that changes is meant to grow with the run, as the gradients shrink; Megatron-LM refuses one that falls. It works, and is mostly a slip.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      const [start, end] = [o.weight_decay_start, o.weight_decay_end];
      if (o.weight_decay_schedule === "constant" || start === null || end === null || end >= start || end < 0) return;
      yield {
        at: "train.optimizer.weight_decay_end",
        related: ["train.optimizer.weight_decay_start"],
        found: `weight_decay from ${start} down to ${end}`,
        fix: "put the larger one last",
        tries: [{ "train.optimizer.weight_decay_start": end, "train.optimizer.weight_decay_end": start }],
      };
    },
    bad: "train: {optimizer: {weight_decay_schedule: linear, weight_decay_start: 0.1, weight_decay_end: 0.01}}",
  }),
] as const;

/** Returns the length of a run in the steps that schedules count. */
const lengthText = (train: Parameters<typeof lengthOf>[0]): string =>
  train.batch_rampup
    ? `steps ${train.steps}, whose sequences are those of ${Number(lengthOf(train).toPrecision(6))} whole batches`
    : `steps ${train.steps}`;
