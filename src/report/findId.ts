/** Finds instructions and buffers of a plan by an id that need not be exact. */
import leven from "leven";
import type { Buffer, Instruction, Plan, Program } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { type Block, blocksOf } from "../../schemas/program.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { buffersOf } from "../analysis/bufferTable.ts";
import { layerOf } from "../analysis/layerNames.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { layerPart } from "../model/positions.ts";

/** An instruction, and where it runs. */
export interface PlacedInstruction {
  readonly program: Program;
  readonly block: Block;
  readonly instruction: Instruction;
}

/** The instructions and the buffers with one id. Others, with the same id in other layers, are `alike`. */
export interface FoundId {
  readonly id: string;
  readonly instructions: readonly PlacedInstruction[];
  readonly buffers: readonly { readonly program: Program; readonly buffer: Buffer }[];
  /** Ids that differ only in the layer, with this one. */
  readonly alike: readonly PlacedId[];
}

/** An id, its layer, and the id with `*` for the layer. */
interface PlacedId {
  readonly id: string;
  readonly layer: number | undefined;
  readonly form: string;
}

/** The most suggestions of a message. */
const MOST = 8;

/** Returns what has an id. Layers may be `*`, and any parts of an id that fit one id suffice. Throws a Trouble with suggestions if none or several fit. */
export function findId(plan: Plan, text: string): FoundId {
  const ids = allIds(plan);
  const found = ids.get(text) ?? closest([...ids.values()], text);
  const { id, form } = found;
  return {
    id,
    alike: [...ids.values()].filter((other) => other.form === form),
    instructions: plan.programs.flatMap((program) =>
      blocksOf(program).flatMap((block) =>
        block.instructions.filter((i) => i.id === id).map((instruction) => ({ program, block, instruction })),
      ),
    ),
    buffers: plan.programs.flatMap((program) => program.buffers.filter((b) => b.id === id).map((buffer) => ({ program, buffer }))),
  };
}

function allIds({ programs }: Plan): Map<string, PlacedId> {
  const ids = new Map<string, PlacedId>();
  const add = (id: string, layer: number | undefined): void => {
    if (!ids.has(id)) ids.set(id, { id, layer, form: anyLayer(id, layer) });
  };
  for (const program of programs) {
    const buffers = buffersOf(program);
    for (const { instructions } of blocksOf(program)) for (const i of instructions) add(i.id, layerOf(i, buffers));
    for (const { id, layer } of program.buffers) add(id, layer);
  }
  return ids;
}

/** Returns the first id of the only form that fits. */
function closest(ids: readonly PlacedId[], text: string): PlacedId {
  const byForm = new Map<string, PlacedId>();
  for (const placed of ids) if (!byForm.has(placed.form)) byForm.set(placed.form, placed);
  const wanted = byForm.get(text);
  if (wanted !== undefined) return wanted;
  // a layer that is named must be that layer
  const pool = ids.some(({ layer }) => layer !== undefined && text.includes(layerPart(layer))) ? ids : [...byForm.values()];
  const fitting = fits(text.toLowerCase())
    .map((isFit) => pool.filter(isFit))
    .filter((list) => list.length > 0);
  const only = fitting.find((list) => list.length === 1)?.[0];
  if (only !== undefined) return only;
  const [best] = fitting;
  if (best) {
    // an instruction that is recomputed is meant only where its id says so
    const first = best.filter(({ id }) => !/\.again\b/.test(id));
    if (first.length === 1 && first[0]) return first[0];
    const names = [...best].sort((a, b) => a.id.length - b.id.length).map(({ id, form }) => (pool === ids ? id : form));
    const more = names.length > MOST ? `, … (${names.length})` : "";
    throw new Trouble(
      `"${printable(text, 80)}" fits ${names.length} instructions and buffers`,
      `write more of the id: ${names.slice(0, MOST).join(", ")}${more}`,
    );
  }
  const near = nearest([...byForm.keys()], text);
  // a layer that is named stays that layer, where it has such an id
  const layer = /\blayers\.(\d+)\b/.exec(text)?.[1];
  const named = (form: string): string => {
    const own = form.replace("*", layer ?? "*");
    return layer !== undefined && ids.some(({ id }) => id === own) ? own : form;
  };
  throw new Trouble(
    `no instruction and no buffer is named "${printable(text, 80)}"`,
    near.length > 0 ? `did you mean ${near.map(named).join(", ")}?` : "inspect with --rank 0 lists the instructions of a rank",
  );
}

/** Returns the forms that a misspelt text is nearest to. Neither the number of a layer nor the axes of a collective count. */
function nearest(forms: readonly string[], text: string): string[] {
  const plain = text.replace(/\blayers\.\d+\b/, "layers.*");
  const distances = forms.map((form) => ({
    form,
    distance: Math.min(distanceOf(form, plain), distanceOf(form.replace(/@[^.]*/, ""), plain)),
  }));
  const least = Math.min(...distances.map(({ distance }) => distance));
  return distances
    .filter(({ distance }) => distance <= Math.max(1, text.length / 3) && distance <= least + 2)
    .sort((a, b) => a.distance - b.distance)
    .slice(0, MOST)
    .map(({ form }) => form);
}

/** The ways in which a text may mean an id, from the most exact: the end of it, whole parts with the last one, whole parts, any parts. */
function fits(text: string): readonly ((placed: PlacedId) => boolean)[] {
  const parts = text.split(/[\s.@,*]+/).filter((part) => part !== "" && part !== "-");
  const last = parts.at(-1) ?? "";
  const partsOf = ({ id }: PlacedId): string[] => id.toLowerCase().split(/[.@,]/);
  const hasAll = (placed: PlacedId): boolean => parts.every((part) => partsOf(placed).includes(part));
  return [
    ({ form }) => form.toLowerCase().endsWith(text),
    (placed) => hasAll(placed) && partsOf(placed).at(-1) === last,
    hasAll,
    ({ id }) => parts.every((part) => id.toLowerCase().includes(part)),
  ];
}

/** The least distance to the id, or to its end; the end counts half a change more, so that a whole id comes first. */
function distanceOf(form: string, text: string): number {
  const end = form.slice(Math.max(0, form.length - text.length));
  return Math.min(leven(form.toLowerCase(), text.toLowerCase(), { maxDistance: 60 }), leven(end.toLowerCase(), text.toLowerCase()) + 0.5);
}
