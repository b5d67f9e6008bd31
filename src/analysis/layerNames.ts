/** Text about layers: ids contain the layer (`layers.3.wq`), and reports show equal layers once. */
import { ranges } from "../units.ts";

const mark = /\blayers\.(\d+)/;
const marks = /\blayers\.(\d+)/g;

/** Returns the layer in an id; undefined if it names none. */
export function layerOf(id: string): number | undefined {
  const match = mark.exec(id);
  return match ? Number(match[1]) : undefined;
}

/** Replaces layer numbers: `layers.3.wq` → `layers.*.wq`. */
export const anyLayer = (text: string): string => text.replace(marks, "layers.*");

/** Makes layer numbers relative to `base`, so that equal layers have equal text. */
export const fromLayer = (text: string, base: number): string =>
  text.replace(marks, (_, n: string) => `layers.${signed(Number(n) - base)}`);
const signed = (n: number): string => (n < 0 ? `${n}` : `+${n}`);

/** A line of a report and the id that gives its layer. */
export interface Line {
  readonly id: string;
  readonly text: string;
}

/** Consecutive lines of one layer, or of none. */
interface Run {
  readonly layer: number | undefined;
  readonly texts: string[];
}

/** Replaces the lines of layers that equal a layer before by one line that names them. */
export function collapseLayers(lines: readonly Line[]): string[] {
  const runs: Run[] = [];
  for (const { id, text } of lines) {
    const layer = layerOf(id);
    const last = runs.at(-1);
    if (last && last.layer === layer) last.texts.push(text);
    else runs.push({ layer, texts: [text] });
  }
  const out: string[] = [];
  let shown: { readonly layer: number; readonly shape: string; readonly same: number[] } | undefined;
  const flush = (): void => {
    const layers = [...new Set(shown?.same)];
    if (shown && layers.length > 0) out.push(`  … layer${layers.length > 1 ? "s" : ""} ${ranges(layers)} as layer ${shown.layer}`);
    shown = undefined;
  };
  for (const { layer, texts } of runs) {
    const shape = layer === undefined ? "" : texts.map((text) => squeeze(fromLayer(text, layer))).join("\n");
    if (layer !== undefined && shown?.shape === shape) {
      shown.same.push(layer);
      continue;
    }
    flush();
    out.push(...texts);
    if (layer !== undefined) shown = { layer, shape, same: [] };
  }
  flush();
  return out;
}

/** Removes padding: columns are padded to the width of ids, and layer 10 is wider than layer 9. */
const squeeze = (text: string): string => text.replace(/ +/g, " ");
