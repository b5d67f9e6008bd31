/** The axis of time that the schedule and the memory share: scale, ticks, zoom and pan. */

import { palette } from "./palette.ts";
import { ticks } from "./shared/ticks.ts";
import { span, visible } from "./state.ts";
import { shared } from "./timeText.ts";

/** Pixels for times. */
export interface TimeScale {
  readonly from: number;
  readonly to: number;
  readonly left: number;
  readonly width: number;
  x(time: number): number;
  time(x: number): number;
}

/** Returns the scale of the visible time over some pixels. */
export function timeScale(left: number, width: number, range: { readonly from: number; readonly to: number } = visible.value): TimeScale {
  const { from, to } = range;
  const each = width / (to - from);
  return { from, to, left, width, x: (time) => left + (time - from) * each, time: (x) => from + (x - left) / each };
}

/** The height of the axis. */
export const AXIS = 30;

/** Draws ticks with numbers below `bottom`, and grid lines from `top` to it. */
export function drawTimeAxis(context: CanvasRenderingContext2D, scale: TimeScale, top: number, bottom: number): void {
  const { line, quiet } = palette.value;
  context.strokeStyle = line;
  context.fillStyle = quiet;
  context.lineWidth = 1;
  context.textBaseline = "alphabetic";
  const { values, step } = ticks(scale.from, scale.to, Math.max(2, scale.width / 110));
  context.beginPath();
  for (const value of values) {
    const x = Math.round(scale.x(value)) + 0.5;
    if (x < scale.left - 1 || x > scale.left + scale.width + 1) continue;
    context.moveTo(x, top);
    context.lineTo(x, bottom + 5);
    context.textAlign = x > scale.left + scale.width - 24 ? "right" : "center";
    context.fillText(shared(value, step), x, bottom + 19);
  }
  context.stroke();
}

/** Shows times around a fixed one: `factor` below 1 zooms in. */
export function zoomAt(time: number, factor: number): void {
  const { from, to, end } = visible.peek();
  const length = Math.min(end, Math.max(end / 1e5, (to - from) * factor));
  const share = (time - from) / (to - from);
  showFrom(time - share * length, length);
}

/** Moves the visible time. */
export function panBy(time: number): void {
  const { from, to } = visible.peek();
  showFrom(from + time, to - from);
}

/** Shows a length of time from a time on, within the step. */
export function showFrom(time: number, length: number): void {
  const { end } = visible.peek();
  if (length >= end * (1 - 1e-9)) {
    span.value = undefined;
    return;
  }
  const from = Math.min(Math.max(0, time), end - length);
  span.value = { from, to: from + length };
}

/** Moves the visible time, without another length, so that it holds a range. */
export function reveal(start: number, stop: number): void {
  const { from, to } = visible.peek();
  if (start >= from && stop <= to) return;
  const length = Math.max(to - from, 1.2 * (stop - start));
  showFrom((start + stop - length) / 2, length);
}

/** Returns a listener for the wheel: it zooms; with Shift, or sideways, it moves. */
export const wheelOf = (scaleNow: () => TimeScale | undefined) => (event: WheelEvent) => {
  const scale = scaleNow();
  if (!scale) return;
  event.preventDefault();
  const each = (scale.to - scale.from) / scale.width;
  const { left } = (event.currentTarget as Element).getBoundingClientRect();
  const sideways = event.shiftKey ? event.deltaY : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
  if (sideways !== 0) panBy(sideways * each);
  else zoomAt(scale.time(event.clientX - left), Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004));
};
