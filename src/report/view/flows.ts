/** Who sends to whom in a step: the bytes of a rank over each kind of group, for the matrix of the page. */
import type { Plan } from "../../../schemas/plan.ts";
import { microbatchesIn } from "../../../schemas/program.ts";
import type { TrafficFlow } from "./planView.ts";
import { stepInstructions } from "./programView.ts";

/** Returns the flows of all stages; collectives over the same groups are one flow. */
export function flowsOf({ programs }: Pick<Plan, "programs">): TrafficFlow[] {
  return programs.flatMap((program) => {
    const { stage } = program;
    const flows = new Map<string, TrafficFlow & { bytes: number }>();
    const add = (flow: TrafficFlow): void => {
      const key = [flow.axes, flow.pattern, flow.subAxes.join(), flow.world, flow.peer].join("|");
      const known = flows.get(key);
      if (known) known.bytes += flow.bytes;
      else flows.set(key, { ...flow });
    };
    for (const { instruction: i, times } of stepInstructions(program, microbatchesIn(program))) {
      const bytes = i.kind === "compute" ? 0 : i.bytes * times;
      if (i.kind === "collective")
        add({
          ...{ stage, axes: i.axes, pattern: i.how === "all_to_all" ? "exchange" : "ring", subAxes: i.subAxes, bytes },
          ...(i.world ? { world: true } : {}),
        });
      else if (i.kind === "send") add({ stage, axes: "pp", pattern: "send", subAxes: [], peer: i.peer, bytes });
    }
    return [...flows.values()];
  });
}
