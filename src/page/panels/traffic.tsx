/** Communication: who sends how much to whom in a step, as a matrix of ranks, and the bytes of each axis. */
import { useComputed, useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { bytesText, countText } from "../../units.ts";
import { Canvas, pointOf, type Sheet } from "../canvas.tsx";
import { drawMatrix, type MatrixPlace, matrixOf, matrixPlace, matrixSpan, showMatrix, zoomMatrix } from "../matrixView.ts";
import { palette } from "../palette.ts";
import { axisNames, type PlanModel } from "../planModel.ts";
import { changeText } from "../planSummary.tsx";
import { axisOf } from "../scheduleDraw.ts";
import { focusRank, plan, plans, select, selectedRanks, selection, stage, status } from "../state.ts";
import { addTraffic, bytesBetween } from "../traffic.ts";
import { Legend, Segments } from "../widgets.tsx";
import { StageChoice } from "./memory.tsx";

const MARGIN = 52;

/** The panel of the communication. */
export function TrafficPanel() {
  const hidden = useSignal<ReadonlySet<string>>(new Set());
  const mode = useSignal<"bytes" | "difference">("bytes");
  const shown = plan.value;
  const other = plans.value[1 - shown.index];
  const { world } = shown.view.mesh;
  const canCompare = other !== undefined && other.view.mesh.world === world;
  const matrix = useComputed(() => {
    const isShown = (axes: string): boolean => !hidden.value.has(axes);
    const { world: ranks, gpus_per_node: perNode } = plan.value.view.mesh;
    const cells = traffic(plan.value, isShown);
    const [before, after] = plans.value;
    if (mode.value === "difference" && before && after) {
      const [from, to] = [traffic(before, isShown), traffic(after, isShown)];
      return matrixOf(
        to.map((value, i) => value - (from[i] ?? 0)),
        ranks,
        { perNode, isDifference: true },
      );
    }
    return matrixOf(cells, ranks, { perNode, isDifference: false });
  });
  const drawn = useMemo((): { place: MatrixPlace | undefined } => ({ place: undefined }), []);
  const draw = (sheet: Sheet): void => {
    const place = matrixPlace(world, sheet, MARGIN);
    drawn.place = place;
    drawMatrix(sheet, matrix.value, place, mode.value === "difference");
    drawFrame(sheet.context, place, shown);
  };
  const colours = palette.value;
  return (
    <section class="panel traffic-panel">
      <div class="toolbar">
        <div class="buttons">
          <button type="button" aria-label="zoom in" onClick={() => zoomMatrix(world, middle(world), 0.5)}>
            +
          </button>
          <button type="button" aria-label="zoom out" onClick={() => zoomMatrix(world, middle(world), 2)}>
            −
          </button>
          <button type="button" disabled={matrixSpan.value === undefined} onClick={() => (matrixSpan.value = undefined)}>
            all ranks
          </button>
        </div>
        {canCompare && (
          <Segments
            label="matrix"
            value={mode.value}
            options={{ bytes: "bytes", difference: "difference" }}
            onChange={(to) => (mode.value = to)}
          />
        )}
        <Legend
          entries={
            mode.value === "difference"
              ? [
                  ["more", colours.wrong],
                  ["less", colours.axes.edp],
                ]
              : [
                  ["inside a node", colours.axes.pp],
                  ["across nodes", colours.axes.ep],
                ]
          }
        />
        <span class="quiet">rows send, columns receive; logarithmic</span>
      </div>
      <div class="traffic-room">
        <MatrixCanvas draw={draw} drawn={drawn} />
        <AxisTable hidden={hidden.value} onHide={(to) => (hidden.value = to)} other={other} />
      </div>
    </section>
  );
}

function traffic(of: PlanModel, isShown: (axes: string) => boolean): Float32Array {
  const cells = new Float32Array(of.view.mesh.world ** 2);
  addTraffic(of, cells, isShown);
  return cells;
}

function middle(world: number) {
  const { x, y, size } = matrixSpan.value ?? { x: 0, y: 0, size: world };
  return { x: x + size / 2, y: y + size / 2 };
}

interface MatrixCanvasProps {
  readonly draw: (sheet: Sheet) => void;
  readonly drawn: { readonly place: MatrixPlace | undefined };
}

function MatrixCanvas({ draw, drawn }: MatrixCanvasProps) {
  const shown = plan.value;
  const { world } = shown.view.mesh;
  const drag = useMemo((): { x: number; y: number; moved: boolean; isDown: boolean } => ({ x: 0, y: 0, moved: false, isDown: false }), []);
  const under = ({ x, y }: { readonly x: number; readonly y: number }) => {
    const { place } = drawn;
    if (!place || x < place.left || y < place.top || x >= place.left + place.side || y >= place.top + place.side) return undefined;
    return { x: place.from.x + (x - place.left) / place.each, y: place.from.y + (y - place.top) / place.each };
  };
  const wheel = useMemo(
    () => (event: WheelEvent) => {
      const { left, top } = (event.currentTarget as Element).getBoundingClientRect();
      const at = under({ x: event.clientX - left, y: event.clientY - top });
      if (!at) return;
      event.preventDefault();
      zoomMatrix(world, at, Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004));
    },
    [world, drawn],
  );
  const onMove = (event: PointerEvent): void => {
    const point = pointOf(event);
    const at = under(point);
    if (!drag.isDown) {
      if (at) status.value = pairText(shown, Math.floor(at.y), Math.floor(at.x));
      return;
    }
    const { place } = drawn;
    if (!place || (!drag.moved && Math.hypot(point.x - drag.x, point.y - drag.y) <= 3)) return;
    showMatrix(world, place.from.x - (point.x - drag.x) / place.each, place.from.y - (point.y - drag.y) / place.each, place.size);
    Object.assign(drag, point, { moved: true });
  };
  const onKey = (event: KeyboardEvent): void => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (by) {
      const now = selection.value?.kind === "pair" ? selection.value : { from: focusRank.value, to: focusRank.value };
      const inside = (rank: number): number => Math.min(world - 1, Math.max(0, rank));
      const [from, to] = [inside(now.from + (by[0] ?? 0)), inside(now.to + (by[1] ?? 0))];
      select({ kind: "pair", from, to });
      status.value = pairText(shown, from, to);
    } else if (event.key === "+" || event.key === "-") zoomMatrix(world, middle(world), event.key === "+" ? 0.7 : 1 / 0.7);
    else if (event.key === "Home") matrixSpan.value = undefined;
    else return;
    event.preventDefault();
  };
  return (
    <div class="canvas-room">
      <Canvas
        draw={draw}
        label={`bytes between ${world} ranks in a step; arrow keys choose a pair of ranks, + and - zoom`}
        tabIndex={0}
        class="fill grab"
        onWheelActive={wheel}
        onPointerDown={(event) => {
          Object.assign(drag, pointOf(event), { moved: false, isDown: true });
          (event.currentTarget as Element).setPointerCapture(event.pointerId);
        }}
        onPointerMove={onMove}
        onPointerUp={(event) => {
          const at = under(pointOf(event));
          if (!drag.moved && at) select({ kind: "pair", from: Math.floor(at.y), to: Math.floor(at.x) });
          drag.isDown = false;
        }}
        onKeyDown={onKey}
      />
    </div>
  );
}

