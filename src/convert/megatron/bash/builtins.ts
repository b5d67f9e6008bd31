/** Builtins of bash that test or change variables: `test`, `set`, `shift`, `read`, `mapfile`, `unset`, `let`, `printf -v`; and `local`. */
import { type Assignment, type CommandArgument, parse } from "unbash";
import { Trouble } from "../../../../schemas/trouble.ts";
import { evaluate } from "./arithmetic.ts";
import { printed } from "./commands.ts";
import { type Answer, testWords } from "./conditions.ts";
import { numbersOf } from "./expand.ts";
import { assign, exportWord, type Frame } from "./frame.ts";
import { itemsOf } from "./scope.ts";
import { knownValue, type ScriptText, testedValue } from "./text.ts";

/** Interprets a builtin with its words. Returns whether it succeeds. */
type Builtin = (args: readonly ScriptText[], pos: number, frame: Frame) => Answer;

const isName = (word: string): boolean => /^[A-Za-z_]\w*$/.test(word);

const FROM_INPUT = "is read from an input";
const BY_NAMES = "is an array with names as indices, which rankc does not follow";

/** Makes variables unknown. `because` completes "X …". */
function makeHoles(names: readonly string[], because: string, pos: number, { shell }: Frame): void {
  for (const variable of names.filter(isName)) {
    const hole = { source: `$${variable}`, variable, line: shell.lineAt(pos), why: `${variable} ${because}` };
    shell.scope.set(variable, { kind: "text", text: [hole] });
  }
}

const known = (args: readonly ScriptText[]): readonly string[] => args.map((word) => knownValue(word) ?? "");

const mapfile: Builtin = (args, pos, frame) => {
  const names = known(args).filter(isName);
  makeHoles(names.length > 0 ? names.slice(-1) : ["MAPFILE"], FROM_INPUT, pos, frame);
  return true;
};

const builtins: Readonly<Record<string, Builtin>> = {
  "[": (args, _, { shell }) => testWords(args.slice(0, -1), shell),
  test: (args, _, { shell }) => testWords(args, shell),
  true: () => true,
  ":": () => true,
  false: () => false,
  shift(args, _, { shell }) {
    shell.scope.words = shell.scope.words.slice(Number(knownValue(args[0] ?? ["1"]) ?? 1));
    return true;
  },
  set(args, _, { shell }) {
    if (args[0] && knownValue(args[0]) === "--") shell.scope.words = args.slice(1);
    return true;
  },
  read(args, pos, frame) {
    makeHoles(known(args), FROM_INPUT, pos, frame);
    return undefined;
  },
  mapfile,
  readarray: mapfile,
  unset(args, _, { shell: { scope } }) {
    for (const word of known(args)) {
      const { name = "", index } = /^(?<name>\w+)(?:\[(?<index>\d+)\])?$/.exec(word)?.groups ?? {};
      const value = scope.get(name);
      if (index === undefined) scope.remove(name);
      else if (value) scope.set(name, { kind: "array", items: itemsOf(value).filter((_item, i) => i !== Number(index)) });
    }
    return true;
  },
  let(args, _, { shell }) {
    let value: bigint | undefined;
    for (const text of known(args)) {
      const command = parse(`(( ${text} ))`).commands[0]?.command;
      value =
        command?.type === "ArithmeticCommand" && command.expression ? evaluate(command.expression, numbersOf(shell).numbers) : undefined;
    }
    return value === undefined ? undefined : value !== 0n;
  },
  printf([option, name, ...words], pos, { shell }) {
    const variable = name && option && knownValue(option) === "-v" ? knownValue(name) : undefined;
    if (variable === undefined || !isName(variable)) return true;
    const hole = { source: `$${variable}`, variable, line: shell.lineAt(pos), why: `${variable} has a format that rankc does not read` };
    shell.scope.set(variable, { kind: "text", text: printed(words) ?? [hole] });
    return true;
  },
};

/** Interprets a builtin. Returns undefined if the command is no builtin; else whether it succeeds. */
export function runBuiltin(name: string, args: readonly ScriptText[], pos: number, frame: Frame): { readonly answer: Answer } | undefined {
  const builtin = Object.hasOwn(builtins, name) ? builtins[name] : undefined;
  return builtin && { answer: builtin(args, pos, frame) };
}

/** Interprets `export`, `local` and similar builtins. Variables that a function declares are local to it. Throws a Trouble for references (`-n`). */
export function declare(command: string, parts: readonly CommandArgument[], pos: number, frame: Frame): void {
  const { shell, locals } = frame;
  const options = parts.flatMap((part) => (part.type === "Word" && /^-[a-zA-Z]+$/.test(part.text) ? [part.text.slice(1)] : [])).join("");
  if (options.includes("n"))
    throw new Trouble(
      `${frame.place(pos)}: ${command} -n makes one variable stand for another, which rankc does not follow`,
      "write the name of the variable in the function, or import the launch's arguments after --",
    );
  const isLocal = locals !== undefined && !/^(?:export|readonly)$/.test(command) && !options.includes("g");
  const own = (name: string): void => {
    if (!isLocal || !isName(name)) return;
    if (!locals.has(name)) locals.set(name, shell.scope.get(name));
  };
  for (const part of parts) {
    if (part.type === "Assignment") {
      const assignment: Assignment = part;
      own(assignment.name);
      if (options.includes("A")) makeHoles([assignment.name], BY_NAMES, pos, frame);
      else assign(assignment, shell);
    } else if (part.type === "Word") {
      const name = testedValue([part.value])?.replace(/=.*/s, "") ?? "";
      own(name);
      if (isLocal && isName(part.value)) shell.scope.remove(name);
      if (options.includes("A") && isName(part.value)) makeHoles([name], BY_NAMES, pos, frame);
      exportWord(part, shell);
    }
  }
}

/** Restores the variables that a function declared. */
export function restore({ shell, locals }: Frame): void {
  for (const [name, value] of locals ?? []) {
    if (value) shell.scope.set(name, value);
    else shell.scope.remove(name);
  }
}
