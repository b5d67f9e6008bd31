/** Times of kernels by a profile: events of timed steps, and kernels of attention that were not measured. */
import { expect, test } from "vitest";
import type { DeviceProfile, KernelFamily } from "../../schemas/deviceProfile.ts";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import type { KernelShape } from "../../src/analysis/estimate/kernelShape.ts";
import { KernelTimes } from "../../src/analysis/estimate/kernelTime.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";

const h200 = packageProfile("h200-141gb")!;

/** The shape of causal attention in bf16: two products of half of the scores, five in backward. */
function attentionOf(op: string, sizes: Readonly<Record<string, number>>): KernelShape {
  const { queries = 0, keys = 0, heads = 0, group = 1, width = 0, value_width = 0 } = sizes;
  const isGrad = op.endsWith("_grad");
  const flops = heads * queries * keys * (isGrad ? 3 * width + 2 * value_width : width + value_width);
  const bytes = 2 * queries * (isGrad ? 3 : 1) * (heads * (width + value_width) + (heads / group) * (width + value_width));
  return { op, family: op as KernelFamily, flops, bytes, dtype: "bf16", sizes };
}

test("attention that was not measured is estimated from the others of its width: within 13 % on average, each left out in turn", () => {
  const all = h200.kernels.measured;
  const errors = all
    .filter(({ op }) => op.startsWith("attention"))
    .map((left) => {
      const measured = all.filter((m) => m !== left);
      const profile: DeviceProfile = { ...h200, kernels: { ...h200.kernels, clock: 1, measured } };
      const { seconds } = new KernelTimes(profile).timeOf(attentionOf(left.op, left.sizes));
      return Math.abs(Math.log(seconds / (1e-6 * left.us)));
    });
  expect(errors.length).toBe(48);
  expect(errors.reduce((a, b) => a + b, 0) / errors.length).toBeLessThan(0.13);
});

test("a kernel of attention of a known width and an unknown length takes the rate of that width, not that of others", () => {
  const sizes = { queries: 2048, keys: 2048, heads: 128, group: 1, width: 64, value_width: 64 };
  const times = new KernelTimes({ ...h200, kernels: { ...h200.kernels, clock: 1 } });
  for (const op of ["attention", "attention_grad"]) {
    const shape = attentionOf(op, sizes);
    const rate = shape.flops / times.timeOf(shape).seconds;
    const rates = h200.kernels.measured
      .filter((m) => m.op === op && m.sizes.width === 64)
      .map((m) => attentionOf(op, m.sizes).flops / (1e-6 * m.us));
    expect(rates.length).toBe(5);
    expect(rate).toBeGreaterThan(Math.min(...rates));
    expect(rate).toBeLessThan(Math.max(...rates));
  }
});

test("a step whose instructions are timed takes the events of each instruction longer, a step that is not timed does not", () => {
  const { plan } = compile(
    jobOf({
      ...{ name: "small", model: { layers: 2, hidden: 256, heads: 4, vocab: 512, seq: 256 }, parallel: { world: 1 } },
      ...{ train: { global_batch: 1, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" } },
    }),
  );
  const [whole, timed] = [false, true].map((timed) => estimate(plan, { profile: h200, assumed: { timed } }));
  const { runs, step } = whole!.simulation.stages[0]!;
  const kernels = [...runs.map(({ block }) => block), step].flatMap(({ instructions }) => instructions);
  expect(kernels.length).toBeGreaterThan(50);
  expect(timed!.seconds - whole!.seconds).toBeCloseTo(1e-6 * h200.kernels.event_us * kernels.length, 9);
});
