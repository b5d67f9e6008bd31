/** What differs between two plans, by instruction. */
import { anyLayer } from "../analysis/layerText.ts";
import type { ViewData } from "../report/view/planView.ts";
import type { PlacedView } from "./planModel.ts";
import { planIndex, viewDiff } from "./state.ts";

type ProgramChange = NonNullable<ViewData["diff"]>["program"][number];

/** The change of an instruction. */
export interface InstructionChange {
  readonly change: ProgramChange["change"];
  readonly text: string;
}

const byId = new WeakMap<NonNullable<ViewData["diff"]>, Map<string, ProgramChange[]>>();

/** Returns the change of an instruction of the shown plan; undefined if both plans have it alike. */
export function changeOf({ id, stage, layer, block }: PlacedView): InstructionChange | undefined {
  const diff = viewDiff.value;
  if (!diff) return undefined;
  const known = byId.get(diff) ?? indexed(diff);
  byId.set(diff, known);
  const found = known.get(`${block.kind} ${anyLayer(id, layer)}`)?.find(({ change, layers, stages }) => {
    if (change === (planIndex.value === 0 ? "added" : "removed")) return false;
    // stages of a changed instruction are those of the second plan
    return (layers.length === 0 || layer === null || layers.includes(layer)) && (stages.includes(stage) || change === "changed");
  });
  return found && { change: found.change, text: changeText(found) };
}

function indexed(diff: NonNullable<ViewData["diff"]>): Map<string, ProgramChange[]> {
  const all = new Map<string, ProgramChange[]>();
  for (const change of diff.program) {
    const key = `${change.phase} ${change.id}`;
    all.set(key, [...(all.get(key) ?? []), change]);
  }
  return all;
}

function changeText({ change, differences }: ProgramChange): string {
  if (change === "added") return "only in the second plan";
  if (change === "removed") return "only in the first plan";
  return differences.map(({ what, old, new: now }) => `${what}: ${old} → ${now}`).join("; ");
}
