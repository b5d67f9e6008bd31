/** The view of one rank: its coordinates, its groups and its program. */
import type { Plan } from "../../schemas/plan.ts";
import { blocksOf, blockTag, groupsOf } from "../../schemas/program.ts";
import { groupMembers, numberInStage, rankAt, rankCoordinate, stageOfRank, subAxisOf } from "../../schemas/sharding.ts";
import { programOf } from "../analysis/stages.ts";
import { denseAxes, expertAxes, type GridAxis } from "../passes/mesh.ts";
import { countText, rankList } from "../units.ts";
import { blockLines, blockName, printProgram, timesText } from "./programText.ts";
import { bold, fitLines, fitTable } from "./textLayout.ts";

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
    order: groupsOf(program.order).map((group) => group.map((run) => blockTag(run, program.chunks.length)).join("+")),
  };
}

/** The block runs that the text shows at the begin and at the end of the order. */
const SHOWN = { first: 24, last: 8 } as const;

/** Formats the view of one rank: equal layers and chunks are printed once, and a long order is cut in its middle. */
export function printRank(plan: Plan, { rank, stage, node, axes, order }: RankInspection, width: number): string[] {
  const left = order.length - SHOWN.first - SHOWN.last;
  const runs = left > 1 ? [...order.slice(0, SHOWN.first), `… ${countText(left)} more …`, ...order.slice(-SHOWN.last)] : order;
  const columns = [{ head: "" }, { head: "" }, { head: "" }];
  const rows = axes.map((a) => [a.axis, `${a.coordinate} of ${a.size}`, `group ${rankList(a.group)}`]);
  return [
    `${bold(`rank ${rank}`)}: stage ${stage}, node ${node}`,
    ...fitTable(columns, rows, { width, heads: false }),
    "",
    ...fitLines([`${bold("order")}: ${runs.join(" ")}, then the step`, "", ...printProgram(programOf(plan, stage))], width),
  ];
}
