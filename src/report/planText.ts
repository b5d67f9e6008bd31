/** Formats plan.txt: mesh, memory, programs and collectives with their origins. */
import type { Plan, Program } from "../../schemas/plan.ts";
import { inspectPlan } from "./inspect.ts";
import { printHead, printMemory, printRoles, printSchedule } from "./inspectText.ts";
import { programForm, programLines } from "./programText.ts";

/** Returns the text of plan.txt. */
export function printPlanText(plan: Plan): string {
  const view = inspectPlan(plan);
  return [
    ...printHead(view),
    "",
    ...printMemory(view),
    "",
    ...printSchedule(view),
    "",
    ...printRoles(view),
    ...programs(plan.programs),
  ].join("\n");
}

/** A stage that equals the preceding one is only named. */
function programs(all: readonly Program[]): string[] {
  const blocks: { readonly program: Program; readonly lines: readonly string[]; readonly form: string; last: number }[] = [];
  for (const program of all) {
    const lines = programLines(program);
    const form = programForm(program, lines);
    const before = blocks.at(-1);
    if (before?.form === form) before.last = program.stage;
    else blocks.push({ program, lines: lines.map(({ text }) => text), form, last: program.stage });
  }
  return blocks.flatMap(({ program, lines, last }) => {
    const same =
      last === program.stage
        ? ""
        : ` (stage${last > program.stage + 1 ? "s" : ""} ${program.stage + 1}${last > program.stage + 1 ? `..${last}` : ""} the same on their layers)`;
    return [`program of stage ${program.stage}${same}`, ...lines];
  });
}
