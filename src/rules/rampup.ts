/** Rules B: the batch ramp-up. */

import { lengthOf, MOST_SIZES, phasesOf } from "../../schemas/batchRampup.ts";
import { evenBy } from "../../schemas/experts.ts";
import { stageRanks } from "./mesh.ts";
import { downTo, rule, upTo } from "./rule.ts";

/** Rules of the batch ramp-up. */
export const rampup = [
  rule({
    code: "B226",
    title: "the batch ramp-up does not fit global_batch",
    why: "The last increment must reach global_batch exactly.",
    level: "error",
    *check({ train: { batch_rampup: ramp, global_batch: whole } }) {
      if (!ramp || (ramp.start < whole && (whole - ramp.start) % ramp.increment === 0)) return;
      const found = `from ${ramp.start} by ${ramp.increment} to global_batch ${whole}`;
      if (ramp.start >= whole) {
        yield {
          at: "train.batch_rampup.start",
          related: ["train.global_batch"],
          found,
          fix: "start below global_batch, or leave batch_rampup out",
          tries: [{ "train.batch_rampup": null }],
        };
        return;
      }
      yield {
        at: "train.batch_rampup.increment",
        related: ["train.batch_rampup.start", "train.global_batch"],
        found,
        fix: "use an increment that divides the difference",
        tries: [{ "train.batch_rampup.increment": ramp.start }, { "train.batch_rampup.increment": whole - ramp.start }],
      };
    },
    bad: "train: {global_batch: 16, steps: 100, batch_rampup: {start: 4, increment: 5, samples: 40}}",
  }),
  rule({
    code: "B227",
    title: "micro_batch x data does not divide every batch of the ramp-up",
    why: "Each step is a whole number of microbatches on every data rank, also while the batch grows. Megatron-LM stops in the middle of the run, at the first batch size that does not fit.",
    level: "error",
    *check(job) {
      const { micro_batch: mb, batch_rampup: ramp, global_batch: whole } = job.train;
      const one = mb * job.parallel.data;
      if (!ramp || !stageRanks(job) || whole % one !== 0) return;
      for (const key of ["start", "increment"] as const) {
        const size = ramp[key];
        if (size % one === 0) continue;
        yield {
          at: `train.batch_rampup.${key}`,
          related: ["train.micro_batch", "parallel.world"],
          found: `${key} ${size} with micro_batch ${mb} x data ${job.parallel.data} = ${one}`,
          fix: `${key} must be a multiple of ${one}`,
          tries: [{ [`train.batch_rampup.${key}`]: downTo(size, one) }, { [`train.batch_rampup.${key}`]: upTo(size, one) }],
        };
      }
    },
    bad: "parallel: {world: 4}\ntrain: {global_batch: 16, steps: 100, batch_rampup: {start: 4, increment: 6, samples: 40}}",
  }),
  rule({
    code: "B228",
    title: "quantile balancing needs a constant batch size",
    why: "The bias of a step is a sum over its microbatches, divided by their number in global_batch; in a smaller batch it would be too small.",
    level: "error",
    *check({ train, model: { moe } }) {
      if (!train.batch_rampup || !moe || evenBy(moe.router) !== "quantile") return;
      yield {
        at: "train.batch_rampup",
        related: ["model.moe.router.balance"],
        found: "batch_rampup with balance: quantile",
        fix: "leave batch_rampup out, or use a balancing loss",
        tries: [{ "train.batch_rampup": null }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: quantile}}}\ntrain: {global_batch: 8, steps: 100, batch_rampup: {start: 4, increment: 4, samples: 40}}",
  }),
  rule({
    code: "B229",
    title: `a batch grows through fewer than ${MOST_SIZES} sizes`,
    why: "rankc verifies the schedule of every batch size, and on CUDA each size has its own graph. So many sizes are usually a mistake in the increment.",
    level: "error",
    *check({ train: { batch_rampup: ramp, global_batch: whole } }) {
      if (!ramp || ramp.start >= whole || (whole - ramp.start) % ramp.increment !== 0) return;
      const sizes = (whole - ramp.start) / ramp.increment;
      if (sizes < MOST_SIZES) return;
      const least = Math.ceil(sizes / (MOST_SIZES - 1));
      const fewer = Array.from({ length: 64 }, (_, i) => least + i).filter((n) => sizes % n === 0);
      yield {
        at: "train.batch_rampup.increment",
        related: ["train.batch_rampup.start", "train.global_batch"],
        found: `${sizes} increments of ${ramp.increment} from ${ramp.start} to ${whole}`,
        fix: "use a larger increment",
        tries: [...fewer, sizes].map((n) => ({ "train.batch_rampup.increment": ramp.increment * n })),
      };
    },
    bad: "train: {global_batch: 2049, steps: 10000, batch_rampup: {start: 1, increment: 1, samples: 4096}}",
  }),
  rule({
    code: "B233",
    title: "the run ends before its batch reaches global_batch",
    why: "The batch reaches global_batch after batch_rampup.samples sequences; this run reads fewer.",
    level: "warning",
    *check({ train }) {
      const { batch_rampup: ramp } = train;
      const whole = phasesOf(train).at(-1)!;
      if (!ramp || ramp.start >= train.global_batch || lengthOf(train) * train.global_batch > whole.from) return;
      yield {
        at: "train.batch_rampup.samples",
        related: ["train.steps"],
        found: `samples ${ramp.samples} with steps ${train.steps}, which have ${Math.round(lengthOf(train) * train.global_batch)}`,
        fix: "use a tenth of the run for the ramp-up, or train longer",
        tries: [
          { "train.batch_rampup.samples": Math.max(1, Math.floor((train.steps * train.global_batch) / 10)) },
          { "train.steps": 2 * Math.ceil(phasesOf(train).reduce((sum, p) => sum + (Number.isFinite(p.steps) ? p.steps : 1), 0)) },
        ],
      };
    },
    bad: "train: {global_batch: 8, steps: 10, batch_rampup: {start: 4, increment: 4, samples: 400}}",
  }),
] as const;
