/** A canvas over time, as the schedule and the memory have it: the wheel zooms, dragging moves, keys act; and the buttons that zoom. */
import type { ComponentChildren } from "preact";
import { useMemo } from "preact/hooks";
import { Canvas, pointOf, type Sheet } from "./canvas.tsx";
import { span } from "./state.ts";
import { panBy, type TimeScale, wheelOf, zoomAt } from "./timeAxis.ts";

type Point = ReturnType<typeof pointOf>;

interface TimeCanvasProps<Drawn> {
  readonly label: string;
  /** Draws everything, and returns what is where. */
  readonly draw: (sheet: Sheet) => Drawn;
  readonly onHover: (drawn: Drawn, point: Point) => void;
  /** A click, which is no drag. */
  readonly onChoose: (drawn: Drawn, point: Point) => void;
  /** A place that follows the pointer while it is down, in place of a drag. */
  readonly follower?: { has(drawn: Drawn, point: Point): boolean; follow(drawn: Drawn, point: Point): void };
  /** Returns what keys do, by their name. */
  readonly keys: (event: KeyboardEvent) => Readonly<Record<string, () => void>>;
}

/** Pixels that a pointer may move in a click. */
const STILL = 3;

/** The canvas. What it draws has a scale of time. */
export function TimeCanvas<Drawn extends { readonly scale: TimeScale }>(props: TimeCanvasProps<Drawn>) {
  const { label, draw, onHover, onChoose, follower, keys } = props;
  const last = useMemo((): { drawn: Drawn | undefined } => ({ drawn: undefined }), []);
  const wheel = useMemo(() => wheelOf(() => last.drawn?.scale), [last]);
  const drag = useMemo((): { x: number; isFollowed: boolean; moved: boolean } => ({ x: -1, isFollowed: false, moved: false }), []);
  const onDown = (event: PointerEvent): void => {
    const point = pointOf(event);
    const isFollowed = last.drawn !== undefined && follower?.has(last.drawn, point) === true;
    Object.assign(drag, { x: point.x, isFollowed, moved: false });
    (event.currentTarget as Element).setPointerCapture(event.pointerId);
    if (isFollowed && last.drawn) follower?.follow(last.drawn, point);
  };
  const onMove = (event: PointerEvent): void => {
    const point = pointOf(event);
    const { drawn } = last;
    if (!drawn) return;
    if (drag.x < 0) onHover(drawn, point);
    else if (drag.isFollowed) follower?.follow(drawn, point);
    else if (drag.moved || Math.abs(point.x - drag.x) > STILL) {
      panBy(((drag.x - point.x) * (drawn.scale.to - drawn.scale.from)) / drawn.scale.width);
      Object.assign(drag, { x: point.x, moved: true });
    }
  };
  const onUp = (event: PointerEvent): void => {
    if (!drag.moved && !drag.isFollowed && last.drawn) onChoose(last.drawn, pointOf(event));
    drag.x = -1;
  };
  const onKey = (event: KeyboardEvent): void => {
    const act = keys(event)[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  };
  return (
    <div class="canvas-room">
      <Canvas
        draw={(sheet) => {
          last.drawn = draw(sheet);
        }}
        label={label}
        tabIndex={0}
        class="fill grab"
        onWheelActive={wheel}
        onPointerDown={onDown}
        onPointerMove={onMove}
        onPointerUp={onUp}
        onKeyDown={onKey}
      />
    </div>
  );
}

/** Buttons that zoom around a time, and those of the panel. */
export function ZoomButtons({ around, children }: { readonly around: () => number; readonly children?: ComponentChildren }) {
  return (
    <div class="buttons">
      <button type="button" aria-label="zoom in" onClick={() => zoomAt(around(), 0.5)}>
        +
      </button>
      <button type="button" aria-label="zoom out" onClick={() => zoomAt(around(), 2)}>
        −
      </button>
      <button type="button" disabled={span.value === undefined} onClick={() => (span.value = undefined)}>
        whole step
      </button>
      {children}
    </div>
  );
}
