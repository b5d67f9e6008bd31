/** The view of one rank: its coordinates, its groups and its program. */
import type { Plan } from "../../schemas/plan.ts";
import { blocksOf, blockTag } from "../../schemas/program.ts";
import { groupMembers, numberInStage, rankAt, rankCoordinate, stageOfRank, subAxisOf } from "../../schemas/sharding.ts";
import { programOf } from "../analysis/stages.ts";
import { denseAxes, expertAxes, type GridAxis } from "../passes/mesh.ts";
import { table } from "../units.ts";
import { blockLines, blockName, timesText } from "./programText.ts";

/** The view of one rank. */
export interface RankInspection {
  readonly rank: number;
  readonly stage: number;
  readonly node: number;
  readonly axes: readonly {
    readonly axis: string;
    readonly coordinate: number;
    readonly size: number;
    readonly group: readonly number[];
  }[];
  readonly program: readonly { readonly block: string; readonly times: string; readonly lines: readonly string[] }[];
  readonly order: readonly string[];
}

/** Returns the coordinates, the groups and the program of a rank. The rank must exist. */
export function inspectRank(plan: Plan, rank: number): RankInspection {
  const { mesh } = plan;
  const stage = stageOfRank(mesh, rank);
  const local = numberInStage(mesh, rank);
  const program = programOf(plan, stage);
  const axis = (name: GridAxis) => {
    const subAxes = mesh.axes[name];
    let coordinate = 0;
    for (const f of [...subAxes].reverse()) coordinate = coordinate * subAxisOf(mesh, f).size + rankCoordinate(mesh, local, f);
    const group = groupMembers(mesh, local, subAxes).map((n) => rankAt(mesh, stage, n));
    return { axis: name, coordinate, size: mesh.sizes[name], group };
  };
  const stages = Array.from({ length: mesh.sizes.pp }, (_, s) => rankAt(mesh, s, local));
  return {
    rank,
    stage,
    node: Math.floor(rank / mesh.gpus_per_node),
    axes: [...[...denseAxes, ...expertAxes].map(axis), { axis: "pp", coordinate: stage, size: mesh.sizes.pp, group: stages }],
    program: blocksOf(program).map((block) => ({
      block: blockName(block, program),
      times: timesText(block),
      lines: blockLines(program, block).map((line) => line.text),
    })),
    order: program.order.map((run) => blockTag(run, program.chunks.length)),
  };
}

/** Formats the view of one rank as text. */
export function printRank({ rank, stage, node, axes, program, order }: RankInspection): string {
  return [
    `rank ${rank}: stage ${stage}, node ${node}`,
    ...table(axes.map((a) => [a.axis, `${a.coordinate} of ${a.size}`, `group ${a.group.join(",")}`])),
    "",
    `order: ${order.join(" ")} then the step`,
    "",
    ...program.flatMap(({ block, times, lines }) => [`${block}, ${times}:`, ...lines, ""]),
  ].join("\n");
}
