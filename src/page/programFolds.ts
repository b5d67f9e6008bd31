/** Sections of a block for the panel program: equal layers together, and the lines of other ranks. */
import { shardCount } from "../../schemas/sharding.ts";
import type { AxisName, PlanModel, ProgramSection } from "./planModel.ts";
import { axisOf } from "./scheduleDraw.ts";

/** Consecutive layers with the same instructions; or one section. */
export interface Fold {
  readonly sections: readonly ProgramSection[];
}

/** The line of the other ranks of the groups along some axes. */
export interface Lane {
  readonly axes: string;
  /** The axis whose colour it has. */
  readonly axis: AxisName;
  readonly ranks: number;
}

/** Collects consecutive layers of the same part. */
export function foldSections(sections: readonly ProgramSection[]): Fold[] {
  const folds: { readonly sections: ProgramSection[] }[] = [];
  for (const section of sections) {
    const last = folds.at(-1);
    const before = last?.sections.at(-1);
    if (last && before && section.layer !== null && before.part === section.part) last.sections.push(section);
    else folds.push({ sections: [section] });
  }
  return folds;
}

/** Returns a lane for each set of axes that instructions of a block send over. */
export function lanesOf(model: PlanModel, stage: number, sections: readonly ProgramSection[]): Lane[] {
  const lanes = new Map<string, Lane>();
  for (const { instructions } of sections)
    for (const { view } of instructions) {
      const name = laneOf(stage, view);
      if (name === undefined || lanes.has(name)) continue;
      const ranks = view.kind !== "collective" ? 2 : view.world ? model.view.mesh.world : shardCount(model.view.mesh, view.subAxes ?? []);
      lanes.set(name, { axes: name, axis: axisOf(view.axes) ?? "pp", ranks });
    }
  return [...lanes.values()];
}

/** Returns the name of the lane of an instruction; undefined if it sends nothing. */
export function laneOf(stage: number, { kind, axes, peer }: ProgramSection["instructions"][number]["view"]): string | undefined {
  if (kind === "compute") return undefined;
  return kind === "collective" ? axes || "all" : `stage ${stage + (peer ?? 0)}`;
}

/** Returns the number and the bytes of what a section sends, by axes. */
export function countsByAxis({ instructions }: ProgramSection) {
  const counts = new Map<string, { axes: string; axis: AxisName; count: number; bytes: number }>();
  for (const { view } of instructions) {
    const axis = axisOf(view.axes);
    if (view.kind === "compute" || axis === undefined || view.axes === undefined) continue;
    const sum = counts.get(view.axes) ?? { axes: view.axes, axis, count: 0, bytes: 0 };
    counts.set(view.axes, sum);
    sum.count++;
    sum.bytes += view.kind === "recv" ? 0 : view.bytes;
  }
  return [...counts.values()];
}
