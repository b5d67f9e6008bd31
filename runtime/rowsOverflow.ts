/** What a run ends with where a plan bounds rows and the router chose more. Apart from the backends, which all look for it. */
import { Trouble } from "../schemas/trouble.ts";

/** A static bound of rows was too small for what the router chose: nothing is dropped in silence. */
export const rowsOverflow = (id: string, rank: number, needed: number, bound: number): Trouble =>
  new Trouble(
    `${id}, rank ${rank}: the router sent ${needed} rows, and the plan holds at most ${bound}`,
    "raise model.moe.rows_bound (or write `worst`), and compile again",
  );
