/** The mesh: every rank in the box of its node, coloured by its place on an axis; a rank under the pointer or the focus shows its groups. */
import { useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { countText, plural, ranges } from "../../units.ts";
import { Canvas, pointOf, type Sheet } from "../canvas.tsx";
import { type MeshLayout, meshLayout } from "../meshLayout.ts";
import { between, palette } from "../palette.ts";
import { type AxisName, axisNames, type PlanModel } from "../planModel.ts";
import { focusRank, plan, select, selectedRanks, selection, status } from "../state.ts";

/** Names of axes in words. */
export const axisTitles: Readonly<Record<AxisName, string>> = {
  ...{ tp: "tensor", cp: "context", dp: "data", etp: "expert tensor", ep: "expert", edp: "expert data", pp: "pipeline" },
};

/** Room for the names of rows, where nodes are too small for theirs. */
const ROW_NAMES = 74;

/** The panel of the mesh. */
export function MeshPanel() {
  const coloured = useSignal<AxisName>(plan.value.stages > 1 ? "pp" : "tp");
  const hovered = useSignal<number | undefined>(undefined);
  const layout = useMemo((): { current: MeshLayout | undefined } => ({ current: undefined }), []);
  const shown = plan.value;
  const { world, gpus_per_node } = shown.view.mesh;
  const draw = ({ context, width, height }: Sheet): void => {
    layout.current = meshLayout({ world, perNode: gpus_per_node, left: ROW_NAMES, width, height, label: 16, largest: 40 });
    drawMesh(context, layout.current, shown, {
      axis: coloured.value,
      rank: hovered.value ?? focusRank.value,
      isHovered: hovered.value !== undefined,
    });
  };
  const rankUnder = (event: MouseEvent): number | undefined => {
    const { x, y } = pointOf(event);
    return layout.current?.rankAt(x, y);
  };
  const onMove = (event: MouseEvent): void => {
    hovered.value = rankUnder(event);
    if (hovered.value !== undefined) status.value = rankText(shown, hovered.value);
  };
  const step = (event: KeyboardEvent): void => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: gpus_per_node, ArrowUp: -gpus_per_node }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const rank = Math.min(world - 1, Math.max(0, focusRank.value + by));
    hovered.value = undefined;
    select({ kind: "rank", rank });
    status.value = rankText(shown, rank);
  };
  return (
    <section class="panel mesh-panel">
      <AxisList coloured={coloured.value} onColour={(axis) => (coloured.value = axis)} rank={hovered.value ?? focusRank.value} />
      <div class="canvas-room">
        <Canvas
          draw={draw}
          label={`${plural(world, "rank")} on nodes of ${gpus_per_node}; arrow keys move from rank to rank`}
          tabIndex={0}
          class="fill pointer"
          onMouseMove={onMove}
          onMouseLeave={() => (hovered.value = undefined)}
          onClick={(event) => {
            const rank = rankUnder(event);
            select(rank === undefined ? undefined : { kind: "rank", rank });
          }}
          onKeyDown={step}
        />
      </div>
    </section>
  );
}

/** Returns a sentence about a rank: node, stage and coordinates. */
export function rankText(of: PlanModel, rank: number): string {
  const at = axisNames.filter((axis) => of.view.mesh.sizes[axis] > 1).map((axis) => `${axis} ${of.coordinate(rank, axis)}`);
  return `rank ${countText(rank)}: node ${of.nodeOf(rank)}, stage ${of.stageOf(rank)}${at.length > 0 ? `; ${at.join(", ")}` : ""}`;
}

interface AxisListProps {
  readonly coloured: AxisName;
  readonly rank: number;
  onColour(axis: AxisName): void;
}

