/** The checkpoint state of a stage: tensors that continue from step to step. */
import { entryOf } from "../../schemas/lookup.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";

/** A tensor, and the buffer that holds a rank's shard of it. */
export interface StateTensor {
  readonly name: string;
  readonly buffer: Buffer;
}

/**
 * Returns the checkpoint state of one stage: the main copy of each parameter under the parameter's name, and its optimizer state. Tied
 * copies of another stage's parameter are not included; they are restored from the owner.
 */
export function checkpointState({ parameters, buffers }: Plan["programs"][number]): StateTensor[] {
  const byId = new Map(buffers.map((b) => [b.id, b]));
  const masters = new Set(parameters.map((p) => p.master));
  const own = parameters.filter((p) => !p.tied_to);
  return [
    ...own.map((p) => ({ name: p.name, buffer: entryOf(byId, p.master, "buffer") })),
    ...buffers.flatMap((buffer) =>
      buffer.kind === "optimizer" && buffer.sizes.length > 0 && !masters.has(buffer.id) ? [{ name: buffer.id, buffer }] : [],
    ),
  ];
}
