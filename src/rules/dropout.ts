/** Rules M, E: dropout and jitter. */
import type { Job } from "../../schemas/job.ts";
import { isShare, rule } from "./rule.ts";

/** Rules of dropout and jitter. */
export const dropout = [
  rule({
    code: "M350",
    title: "a dropout is not a probability below 1",
    why: "Kept values are multiplied by 1 / (1 - p), which preserves the mean. With p = 1 the factor is infinite.",
    level: "error",
    *check({ model: { dropout } }) {
      for (const key of ["attention", "hidden"] as const) {
        const p = dropout[key];
        if (isShare(p)) continue;
        yield {
          at: `model.dropout.${key}`,
          found: `probability ${p}`,
          fix: "0 disables dropout; 0.1 is usual",
          tries: [{ [`model.dropout.${key}`]: p > 1 && p < 100 ? p / 100 : 0 }],
        };
      }
    },
    bad: "model: {dropout: {hidden: 1}}",
  }),
  rule({
    code: "M351",
    title: "a dropout of attention is so small that it drops nothing",
    why: "An attention weight has 15 random bits, so its probability is rounded to a multiple of 1/32768: below 1/65536 to 0. The kernels draw the bits all the same.",
    level: "warning",
    *check({ model: { dropout } }) {
      if (dropout.attention <= 0 || dropout.attention >= 2 ** -16) return;
      yield {
        at: "model.dropout.attention",
        found: `probability ${dropout.attention}`,
        fix: "0 disables dropout, and the kernels are faster; 0.1 is usual",
        tries: [{ "model.dropout.attention": 0 }],
      };
    },
    bad: "model: {dropout: {attention: 1.0e-5}}",
  }),
  rule({
    code: "E441",
    title: "jitter is not between 0 and 1",
    why: "The input of the router is multiplied by numbers from 1 - jitter to 1 + jitter. With a jitter of 1 or more some of them change its sign.",
    level: "error",
    *check({ model: { moe } }) {
      const jitter = moe?.router.jitter ?? null;
      if (jitter === null || (jitter > 0 && jitter < 1)) return;
      yield {
        at: "model.moe.router.jitter",
        found: `jitter ${jitter}`,
        fix: "0.01 is usual; null disables jitter",
        tries: [{ "model.moe.router.jitter": jitter <= 0 ? null : 0.01 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, jitter: 1.5}}}",
  }),
  rule({
    code: "B236",
    title: "the run has more sequences than dropout and jitter can number",
    why: "The random bits of dropout and jitter depend on the index of a sequence in the run, a signed 32-bit integer on devices. Beyond 2147483647 the bits of earlier sequences would repeat.",
    level: "error",
    *check(job) {
      const sequences = job.train.steps * job.train.global_batch;
      if (!isRandom(job) || sequences < 2 ** 31) return;
      yield {
        at: "train.steps",
        related: ["train.global_batch"],
        found: `${job.train.steps} steps of ${job.train.global_batch} sequences`,
        fix: `at most ${Math.floor((2 ** 31 - 1) / job.train.global_batch)} steps`,
        tries: [{ "train.steps": Math.floor((2 ** 31 - 1) / job.train.global_batch) }],
      };
    },
    bad: "model: {dropout: {hidden: 0.1}}\ntrain: {global_batch: 4096, steps: 1000000}",
  }),
];

const isRandom = ({ model: { dropout, moe } }: Job): boolean =>
  dropout.attention > 0 || dropout.hidden > 0 || (moe?.router.jitter ?? null) !== null;
