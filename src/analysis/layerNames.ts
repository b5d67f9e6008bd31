/** The layers of instructions, and reports that show equal layers once. */
import type { Buffer, Collective, Instruction } from "../../schemas/plan.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { layerPart } from "../model/positions.ts";
import { ranges } from "../units.ts";
import { anyLayer } from "./layerText.ts";

/**
 * Returns the layer of an instruction: that of what it writes. An op that only adds to sums of the step, such as a loss, belongs to the layer of
 * what it reads. Undefined for instructions outside the layers, and for lists of tensors of several layers.
 */
export function layerOf(i: Instruction, buffers: { get(id: string): Buffer | undefined }): number | undefined {
  if (i.kind !== "compute") return buffers.get(i.kind === "collective" ? i.to : i.buffer)?.layer;
  if (i.tensors !== undefined) {
    const [layer, ...others] = new Set(membersOf(i).map((one) => layerOf(one, buffers)));
    return others.length === 0 ? layer : undefined;
  }
  const found = (ids: Readonly<Record<string, string>>): Buffer[] => Object.values(ids).flatMap((id) => buffers.get(id) ?? []);
  const written = found(i.writes);
  const own = written.filter(({ kind }) => kind !== "gradient");
  const first = (of: readonly Buffer[]): number | undefined => of.find(({ layer }) => layer !== undefined)?.layer;
  return own.length > 0 ? first(own) : (first(written) ?? first(found(i.reads)));
}

/** Returns the origin of a collective or a transfer as text, with `layers.*` for the layer of the use. */
export const anyLayerOrigin = ({ op, because, path, layer }: Collective["why"]): string =>
  `${anyLayer(`${op}: ${because}`, layer)} (${path})`;

/** Returns a text about a layer that is equal for equal texts about another one. `other`: a second layer in it, which counts from the first. */
export function formOf(text: string, layer: number | undefined, other: number | undefined): string {
  const form = anyLayer(text, layer);
  return layer === undefined || other === undefined || other === layer
    ? form
    : form.replaceAll(layerPart(other), `layers.*${other > layer ? "+" : ""}${other - layer}.`);
}

/** A line of a report. */
export interface Line {
  readonly text: string;
  /** The layer that the line is about; undefined for none. */
  readonly layer: number | undefined;
  /** The text without the layer, without padding, and with other stages relative to its own: equal for equal lines of two layers. */
  readonly form: string;
}

/** Returns a text that is equal for lines that differ only in the layer from which `base` counts. */
export const formFrom = (lines: readonly Line[], base: number): string =>
  lines.map(({ layer, form }) => (layer === undefined ? form : `${layer - base} ${form}`)).join("\n");

/** Consecutive lines of one layer, or of none. */
interface Run {
  readonly layer: number | undefined;
  readonly lines: Line[];
}

/** Replaces the lines of layers that equal a layer before by one line that names them. */
export function collapseLayers(lines: readonly Line[]): Line[] {
  const runs: Run[] = [];
  for (const line of lines) {
    const last = runs.at(-1);
    if (last && last.layer === line.layer) last.lines.push(line);
    else runs.push({ layer: line.layer, lines: [line] });
  }
  const out: Line[] = [];
  let shown: { readonly layer: number; readonly form: string; readonly same: number[] } | undefined;
  const flush = (): void => {
    const layers = [...new Set(shown?.same)];
    if (shown && layers.length > 0) {
      const text = `  … layer${layers.length > 1 ? "s" : ""} ${ranges(layers)} as layer ${shown.layer}`;
      out.push({ text, layer: undefined, form: "… layers as layer" });
    }
    shown = undefined;
  };
  for (const { layer, lines: own } of runs) {
    const form = layer === undefined ? "" : own.map((line) => line.form).join("\n");
    if (layer !== undefined && shown?.form === form) {
      shown.same.push(layer);
      continue;
    }
    flush();
    out.push(...own);
    if (layer !== undefined) shown = { layer, form, same: [] };
  }
  flush();
  return out;
}
