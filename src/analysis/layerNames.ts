import { ranges } from "../units.ts";

/** Ids carry their layer (`layers.3.wq`): these say what stays equal from layer to layer, so that a reader sees it once. */
const mark = /\blayers\.(\d+)/;
const marks = /\blayers\.(\d+)/g;

export function layerOf(id: string): number | undefined {
  const match = mark.exec(id);
  return match ? Number(match[1]) : undefined;
}

/** `layers.3.wq` → `layers.*.wq`. */
export const anyLayer = (text: string): string => text.replace(marks, "layers.*");

/** Layer numbers counted from `base`: two layers that do the same have the same text. */
export const fromLayer = (text: string, base: number): string =>
  text.replace(marks, (_, n: string) => `layers.${signed(Number(n) - base)}`);
const signed = (n: number): string => (n < 0 ? `${n}` : `+${n}`);

export interface Line {
  readonly id: string;
  readonly text: string;
}

/** Runs of lines of one layer; a run that repeats the one before it becomes a single line that says so. */
export function collapseLayers(lines: readonly Line[]): string[] {
  const runs: { layer: number | undefined; texts: string[] }[] = [];
  for (const { id, text } of lines) {
    const layer = layerOf(id);
    const last = runs.at(-1);
    if (last && last.layer === layer) last.texts.push(text);
    else runs.push({ layer, texts: [text] });
  }
  const shape = (run: (typeof runs)[number]): string =>
    run.layer === undefined ? "" : run.texts.map((text) => squeeze(fromLayer(text, run.layer!))).join("\n");
  const out: string[] = [];
  for (let i = 0; i < runs.length; ) {
    const run = runs[i]!;
    out.push(...run.texts);
    let end = i + 1;
    if (run.layer !== undefined) {
      const first = shape(run);
      while (end < runs.length && shape(runs[end]!) === first) end++;
      const same = runs.slice(i + 1, end);
      const layers = [...new Set(same.map(({ layer }) => layer!))];
      if (layers.length > 0) out.push(`  … layer${layers.length > 1 ? "s" : ""} ${ranges(layers)} as layer ${run.layer}`);
    }
    i = end;
  }
  return out;
}

/** Columns are padded by the width of ids, and layer 10 is wider than layer 9. */
const squeeze = (text: string): string => text.replace(/ +/g, " ");
