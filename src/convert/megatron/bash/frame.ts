/** The context of a statement, and the assignments that change it. */
import type { Assignment, Word } from "unbash";
import { Trouble } from "../../../../schemas/trouble.ts";
import { expandText, expandWords, type Shell } from "./expand.ts";
import { itemsOf, type Scope, textOf, type VariableValue } from "./scope.ts";
import { type Hole, holesOf, knownValue, MOST_CHARACTERS, type ScriptText, shownText } from "./text.ts";

/** The context of a statement: its variables, the commands around it, and the condition under which it runs. */
export interface Frame {
  readonly shell: Shell;
  readonly around: readonly (readonly ScriptText[])[];
  readonly condition?: string;
  readonly depth: number;
  /** In a function: the variables that it declares, with their values before. */
  readonly locals?: Map<string, VariableValue | undefined>;
  /** Returns file and line of an offset. */
  place(pos: number): string;
}

/** Returns a copy of a frame; changes of its variables do not affect the original. */
export function inCopy(frame: Frame): Frame {
  const scope = frame.shell.scope.copy();
  return { ...frame, shell: { ...frame.shell, scope } };
}

/** Returns the unknown value of a variable that has different values after the branches of a condition. */
const unsure = (name: string, frame: Frame, pos: number): Hole => ({
  source: `$${name}`,
  variable: name,
  line: frame.shell.lineAt(pos),
  why: `${name} depends on a condition that only a shell can decide`,
});

/** Merges the variables after the branches of a condition; a variable with different values becomes unknown. */
export function merge(scopes: readonly Scope[], frame: Frame, pos: number): void {
  // if no branch continues, variables keep their values
  const before = scopes.length > 0 ? frame.shell.scope.names() : [];
  for (const name of new Set([...before, ...scopes.flatMap((scope) => scope.names())])) {
    const values = scopes.map((scope) => scope.get(name));
    const shown = new Set(values.map((value) => JSON.stringify(value)));
    const [value] = values;
    if (shown.size === 1 && value) frame.shell.scope.set(name, value);
    else if (shown.size === 1) frame.shell.scope.remove(name);
    else if (shown.size > 1) frame.shell.scope.set(name, { kind: "text", text: [unsure(name, frame, pos)] });
  }
}

/** Interprets an assignment. Throws a Trouble if the value is too long. */
export function assign({ name, value, append, index }: Assignment, shell: Shell): void {
  const before = shell.scope.get(name);
  if (value.type === "ArrayValue") {
    const items = value.elements.flatMap((word) => expandWords(word, shell));
    shell.scope.set(name, { kind: "array", items: append && before ? [...itemsOf(before), ...items] : items });
    return;
  }
  // `--set` can set the variable, but not the command or the word
  const text = expandText(value, shell).map((part) => (typeof part === "string" ? part : { variable: name, ...part }));
  if (shownText(text).length > MOST_CHARACTERS) throw tooLong(name);
  if (index) {
    // an array with names as indices stays a hole
    if (before?.kind === "text" && holesOf(before.text).length > 0) return;
    const at = Number(knownValue(expandText(index, shell)));
    const items = before ? [...itemsOf(before)] : [];
    if (Number.isInteger(at) && at >= 0 && at < 4096) items[at] = text;
    shell.scope.set(name, { kind: "array", items: Array.from(items, (item) => item ?? []) });
    return;
  }
  if (append && before && shownText(textOf(before)).length + shownText(text).length > MOST_CHARACTERS) throw tooLong(name);
  // an item is appended to the first item of an array
  if (append && before?.kind === "array") {
    const [first = [], ...rest] = before.items;
    shell.scope.set(name, { kind: "array", items: [[...first, ...text], ...rest] });
  } else {
    shell.scope.set(name, { kind: "text", text: append && before ? [...textOf(before), ...text] : text });
  }
}

const tooLong = (name: string): Trouble =>
  new Trouble(`${name} has more than ${MOST_CHARACTERS} characters, too long for a launch`, `--set ${name}=VALUE`);

/** `export "X=1"`: an assignment that bash sees only after expansion. */
export function exportWord(word: Word, shell: Shell): void {
  const [text] = expandWords(word, shell);
  const [first, ...rest] = text ?? [];
  const { name, value } = (typeof first === "string" && /^(?<name>[A-Za-z_]\w*)=(?<value>[\s\S]*)$/.exec(first)?.groups) || {};
  if (name !== undefined && value !== undefined) shell.scope.set(name, { kind: "text", text: [value, ...rest] });
}

/** `#SBATCH` lines are comments of bash and options of the scheduler; it sets these variables from them. */
export function slurmVariables(text: string): readonly (readonly [string, VariableValue])[] {
  const option = (names: string): string | undefined =>
    new RegExp(`^#SBATCH\\s+(?:${names})[=\\s]+(?:gpu:(?:\\w+:)?)?(\\d+)\\s*(?:#.*)?$`, "m").exec(text)?.[1];
  const nodes = option("--nodes|-N");
  const tasks = option("--ntasks-per-node");
  const gpus = option("--gpus-per-node|--gres");
  const value = (number: string): VariableValue => ({ kind: "text", text: [number] });
  return [
    ...(nodes === undefined ? [] : (["SLURM_NNODES", "SLURM_JOB_NUM_NODES"] as const).map((name) => [name, value(nodes)] as const)),
    ...(tasks === undefined ? [] : [["SLURM_NTASKS_PER_NODE", value(tasks)] as const]),
    ...(gpus === undefined ? [] : [["SLURM_GPUS_ON_NODE", value(gpus)] as const]),
    ...(nodes === undefined || tasks === undefined ? [] : [["SLURM_NTASKS", value(String(Number(nodes) * Number(tasks)))] as const]),
  ];
}
