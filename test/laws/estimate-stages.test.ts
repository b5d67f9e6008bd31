/** A search estimates a job by one stage of each kind: exactly what the estimate of its whole plan says. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { cpu } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { estimateJob } from "../../src/search/estimateJob.ts";
import { estimatedJobs, isValidJob } from "../support/estimatedJobs.ts";
import { draws } from "../support/tiers.ts";

const profile = packageProfile("h100-80gb")!;

test("the estimate by one stage of each kind is that of the whole plan, for each stage", () => {
  let checked = 0;
  fc.assert(
    fc.property(estimatedJobs, (job) => {
      fc.pre(isValidJob(job));
      checked++;
      const whole = estimate(compile(job).plan, { profile });
      const sampled = estimateJob(job, { profile, target: cpu });
      expect(sampled.seconds).toBeCloseTo(whole.seconds, 12);
      expect(sampled.busiest).toBe(whole.busiest);
      for (const [s, { parts }] of sampled.stages.entries()) {
        const other = whole.stages[s]!.parts;
        expect(parts.bubble).toBeCloseTo(other.bubble, 9);
        for (const [name, seconds] of Object.entries(parts.kernels)) expect(seconds).toBeCloseTo(other.kernels[name as "products"], 9);
      }
    }),
    { numRuns: draws(6, 60) },
  );
  expect(checked).toBeGreaterThan(3);
});
