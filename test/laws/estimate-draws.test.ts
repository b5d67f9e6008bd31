/** The laws of the simulation over drawn jobs: every schedule, pipelines with tied parameters and multi-token prediction, and every overlap. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import type { SimulatedStage } from "../../src/analysis/estimate/simulate.ts";
import type { TimedBlock } from "../../src/analysis/estimate/timedBlocks.ts";
import { sumOfParts } from "../../src/analysis/estimate/timeParts.ts";
import { compile } from "../../src/compile.ts";
import { estimatedJobs, isValidJob } from "../support/estimatedJobs.ts";
import { draws } from "../support/tiers.ts";

const h100 = packageProfile("h100-80gb")!;

/** The profile with links that are as many times as fast, within a node and between nodes. */
const linked = ({ links: { host, network }, ...p }: DeviceProfile, inside: number, between: number): DeviceProfile => ({
  ...p,
  links: {
    host: {
      ...host,
      bandwidth: host.bandwidth * inside,
      tables: Object.fromEntries(
        Object.entries(host.tables).map(([how, rows]) => [
          how,
          rows.map((r) => ({ ...r, busbw: r.busbw.map(([size, rate]): [number, number] => [size, rate * inside]) })),
        ]),
      ),
    },
    network: { ...network, bandwidth: network.bandwidth * between },
  },
});

const kernelSeconds = ({ instructions }: TimedBlock): number =>
  instructions.reduce((sum, i) => sum + (i.instruction.kind === "compute" ? i.seconds : 0), 0);

/** Busy seconds of each stream of a stage, without messages, which may wait for their peers. */
function busySeconds({ runs, step }: SimulatedStage): number[] {
  const busy = new Map<string, number>();
  for (const { instructions } of [...runs.map(({ block }) => block), step])
    for (const { stream, seconds, instruction } of instructions)
      if (instruction.kind === "compute" || instruction.kind === "collective") busy.set(stream, (busy.get(stream) ?? 0) + seconds);
  return [...busy.values()];
}

test("of drawn jobs parts add up, no step is below its busiest stream or the chain of a microbatch, and faster links and kernels are never slower", () => {
  const factor = fc.double({ min: 0.1, max: 8, noNaN: true });
  const seen = new Set<string>();
  fc.assert(
    fc.property(estimatedJobs, factor, factor, factor, (job, inside, between, more) => {
      fc.pre(isValidJob(job));
      const { plan } = compile(job);
      const slow = linked(h100, inside, between);
      const { seconds, stages, simulation } = estimate(plan, { profile: slow });
      for (const { stream } of simulation.stages.flatMap(({ blocks }) => blocks.flatMap(({ instructions }) => instructions)))
        seen.add(stream);
      for (const { parts } of stages) {
        expect(Math.abs(sumOfParts(parts) - seconds)).toBeLessThan(1e-9 * (1 + seconds));
        expect(parts.bubble).toBeGreaterThanOrEqual(-1e-12);
      }
      for (const stage of simulation.stages)
        for (const busy of busySeconds(stage)) expect(seconds).toBeGreaterThanOrEqual(busy * (1 - 1e-9));
      const chain = simulation.stages.flatMap(({ runs }) => runs.filter(({ run }) => run.microbatch === 0 && run.kind !== "weights"));
      expect(seconds).toBeGreaterThanOrEqual(chain.reduce((sum, { block }) => sum + kernelSeconds(block), 0) * (1 - 1e-9));
      const better = 1 + more;
      const time = (profile: DeviceProfile): number => estimate(plan, { profile }).seconds;
      expect(time(linked(slow, better, 1))).toBeLessThanOrEqual(seconds * (1 + 1e-9));
      expect(time(linked(slow, 1, better))).toBeLessThanOrEqual(seconds * (1 + 1e-9));
      const clock = Math.min(2, slow.kernels.clock * better);
      expect(time({ ...slow, kernels: { ...slow.kernels, clock } })).toBeLessThanOrEqual(seconds * (1 + 1e-9));
    }),
    { numRuns: draws(8, 150) },
  );
  // asynchronous collectives were among them
  expect(seen).toContain("comm");
  expect(seen).toContain("gradients");
});
