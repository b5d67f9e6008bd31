/** The evaluations of a run: during training on validation data, after it on test data as well. */
import type { EvaluationResult, Run } from "../../runtime/train/loop.ts";
import type { Job } from "../../schemas/job.ts";

/** Receives the result of an evaluation; called by the process that leads. */
export type OnEvaluation = (result: EvaluationResult) => void;

/** Returns whether an evaluation is due after a step that is not the last. All processes of a run return the same. */
export function isEvaluationDue(run: Pick<Run, "heldOut">, { train }: Job, step: number): boolean {
  const every = train.evaluation?.every ?? null;
  return every !== null && step % every === 0 && run.heldOut.includes("validation");
}

/** Evaluates after a step that is not the last, if one is due. All processes of a run call it after the same step. Returns the results. */
export async function evaluateWithin(run: Run, job: Job, step: number, on: OnEvaluation): Promise<EvaluationResult[]> {
  if (!isEvaluationDue(run, job, step)) return [];
  const result = await run.evaluate("validation");
  if (run.leads) on(result);
  return [result];
}

/** Evaluates after the last step. Returns the results. */
export async function evaluateAtEnd(run: Run, { train }: Job, step: number, on: OnEvaluation): Promise<EvaluationResult[]> {
  const { evaluation } = train;
  if (!evaluation) return [];
  const isDue = evaluation.every !== null && step % evaluation.every === 0;
  const results: EvaluationResult[] = [];
  for (const part of run.heldOut) {
    if (!evaluation.at_end && !(part === "validation" && isDue)) continue;
    const result = await run.evaluate(part);
    results.push(result);
    if (run.leads) on(result);
  }
  return results;
}
