/** What a block run waits for, and what waits for it: transfers between virtual stages. */
import type { PlanModel } from "./planModel.ts";

/** A run of a stage. */
export interface RunPlace {
  readonly stage: number;
  readonly run: number;
}

const [FORWARD, BACKWARD] = [0, 1];

/** Returns the stage and the chunk of a virtual stage. */
const placeOf = (model: PlanModel, v: number) => ({ stage: v % model.stages, chunk: Math.floor(v / model.stages) });

function runAt(model: PlanModel, v: number, kind: number, microbatch: number): RunPlace | undefined {
  if (v < 0 || v >= model.stages * model.chunks) return undefined;
  const { stage, chunk } = placeOf(model, v);
  const run = model.runs[stage]?.place(kind, microbatch, chunk);
  return run === undefined ? undefined : { stage, run };
}

/** Returns the run of another virtual stage whose result a run receives; undefined if it receives none. */
export function sourceOf(model: PlanModel, { stage, run }: RunPlace): RunPlace | undefined {
  const runs = model.runs[stage];
  if (!runs) return undefined;
  const v = (runs.chunk[run] ?? 0) * model.stages + stage;
  const kind = runs.kind[run] ?? 0;
  const microbatch = runs.microbatch[run] ?? 0;
  if (kind === FORWARD) return runAt(model, v - 1, FORWARD, microbatch);
  return kind === BACKWARD ? runAt(model, v + 1, BACKWARD, microbatch) : undefined;
}

/** Returns the run of another virtual stage that receives the result of a run; undefined if none does. */
export function targetOf(model: PlanModel, { stage, run }: RunPlace): RunPlace | undefined {
  const runs = model.runs[stage];
  if (!runs) return undefined;
  const v = (runs.chunk[run] ?? 0) * model.stages + stage;
  const kind = runs.kind[run] ?? 0;
  const microbatch = runs.microbatch[run] ?? 0;
  if (kind === FORWARD) return runAt(model, v + 1, FORWARD, microbatch);
  return kind === BACKWARD ? runAt(model, v - 1, BACKWARD, microbatch) : undefined;
}
