/** The simulated step as timings, which profiles and traces of a run have too: the same ids, ops and names of streams. */
import type { Instruction, Plan } from "../../../schemas/plan.ts";
import { rankAt } from "../../../schemas/sharding.ts";
import type { Timing } from "../../../schemas/timing.ts";
import type { Simulation } from "./simulate.ts";
import type { TimedBlock } from "./timedBlocks.ts";

/** Returns the timings of a simulated step, in the order of the programs, for the first rank of each stage: all ranks of a stage are alike. */
export function timingsOf({ mesh }: Pick<Plan, "mesh">, { stages }: Pick<Simulation, "stages">): Timing[] {
  return stages.flatMap(({ stage, runs, step, stepTimes }) => {
    const rank = rankAt(mesh, stage, 0);
    const of = (block: TimedBlock, times: Float64Array, start: number): Timing[] =>
      block.instructions.map(({ instruction, stream, seconds }, n) => {
        const [from = 0, to = 0] = [times[2 * n], times[2 * n + 1]];
        // a block starts when its messages are there: they travelled before
        const early = instruction.kind === "recv" && block.kind !== "step" ? seconds : 0;
        return {
          ...{ rank, stream, id: instruction.id, op: opOf(instruction) },
          begin_us: 1e6 * (start + from - early),
          end_us: 1e6 * (start + to - early),
        };
      });
    return [...runs.flatMap(({ block, times, start }) => of(block, times.times, start)), ...of(step, stepTimes, 0)];
  });
}

/** As the runtime labels an instruction in a profile. */
const opOf = (i: Instruction): string => (i.kind === "compute" ? i.op : i.kind === "collective" ? i.how : i.kind);
