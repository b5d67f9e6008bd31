/** The colours of drawings on light and dark pages. Pages have the colours of shared/theme.css; pictures of `inspect` have the same kinds of colours. */
import { computed } from "@preact/signals";
import type { AxisName } from "./planModel.ts";
import { isDark } from "./shared/themeChoice.tsx";

/** The colours of one theme. */
export interface Palette {
  readonly paper: string;
  readonly ink: string;
  readonly quiet: string;
  readonly line: string;
  readonly accent: string;
  readonly wrong: string;
  /** The colour of waits and empty cells. */
  readonly idle: string;
  readonly kinds: readonly [forward: string, backward: string, weights: string, step: string];
  readonly axes: Readonly<Record<AxisName, string>>;
  readonly memory: Readonly<Record<"parameter" | "gradient" | "optimizer" | "activation" | "workspace" | "scratch", string>>;
  /** Text on a filled block. */
  readonly onFill: string;
}

const light: Palette = {
  ...{ paper: "#ffffff", ink: "#1b1f24", quiet: "#5b6470", line: "#d8dde3", accent: "#0b5fb0", wrong: "#a31621", idle: "#eef1f4" },
  kinds: ["#4c78a8", "#54a24b", "#e8973a", "#8a6aa8"],
  axes: { tp: "#8a5fbf", cp: "#b8860b", dp: "#0f8b8d", etp: "#c2577e", ep: "#d1632b", edp: "#3f8f4f", pp: "#3b7ddd" },
  memory: {
    ...{ parameter: "#4c78a8", gradient: "#54a24b", optimizer: "#e8973a" },
    ...{ activation: "#b279a2", workspace: "#9d9da1", scratch: "#d6a5c9" },
  },
  onFill: "#ffffff",
};
const dark: Palette = {
  ...{ paper: "#15191e", ink: "#e8eaed", quiet: "#a3acb8", line: "#3a424c", accent: "#6db3f8", wrong: "#ff8a8f", idle: "#20262d" },
  kinds: ["#5a8bc0", "#5fae56", "#e8a04d", "#a583c4"],
  axes: { tp: "#b392e0", cp: "#d9b23c", dp: "#3fbabc", etp: "#e387ab", ep: "#ec8a57", edp: "#6cbf7c", pp: "#6ea3f0" },
  memory: {
    ...{ parameter: "#5a8bc0", gradient: "#5fae56", optimizer: "#e8a04d" },
    ...{ activation: "#bf88af", workspace: "#8b8f96", scratch: "#d6a5c9" },
  },
  onFill: "#0f1216",
};

/** The colours of the theme. */
export const palette = computed((): Palette => (isDark.value ? dark : light));

/** Returns the red, green and blue of `#rrggbb`. */
export function channels(colour: string): readonly [number, number, number] {
  const n = Number.parseInt(colour.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

/** Returns a pixel of an ImageData as one number: red in the lowest byte. */
export const pixel = (r: number, g: number, b: number): number => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;

/** Returns a colour between two: 0 is the first. */
export function between(a: string, b: string, share: number): string {
  const [x, y] = [channels(a), channels(b)];
  const mixed = x.map((c, i) => Math.round(c + ((y[i] ?? 0) - c) * share));
  return `#${mixed.map((c) => c.toString(16).padStart(2, "0")).join("")}`;
}

/** Returns the colour of a microbatch: neighbours differ if there are few, and the colour goes around the circle once if there are many. */
export function microbatchColour(microbatch: number, count: number, kind: number): string {
  const hue = count <= 24 ? (microbatch * 137.5) % 360 : (microbatch * 300) / count;
  const lightness = (isDark.value ? [62, 48, 74, 30] : [58, 42, 72, 30])[kind] ?? 50;
  return hslColour(hue, isDark.value ? 45 : 50, lightness);
}

/** Returns `#rrggbb` of a hue in degrees, and saturation and lightness in percent. */
function hslColour(hue: number, saturation: number, lightness: number): string {
  const [s, l] = [saturation / 100, lightness / 100];
  const at = (n: number): string => {
    const k = (n + hue / 30) % 12;
    const c = l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return Math.round(255 * c)
      .toString(16)
      .padStart(2, "0");
  };
  return `#${at(0)}${at(8)}${at(4)}`;
}
