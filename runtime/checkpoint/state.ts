/** What a run remembers from one step to the next, beside how far it is. */
import type { Buffer, Plan } from "../../schemas/plan.ts";

/** A tensor, and the buffer that holds a rank's piece of it. */
export interface StateTensor {
  readonly name: string;
  readonly buffer: Buffer;
}

/**
 * Of one stage: the main copy of each parameter under the parameter's name, and what the optimizer keeps of it. Copies of a
 * parameter that belongs to another stage follow from that.
 */
export function checkpointState({ parameters, buffers }: Plan["programs"][number]): StateTensor[] {
  const byId = new Map(buffers.map((b) => [b.id, b]));
  const masters = new Set(parameters.map((p) => p.master));
  const own = parameters.filter((p) => !p.tied_to);
  return [
    ...own.map((p) => ({ name: p.name, buffer: byId.get(p.master)! })),
    ...buffers.flatMap((buffer) =>
      buffer.kind === "optimizer" && buffer.sizes.length > 0 && !masters.has(buffer.id) ? [{ name: buffer.id, buffer }] : [],
    ),
  ];
}
