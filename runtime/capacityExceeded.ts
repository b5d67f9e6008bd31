/** What a run ends with where a step needed more than its plan bounds. Apart from the backends, which all look for it. */
import type { Program } from "../schemas/plan.ts";
import { Trouble } from "../schemas/trouble.ts";

type Bound = Program["bounds"][number];

/** `found` is what was needed. */
export function capacityExceeded({ needed, bound, of }: Bound, rank: number, found: number): Trouble {
  const id = needed.replace(/\.needed$/, "");
  switch (of) {
    // a static bound of rows was too small for what the router chose: nothing is dropped in silence
    case "rows":
      return new Trouble(
        `${id}, rank ${rank}: the router sent ${found} rows, and the plan holds at most ${bound}`,
        "raise model.moe.rows_bound (or write `worst`), and compile again",
      );
    case "rounds":
      return new Trouble(
        `${id}, rank ${rank}: the router's choices were not even after ${bound} rounds of Sinkhorn's method: its logits lie too far apart, or are not finite`,
        "keep them small with model.moe.router.z_coeff or a lower learning rate, or balance with a loss",
      );
    default:
      return of satisfies never;
  }
}
