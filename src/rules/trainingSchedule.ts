/** Rules B: schedules of learning rate and weight decay. */
import { lengthOf } from "../../schemas/batchRampup.ts";
import { rule } from "./rule.ts";

/** Rules of schedules. */
export const trainingSchedule = [
  rule({
    code: "B204",
    title: "warm-up does not end before the decay",
    why: "decay_steps counts from the first step, warm-up included: if the warm-up is as long, no steps remain for the decay.",
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
    why: "The learning rate rises to lr over the warm-up; this run ends earlier.",
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
    why: "The learning rate reaches min_lr at decay_steps; this run ends earlier, at a higher rate. That is right only for a shortened run.",
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
        fix: "choose a decaying schedule, or leave min_lr out",
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
    why: "wsd means warm-up, stable, decay. The length of the decay cannot be derived from other keys.",
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
    why: "Other schedules decay from the end of the warm-up on, or not at all.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      if (o.schedule === "wsd" || o.wsd_decay_steps === null) return;
      yield {
        at: "train.optimizer.wsd_decay_steps",
        related: ["train.optimizer.schedule"],
        found: `wsd_decay_steps ${o.wsd_decay_steps} with schedule: ${o.schedule}`,
        fix: "use schedule: wsd, or leave wsd_decay_steps out",
        tries: [{ "train.optimizer.wsd_decay_steps": null }, { "train.optimizer.schedule": "wsd" }],
      };
    },
    bad: "train: {optimizer: {schedule: cosine, wsd_decay_steps: 2}}",
  }),
  rule({
    code: "B218",
    title: "schedule wsd has no stable phase",
    why: "If the decay is longer than decay_steps minus the warm-up, it starts before the warm-up ends. The learning rate then drops suddenly and never stays at lr. Megatron-LM accepts this without a message.",
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
    why: "With weight_decay_schedule linear or cosine, weight_decay is not used.",
    level: "error",
    *check({ train: { optimizer: o } }) {
      const [start, end] = [o.weight_decay_start, o.weight_decay_end];
      if (o.weight_decay_schedule === "constant" || (start !== null && end !== null)) return;
      const at = start === null ? "train.optimizer.weight_decay_start" : "train.optimizer.weight_decay_end";
      yield {
        at,
        related: ["train.optimizer.weight_decay_schedule"],
        found: `weight_decay_schedule: ${o.weight_decay_schedule} without ${start === null ? "weight_decay_start" : "weight_decay_end"}`,
        fix: "set both ends, or leave weight_decay_schedule out",
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
    why: "A constant schedule uses weight_decay alone and would ignore them.",
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
    why: "Weight decay usually grows over the run, while gradients shrink. Megatron-LM refuses a falling one; rankc runs it, but it is usually a mistake.",
    level: "warning",
    *check({ train: { optimizer: o } }) {
      const [start, end] = [o.weight_decay_start, o.weight_decay_end];
      if (o.weight_decay_schedule === "constant" || start === null || end === null || end >= start || end < 0) return;
      yield {
        at: "train.optimizer.weight_decay_end",
        related: ["train.optimizer.weight_decay_start"],
        found: `weight_decay from ${start} down to ${end}`,
        fix: "swap the two values",
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
