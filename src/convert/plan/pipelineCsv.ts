/**
 * The schedule of a plan as the CSV that torch.distributed.pipelining loads with `_load_csv` in its format compute_only (PyTorch 2.6 to 2.9). A
 * row is a pipeline rank, a cell a time slot: a virtual stage, an action and a microbatch, such as 2F0; an empty cell is idle. Actions: F
 * forward, B backward, I gradients of inputs, W gradients of weights.
 */
import type { BlockRun, Plan } from "../../../schemas/plan.ts";
import { chunksPerStage } from "../../analysis/stages.ts";
import { durationOf, timesOf } from "../../passes/schedule.ts";

/** Returns the CSV of a plan. Every action takes one slot, and waits for the actions that it depends on. */
export function pipelineCsv({ programs }: Pick<Plan, "programs">): string {
  const chunks = chunksPerStage({ programs });
  const orders = programs.map(({ order }) => order);
  const split = orders.some((order) => order.some(({ kind }) => kind === "weights"));
  const letters: Readonly<Record<BlockRun["kind"], string>> = { forward: "F", backward: split ? "I" : "B", weights: "W" };
  const stages = timesOf(orders, chunks, () => 1);
  const slots = durationOf(stages);
  return stages
    .map((pieces, stage) => {
      const cells = Array.from({ length: slots }, () => "");
      for (const { run, start } of pieces) cells[start] = `${run.chunk * programs.length + stage}${letters[run.kind]}${run.microbatch}`;
      return `${cells.join(",")}\r\n`;
    })
    .join("");
}