function pairText(of: PlanModel, from: number, to: number): string {
  const bytes = bytesBetween(of, from, to);
  const where = of.nodeOf(from) === of.nodeOf(to) ? "inside a node" : `node ${of.nodeOf(from)} to node ${of.nodeOf(to)}`;
  return `rank ${from} to rank ${to}: ${bytes > 0 ? `${bytesText(Math.round(bytes))} a step, ${where}` : "nothing"}`;
}

/** Pixels between two numbers of ranks. */
const ROOM = 34;

/** Draws the numbers of ranks, borders of stages or nodes, and the selection. */
function drawFrame(context: CanvasRenderingContext2D, place: MatrixPlace, of: PlanModel): void {
  const { mesh } = of.view;
  const { left, top, side, from, each, size } = place;
  const colours = palette.value;
  const borders = each * mesh.gpus_per_node >= 14 ? mesh.gpus_per_node : Math.max(mesh.stage_stride, mesh.gpus_per_node);
  context.strokeStyle = colours.line;
  context.fillStyle = colours.quiet;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  for (let n = Math.ceil(from.x / borders); n * borders <= from.x + size; n++) {
    const x = Math.round(left + (n * borders - from.x) * each) + 0.5;
    line(context, x, top, x, top + side);
  }
  for (let n = Math.ceil(from.y / borders); n * borders <= from.y + size; n++) {
    const y = Math.round(top + (n * borders - from.y) * each) + 0.5;
    line(context, left, y, left + side, y);
  }
  // a number for each rank if there is room, or for borders that are far enough apart
  const apart = each >= ROOM ? 1 : borders * Math.ceil(ROOM / (each * borders));
  const numbers = (first: number): number[] => {
    const start = Math.ceil(first / apart) * apart;
    const count = Math.max(0, Math.ceil((Math.min(mesh.world, first + size) - start) / apart));
    return Array.from({ length: count }, (_, n) => start + n * apart);
  };
  context.textAlign = "left";
  for (const rank of numbers(from.x)) context.fillText(String(rank), Math.round(left + (rank - from.x) * each) + 2.5, top - 9);
  context.textAlign = "right";
  for (const rank of numbers(from.y)) context.fillText(String(rank), left - 6, Math.round(top + (rank - from.y) * each) + 8.5);
  context.textAlign = "left";
  context.fillText("to rank", left, top - 28);
  context.textAlign = "right";
  context.fillText("from", left - 6, top - 9);
  drawChosen(context, place);
}

