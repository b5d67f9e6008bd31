/** The simulated step as timings, which profiles and traces of a run have too: the same ids, ops and names of streams. */
import type { Instruction, Plan } from "../../../schemas/plan.ts";
import { rankAt } from "../../../schemas/sharding.ts";
import type { Timing } from "../../../schemas/timing.ts";
import type { SimulatedStage, Simulation } from "./simulate.ts";
import type { TimedBlock } from "./timedBlocks.ts";

/** Returns the timings of a simulated step, in the order of the programs, for the first rank of each stage: all ranks of a stage are alike. */
export const timingsOf = ({ mesh }: Pick<Plan, "mesh">, { stages }: Pick<Simulation, "stages">): Timing[] =>
  stages.flatMap((stage) => [...timingsOfRank(rankAt(mesh, stage.stage, 0), stage)]);

/** Yields the timings of a rank of a simulated stage: a step of a large model has hundreds of thousands. */
export function* timingsOfRank(rank: number, { runs, step, stepTimes }: SimulatedStage): Generator<Timing> {
  function* of(block: TimedBlock, times: Float64Array, start: number): Generator<Timing> {
    for (const [n, { instruction, stream, seconds }] of block.instructions.entries()) {
      const [from = 0, to = 0] = [times[2 * n], times[2 * n + 1]];
      // a block starts when its messages are there: they travelled before
      const early = instruction.kind === "recv" && block.kind !== "step" ? seconds : 0;
      yield {
        ...{ rank, stream, id: instruction.id, op: opOf(instruction) },
        begin_us: 1e6 * (start + from - early),
        end_us: 1e6 * (start + to - early),
      };
    }
  }
  for (const { block, times, origin } of runs) yield* of(block, times.times, origin);
  yield* of(step, stepTimes, 0);
}

/** As the runtime labels an instruction in a profile. */
const opOf = (i: Instruction): string => (i.kind === "compute" ? i.op : i.kind === "collective" ? i.how : i.kind);
