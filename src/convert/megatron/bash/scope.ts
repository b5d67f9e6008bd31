/** The variables of a script while it is read: values, arrays, positional parameters, and the variables that `--set` fixes. */
import type { ScriptText } from "./text.ts";

/** The value of a variable: a text, or the items of an array. */
export type VariableValue =
  | { readonly kind: "text"; readonly text: ScriptText; readonly isPinned?: true }
  | { readonly kind: "array"; readonly items: readonly ScriptText[] };

/** Variables and positional parameters of a script, or of a function. */
export interface Scope {
  /** Returns the value of a variable; undefined if it is not set. */
  get(name: string): VariableValue | undefined;
  /** Sets a variable, unless `--set` pins it. */
  set(name: string, value: VariableValue): void;
  /** Removes a variable, unless `--set` pins it. */
  remove(name: string): void;
  /** Positional parameters: `$1` is the first. */
  words: readonly ScriptText[];
  /** Returns a scope with the same variables, whose changes do not affect this one. */
  copy(): Scope;
  /** The names of all variables that are set. */
  names(): readonly string[];
}

/** Returns a scope. `pinned` variables keep their values: assignments of the script do not change them. */
export function newScope(
  pinned: ReadonlyMap<string, string>,
  words: readonly ScriptText[],
  start: Iterable<readonly [string, VariableValue]> = [],
): Scope {
  const variables = new Map<string, VariableValue>(start);
  for (const [name, value] of pinned) variables.set(name, { kind: "text", text: [value], isPinned: true });
  return {
    words,
    get: (name) => variables.get(name),
    set(name, value) {
      if (!pinned.has(name)) variables.set(name, value);
    },
    remove(name) {
      if (!pinned.has(name)) variables.delete(name);
    },
    copy() {
      return newScope(pinned, this.words, variables);
    },
    names: () => [...variables.keys()],
  };
}

/** Returns the text of a value: of an array its first item, as `$A` does. */
export const textOf = (value: VariableValue): ScriptText => (value.kind === "text" ? value.text : (value.items[0] ?? []));

/** Returns the items of a value: a text is an array of one. A value of `--set` has its words as items, as `--set` knows no arrays. */
export function itemsOf(value: VariableValue): readonly ScriptText[] {
  if (value.kind === "array") return value.items;
  if (!value.isPinned) return [value.text];
  const words = value.text.join("").split(/\s+/);
  return words.filter((word) => word !== "").map((word) => [word]);
}