/** Draws a frame around the selected pair, or marks at the selected ranks. */
function drawChosen(context: CanvasRenderingContext2D, { left, top, side, from, each }: MatrixPlace): void {
  const of = selection.value;
  const { accent, ink } = palette.value;
  if (of?.kind === "pair") {
    context.strokeStyle = ink;
    context.lineWidth = 2;
    const [x, y] = [left + (of.to - from.x) * each, top + (of.from - from.y) * each];
    if (x >= left - each && y >= top - each && x <= left + side && y <= top + side)
      context.strokeRect(x - 1, y - 1, Math.max(6, each + 2), Math.max(6, each + 2));
    return;
  }
  context.fillStyle = accent;
  for (const rank of selectedRanks.value) {
    const [x, y] = [left + (rank - from.x) * each, top + (rank - from.y) * each];
    if (x >= left && x <= left + side) context.fillRect(x, top - 3, Math.max(1, each), 3);
    if (y >= top && y <= top + side) context.fillRect(left - 3, y, 3, Math.max(1, each));
  }
}

function line(context: CanvasRenderingContext2D, x: number, y: number, toX: number, toY: number): void {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

interface AxisTableProps {
  readonly hidden: ReadonlySet<string>;
  readonly other: PlanModel | undefined;
  onHide(to: ReadonlySet<string>): void;
}

/** The bytes that a rank of a stage sends over each axis; the boxes choose what the matrix shows. */
function AxisTable({ hidden, other, onHide }: AxisTableProps) {
  const shown = plan.value;
  const own = Math.min(stage.value, shown.stages - 1);
  const rows = shown.view.traffic[own] ?? [];
  const toggle = (axes: string): void => {
    const next = new Set(hidden);
    if (!next.delete(axes)) next.add(axes);
    onHide(next);
  };
  const bytes = (n: number): string => (n < 1 ? "–" : bytesText(Math.round(n)));
  return (
    <div class="table-room axis-table">
      <StageChoice />
      <table>
        <caption class="quiet">What a rank sends in a step inside its node and across nodes</caption>
        <thead>
          <tr>
            <th scope="col">axes</th>
            <th scope="col" class="number">
              inside
            </th>
            <th scope="col" class="number">
              across
            </th>
          </tr>
        </thead>
        <tbody>
          {rows.map(({ axes, inside, across, per_step, what }) => {
            const before = other?.view.traffic[own]?.find((row) => row.axes === axes);
            const change = before ? changeText(sumOf(before), sumOf({ inside, across })) : "";
            const axis = axisNames.find((name) => name === axes);
            return (
              <tr key={axes}>
                <td>
                  <label class="check">
                    <input type="checkbox" checked={!hidden.has(axes)} onChange={() => toggle(axes)} />
                    <i class="swatch" style={{ background: palette.value.axes[axisOf(axes) ?? "dp"] }} />
                    {axes}
                  </label>
                  <small class="quiet">
                    {countText(per_step)} × {what.slice(0, 2).join(", ")}
                    {what.length > 2 ? " …" : ""}
                  </small>
                  {axis && (
                    <button type="button" class="link small" onClick={() => select({ kind: "axis", axis })}>
                      groups
                    </button>
                  )}
                </td>
                <td class="number">{bytes(inside)}</td>
                <td class="number">
                  {bytes(across)}
                  {change && plans.value.length > 1 && <small class="quiet">{shown.index === 1 ? change : ""}</small>}
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
      {rows.length === 0 && <p class="quiet">This stage sends nothing.</p>}
    </div>
  );
}

const sumOf = ({ inside, across }: { readonly inside: number; readonly across: number }): number => inside + across;
