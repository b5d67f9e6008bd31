/** Finds instructions and buffers of a plan by an id that need not be exact. */
import leven from "leven";
import type { Buffer, Instruction, Plan, Program } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { type Block, blocksOf } from "../../schemas/program.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { anyLayer } from "../analysis/layerNames.ts";

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
  readonly alike: readonly string[];
}

/** The most suggestions of a message. */
const MOST = 8;

/** Returns what has an id. Layers may be `*`, and any parts of an id that fit one id suffice. Throws a Trouble with suggestions if none or several fit. */
export function findId(plan: Plan, text: string): FoundId {
  const ids = allIds(plan);
  const exact = ids.has(text) ? text : undefined;
  const id = exact ?? closest([...ids], text);
  const form = anyLayer(id);
  return {
    id,
    alike: [...ids].filter((other) => anyLayer(other) === form),
    instructions: plan.programs.flatMap((program) =>
      blocksOf(program).flatMap((block) =>
        block.instructions.filter((i) => i.id === id).map((instruction) => ({ program, block, instruction })),
      ),
    ),
    buffers: plan.programs.flatMap((program) => program.buffers.filter((b) => b.id === id).map((buffer) => ({ program, buffer }))),
  };
}

function allIds({ programs }: Plan): Set<string> {
  const ids = new Set<string>();
  for (const program of programs) {
    for (const { instructions } of blocksOf(program)) for (const { id } of instructions) ids.add(id);
    for (const { id } of program.buffers) ids.add(id);
  }
  return ids;
}

/** Returns the first id of the only form that fits. */
function closest(ids: readonly string[], text: string): string {
  const byForm = new Map<string, string>();
  for (const id of ids) if (!byForm.has(anyLayer(id))) byForm.set(anyLayer(id), id);
  const wanted = byForm.get(text);
  if (wanted !== undefined) return wanted;
  // a layer that is named must be that layer
  const pool = /layers\.\d/.test(text) ? ids : [...byForm.values()];
  const fitting = fits(text.toLowerCase())
    .map((isFit) => pool.filter((id) => isFit(id.toLowerCase())))
    .filter((list) => list.length > 0);
  const only = fitting.find((list) => list.length === 1)?.[0];
  if (only !== undefined) return only;
  const [best] = fitting;
  if (best) {
    const names = [...best].sort((a, b) => a.length - b.length).map((id) => (pool === ids ? id : anyLayer(id)));
    const more = names.length > MOST ? `, … (${names.length})` : "";
    throw new Trouble(
      `"${printable(text, 80)}" fits ${names.length} instructions and buffers`,
      `write more of the id: ${names.slice(0, MOST).join(", ")}${more}`,
    );
  }
  const near = [...byForm.keys()]
    .map((form) => ({ form, distance: distanceOf(form, text) }))
    .sort((a, b) => a.distance - b.distance)
    .slice(0, MOST);
  throw new Trouble(
    `no instruction and no buffer is named "${printable(text, 80)}"`,
    `did you mean ${near.map(({ form }) => form).join(", ")}?`,
  );
}

/** The ways in which a text may mean an id, from the most exact: the end of it, whole parts with the last one, whole parts, any parts. */
function fits(text: string): readonly ((id: string) => boolean)[] {
  const parts = text.split(/[\s.@,*]+/).filter((part) => part !== "" && part !== "-");
  const last = parts.at(-1) ?? "";
  const partsOf = (id: string): string[] => id.split(/[.@,]/);
  const hasAll = (id: string): boolean => parts.every((part) => partsOf(id).includes(part));
  return [
    (id) => anyLayer(id).endsWith(text),
    (id) => hasAll(id) && partsOf(id).at(-1) === last,
    hasAll,
    (id) => parts.every((part) => id.includes(part)),
  ];
}

/** The least distance to the id, or to its end. */
function distanceOf(form: string, text: string): number {
  const end = form.slice(Math.max(0, form.length - text.length));
  return Math.min(leven(form.toLowerCase(), text.toLowerCase(), { maxDistance: 60 }), leven(end.toLowerCase(), text.toLowerCase()) + 3);
}
