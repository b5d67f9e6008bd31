/** The graph of a section: rows of instructions, lines of values at the left, edges to other ranks at the right. */
import { useEffect, useMemo, useRef } from "preact/hooks";
import { bytesText, flopsText } from "../../units.ts";
import { changeOf } from "../changes.ts";
import { palette } from "../palette.ts";
import type { PlacedView, ProgramSection } from "../planModel.ts";
import { type Lane, laneOf } from "../programFolds.ts";
import { axisOf } from "../scheduleDraw.ts";
import { plan, selectedInstruction, selectInstruction } from "../state.ts";
import { type Track, tracksOf } from "../tracks.ts";

/** Sizes in CSS pixels; those of rows stand in page.css, too. */
const ROW = 24;
const COLUMN = 8;
const LANE = 64;
/** Room for the lines of values. */
const LEFT = 92;
const NODE = LEFT - 9;

const middle = (row: number): number => row * ROW + ROW / 2;

interface GraphProps {
  readonly section: ProgramSection;
  readonly lanes: readonly Lane[];
}

/** The graph of a section. */
export function SectionGraph({ section, lanes }: GraphProps) {
  const shown = plan.value;
  const { instructions } = section;
  const tracks = useMemo(() => tracksOf(shown, instructions), [shown, instructions]);
  const list = useRef<HTMLOListElement>(null);
  const chosen = selectedInstruction.value;
  const chosenRow = instructions.findIndex(
    (i) => chosen !== undefined && i.n === chosen.n && i.stage === chosen.stage && i.block === chosen.block,
  );
  useEffect(() => {
    if (chosenRow >= 0) list.current?.children[chosenRow]?.scrollIntoView({ block: "nearest" });
  }, [chosenRow]);
  const move = (event: KeyboardEvent): void => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const rows = [...(list.current?.querySelectorAll("button") ?? [])];
    const at = rows.indexOf(document.activeElement as HTMLButtonElement);
    const next = by === undefined || at < 0 ? undefined : rows[at + by];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  };
  const height = instructions.length * ROW;
  return (
    <div class="section-graph">
      <svg class="tracks" width={LEFT} height={height} aria-hidden="true">
        {tracks.map((track) => (
          <path key={track.from} class={isTouched(track, chosenRow) ? "track chosen" : "track"} d={trackPath(track)} />
        ))}
        {instructions.map((i, row) => (
          <Node key={i.n} at={i} row={row} isChosen={row === chosenRow} />
        ))}
      </svg>
      <ol ref={list} class="rows" onKeyDown={move}>
        {instructions.map((i, row) => (
          <Row key={i.n} at={i} isChosen={row === chosenRow} />
        ))}
      </ol>
      <svg class="lanes" width={lanes.length * LANE} height={height} aria-hidden="true">
        {lanes.map(({ axes, axis }, n) => (
          <line key={axes} x1={laneX(n)} x2={laneX(n)} y1={0} y2={height} stroke={palette.value.axes[axis]} opacity={0.45} />
        ))}
        {instructions.map((i, row) => (
          <Edge key={i.n} at={i} row={row} lanes={lanes} isChosen={row === chosenRow} />
        ))}
      </svg>
    </div>
  );
}

const laneX = (n: number): number => n * LANE + LANE / 2;
const isTouched = ({ from, to }: Track, row: number): boolean => row >= 0 && (from === row || to.includes(row));

/** Returns the path of a value: out to its column, down, and in to each reader. */
function trackPath({ from, to, column }: Track): string {
  const last = to.at(-1) ?? from;
  if (column < 0) return `M${NODE} ${middle(from)}V${middle(last)}`;
  const x = NODE - 12 - column * COLUMN;
  const bend = 6;
  const down = `M${NODE} ${middle(from)}H${x + bend}Q${x} ${middle(from)} ${x} ${middle(from) + bend}V${middle(last) - bend}`;
  const into = to.map((row) => `M${x} ${middle(row) - bend}Q${x} ${middle(row)} ${x + bend} ${middle(row)}H${NODE}`);
  return [down, ...into].join("");
}

interface RowProps {
  readonly at: PlacedView;
  readonly isChosen: boolean;
}

function Node({ at, row, isChosen }: RowProps & { readonly row: number }) {
  const colours = palette.value;
  const axis = at.view.kind === "compute" ? undefined : axisOf(at.view.axes);
  const fill = isChosen ? colours.accent : axis ? colours.axes[axis] : colours.paper;
  const stroke = axis ? colours.axes[axis] : colours.quiet;
  if (axis) return <rect x={NODE - 5} y={middle(row) - 5} width={10} height={10} rx={2} fill={fill} stroke={stroke} />;
  return <circle cx={NODE} cy={middle(row)} r={4} fill={fill} stroke={stroke} stroke-width={1.5} />;
}

function Row({ at, isChosen }: RowProps) {
  const { view, id } = at;
  const change = changeOf(at);
  const layer = at.layer === null ? "" : `layers.${at.layer}.`;
  return (
    <li class={`${isChosen ? "selected" : ""} ${change ? `is-${change.change}` : ""}`}>
      <button type="button" aria-pressed={isChosen} title={change?.text ?? view.shapes} onClick={() => selectInstruction(at)}>
        <span class="does">{view.does}</span>
        <span class="id">{layer && id.startsWith(layer) ? id.slice(layer.length) : id}</span>
        <span class="shapes">{view.shapes.split(" -> ").at(-1)}</span>
        <span class="number">{view.kind === "compute" ? (view.flops > 0 ? flopsText(view.flops) : "") : bytesText(view.bytes)}</span>
      </button>
    </li>
  );
}

interface EdgeProps extends RowProps {
  readonly row: number;
  readonly lanes: readonly Lane[];
}

/** The edge of a collective or a transfer to the line of its group. */
function Edge({ at, row, lanes, isChosen }: EdgeProps) {
  const name = laneOf(at.stage, at.view);
  const n = lanes.findIndex(({ axes }) => axes === name);
  const lane = lanes[n];
  if (!lane) return null;
  const [x, y] = [laneX(n), middle(row)];
  const colour = palette.value.axes[lane.axis];
  const [isOut, isIn] = [at.view.kind !== "recv", at.view.kind !== "send"];
  return (
    <g stroke={colour} fill={colour} stroke-width={isChosen ? 3 : 1.5}>
      <line x1={0} x2={x} y1={y} y2={y} />
      {isOut && <path d={`M${x - 4} ${y}l-6 -3.5v7z`} stroke="none" />}
      {isIn && <path d={`M1 ${y}l6 -3.5v7z`} stroke="none" />}
      <circle cx={x} cy={y} r={4} />
    </g>
  );
}
