/** The surroundings of a statement, and what assignments change in them. */
import type { Assignment, Word } from "unbash";
import { expandText, expandWords, type Shell } from "./expand.ts";
import { itemsOf, textOf, type VariableValue } from "./scope.ts";
import { type Hole, knownValue, type ScriptText } from "./text.ts";

/** Where a statement stands: its variables, the commands around it, and the condition under which it runs. */
export interface Frame {
  readonly shell: Shell;
  readonly around: readonly (readonly ScriptText[])[];
  readonly condition?: string;
  readonly depth: number;
  /** Returns file and line of an offset. */
  place(pos: number): string;
}

/** Returns a frame whose changes of variables stay its own. */
export function inCopy(frame: Frame): Frame {
  const scope = frame.shell.scope.copy();
  return { ...frame, shell: { ...frame.shell, scope } };
}

/** Returns the hole of a variable on which the branches of a condition disagree. */
export const unsure = (name: string, frame: Frame, pos: number): Hole => ({
  source: `$${name}`,
  variable: name,
  line: frame.shell.lineAt(pos),
  why: `${name} depends on a condition that only a shell can decide`,
});

/** Follows an assignment. */
export function assign({ name, value, append, index }: Assignment, shell: Shell): void {
  const before = shell.scope.get(name);
  if (value.type === "ArrayValue") {
    const items = value.elements.flatMap((word) => expandWords(word, shell));
    shell.scope.set(name, { kind: "array", items: append && before ? [...itemsOf(before), ...items] : items });
    return;
  }
  // `--set` can give the variable where it cannot give the command or the word
  const text = expandText(value, shell).map((part) => (typeof part === "string" ? part : { variable: name, ...part }));
  if (index) {
    const at = Number(knownValue(expandText(index, shell)));
    const items = before ? [...itemsOf(before)] : [];
    if (Number.isInteger(at) && at >= 0 && at < 4096) items[at] = text;
    shell.scope.set(name, { kind: "array", items: Array.from(items, (item) => item ?? []) });
    return;
  }
  // an item is appended to the first item of an array
  if (append && before?.kind === "array") {
    const [first = [], ...rest] = before.items;
    shell.scope.set(name, { kind: "array", items: [[...first, ...text], ...rest] });
  } else {
    shell.scope.set(name, { kind: "text", text: append && before ? [...textOf(before), ...text] : text });
  }
}

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
