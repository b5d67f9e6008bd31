/** The error of a step that exceeds a bound of its plan, for all backends. */
import type { Program } from "../schemas/plan.ts";
import { Trouble } from "../schemas/trouble.ts";

type Bound = Program["bounds"][number];

/** Returns the error, which names the buffer of the count. `found`: the number of rows or rounds that the step needed. */
export function capacityExceeded({ needed, bound, of }: Bound, rank: number, found: number): Trouble {
  switch (of) {
    // tokens are never dropped silently, so a static bound that is too small is an error
    case "rows":
      return new Trouble(
        `${needed}, rank ${rank}: the router sent ${found} rows, and the plan holds at most ${bound}`,
        "raise model.moe.rows_bound (or write `worst`), and compile again",
      );
    case "rounds":
      return new Trouble(
        `${needed}, rank ${rank}: the router's choices were not even after ${bound} rounds of Sinkhorn's method: its logits lie too far apart, or are not finite`,
        "keep them small with model.moe.router.z_coeff or a lower learning rate, or balance with a loss",
      );
    default:
      return of satisfies never;
  }
}