/** The axes with more than one rank: sizes, links, and the group of a rank. */
function AxisList({ coloured, rank, onColour }: AxisListProps) {
  const shown = plan.value;
  const axes = shown.view.inspection.mesh.axes.filter(({ size }) => size > 1);
  if (axes.length === 0) return <p class="note">One rank: no groups.</p>;
  return (
    <div class="table-room">
      <table class="axes">
        <caption class="quiet">Groups of rank {countText(rank)}. An axis colours the ranks by their place on it.</caption>
        <thead>
          <tr>
            <th scope="col">axis</th>
            <th scope="col" class="number">
              ranks
            </th>
            <th scope="col" class="number">
              groups
            </th>
            <th scope="col">links</th>
            <th scope="col">ranks of the group</th>
          </tr>
        </thead>
        <tbody>
          {axes.map(({ axis, size, groups, nodes, cross_nodes }) => {
            const name = axisNames.find((a) => a === axis);
            if (!name) return null;
            const members = shown.group(rank, name);
            const isSelected = selection.value?.kind === "axis" && selection.value.axis === name;
            return (
              <tr key={axis} class={isSelected ? "selected" : ""}>
                <th scope="row">
                  <button
                    type="button"
                    class="chip"
                    aria-pressed={coloured === name}
                    onClick={() => {
                      onColour(name);
                      select({ kind: "axis", axis: name });
                    }}
                  >
                    <i style={{ background: palette.value.axes[name] }} />
                    {name} <span class="quiet">{axisTitles[name]}</span>
                  </button>
                </th>
                <td class="number">{countText(size)}</td>
                <td class="number">{countText(groups)}</td>
                <td>
                  {nodes === 1 ? "inside a node" : `across ${nodes} nodes`}
                  {cross_nodes > 0 && cross_nodes < groups ? ` (${countText(cross_nodes)} groups)` : ""}
                </td>
                <td class="ranks">{groupText(members)}</td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

/** Returns the ranks of a group as text: `0–7`, `0, 64, … 448 (8)`. */
export function groupText(members: readonly number[]): string {
  const text = ranges(members).replaceAll("-", "–").replaceAll(",", ", ");
  if (text.length <= 40) return text;
  const [first = 0, second = 0] = members;
  const step = second - first;
  const isEven = members.every((rank, i) => rank === first + i * step);
  return isEven ? `${first}, ${second}, … ${members.at(-1)}` : `${members.slice(0, 4).join(", ")}, … ${members.at(-1)}`;
}

interface Shown {
  readonly axis: AxisName;
  readonly rank: number;
  readonly isHovered: boolean;
}

/** Draws nodes and ranks. Ranks outside of the selection are pale. */
function drawMesh(context: CanvasRenderingContext2D, layout: MeshLayout, of: PlanModel, { axis, rank, isHovered }: Shown): void {
  const colours = palette.value;
  const { world, sizes, gpus_per_node } = of.view.mesh;
  const { cell, box } = layout;
  // the groups of a rank have frames; other selections are in colour, and the rest is pale
  const chosen = new Set(selection.value?.kind === "rank" ? [] : selectedRanks.value);
  const isNamed = cell >= 14;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  for (let n = 0; n < Math.ceil(world / gpus_per_node); n++) {
    const { x, y } = layout.node(n);
    context.strokeStyle = colours.line;
    context.strokeRect(x + 0.5, y + 0.5, box.width - 1, box.height - 1);
    if (!isNamed) continue;
    context.fillStyle = colours.quiet;
    context.textAlign = "left";
    context.fillText(`node ${n}`, x + 5, y + 12);
  }
  if (!isNamed) drawRowNames(context, layout, of);
  const tone = (r: number): string => {
    const share = of.coordinate(r, axis) / Math.max(1, sizes[axis] - 1);
    return between(between(colours.paper, colours.axes[axis], 0.28), colours.axes[axis], share);
  };
  const digits = String(world - 1).length;
  const isNumbered = cell >= 8 * digits + 4;
  context.textAlign = "center";
  for (let r = 0; r < world; r++) {
    const { x, y } = layout.at(r);
    const isPale = chosen.size > 0 && chosen.size < world && !chosen.has(r);
    const share = of.coordinate(r, axis) / Math.max(1, sizes[axis] - 1);
    context.fillStyle = isPale ? colours.idle : tone(r);
    context.fillRect(x, y, cell, cell);
    if (!isNumbered) continue;
    context.fillStyle = isPale ? colours.quiet : share > 0.45 ? colours.onFill : colours.ink;
    context.fillText(String(r), x + cell / 2, y + cell / 2 + 1);
  }
  if (isHovered || selection.value?.kind === "rank") outlineGroups(context, layout, of, rank);
}

/** Names the first node of each row. */
function drawRowNames(context: CanvasRenderingContext2D, layout: MeshLayout, { view: { mesh } }: PlanModel): void {
  context.fillStyle = palette.value.quiet;
  context.textAlign = "left";
  for (let n = 0; n < Math.ceil(mesh.world / mesh.gpus_per_node); n += layout.across) {
    const { y } = layout.node(n);
    if (layout.box.height >= 12 || (n / layout.across) % 4 === 0) context.fillText(`node ${n}`, 0, y + layout.box.height / 2);
  }
}

/** Draws a frame around each rank of the groups of a rank, the largest group first, so that small ones stay visible. */
function outlineGroups(context: CanvasRenderingContext2D, layout: MeshLayout, of: PlanModel, rank: number): void {
  const { sizes } = of.view.mesh;
  const axes = axisNames.filter((axis) => sizes[axis] > 1).sort((a, b) => sizes[b] - sizes[a]);
  const { cell } = layout;
  context.lineWidth = cell >= 10 ? 2 : 1.5;
  for (const axis of axes) {
    context.strokeStyle = palette.value.axes[axis];
    for (const member of of.group(rank, axis)) {
      const { x, y } = layout.at(member);
      context.strokeRect(x - 1, y - 1, cell + 2, cell + 2);
    }
  }
  const { x, y } = layout.at(rank);
  context.strokeStyle = palette.value.ink;
  context.lineWidth = 2;
  context.strokeRect(x - 1, y - 1, cell + 2, cell + 2);
}
