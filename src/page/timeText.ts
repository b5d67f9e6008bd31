/** Times as text, in the unit of the timeline. */
import { plan } from "./state.ts";

const scales = [
  { unit: "s", size: 1 },
  { unit: "ms", size: 1e-3 },
  { unit: "µs", size: 1e-6 },
] as const;

/** Returns a time of an axis whose ticks are `step` apart. */
export function shared(value: number, step: number): string {
  if (plan.value.view.timeline.unit === "units") return String(Number(value.toPrecision(6)));
  const { unit, size } = scales.find((s) => step >= s.size * 0.999) ?? scales[2];
  return `${Number((value / size).toPrecision(6))} ${unit}`;
}

/** Returns a time, or a length of time, as text. */
export function timeText(value: number): string {
  if (plan.value.view.timeline.unit === "units") return `${Number(value.toPrecision(5))} unit${value === 1 ? "" : "s"}`;
  const { unit, size } = scales.find((s) => Math.abs(value) >= s.size) ?? scales[2];
  return `${Number((value / size).toPrecision(4))} ${unit}`;
}
