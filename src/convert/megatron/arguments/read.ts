/** Reads the words after an entry script as arguments of Megatron-LM, with the types and counts of the table (spec.ts). */
import leven from "leven";
import type { Problem } from "../../problems.ts";
import { type Hole, holesOf, knownValue, type ScriptText, shownText } from "../bash/text.ts";
import { type ArgumentSpec, argumentSpecs, type MappedName } from "./spec.ts";

/** An argument as given: its table entry, its values, and its text. */
export interface Given {
  readonly spec: ArgumentSpec;
  readonly values: readonly ScriptText[];
  /** As in "--lr 1e-4". */
  readonly shown: string;
}

/** Arguments of a launch. Readers report an invalid value and return undefined for it. */
export interface Arguments {
  /** All arguments, in their order. If one is given twice, the last value is used. */
  readonly given: ReadonlyMap<string, Given>;
  has(name: MappedName): boolean;
  /** Reads a number that is given. */
  numberIfGiven(name: MappedName): number | undefined;
  /** Reads a number, or Megatron's default. */
  number(name: MappedName): number;
  textIfGiven(name: MappedName): string | undefined;
  /** Reads a text, or Megatron's default. */
  text(name: MappedName): string;
  /** Reads all values; undefined if the argument is not given. */
  textsIfGiven(name: MappedName): readonly string[] | undefined;
}

const isFlag = (word: ScriptText): boolean => {
  const first = word[0];
  return typeof first === "string" && /^--[A-Za-z]/.test(first);
};

/** Parses words to arguments. Problems are added to `problems`. `dropped`: names that are left out on request. */
export function readArguments(words: readonly ScriptText[], dropped: ReadonlySet<string>, problems: Problem[]): Arguments {
  const given = new Map<string, Given>();
  for (let at = 0; at < words.length; ) {
    const word = words[at++];
    if (word === undefined) break;
    if (!isFlag(word)) {
      addStray(word, problems);
      continue;
    }
    const shownWord = shownText(word);
    const [flag = "", ...rest] = shownWord.split("=");
    const name = flag.slice(2);
    const spec = argumentSpecs.get(name);
    const values = takeValues(words, at, spec, rest.length > 0);
    at += values.length;
    if (dropped.has(name)) continue;
    const own: readonly ScriptText[] = rest.length > 0 ? [afterEquals(word)] : values;
    if (!spec) {
      problems.push(unknownArgument(name, own));
      continue;
    }
    const shown = [flag, ...own.map(shownText)].join(" ");
    checkCount(spec, own, shown, problems);
    // the values of mapped arguments are checked where they are read: an unknown value is an error only there
    if (spec.fate !== "mapped") checkValues(spec, own, shown, problems);
    given.delete(name);
    given.set(name, { spec, values: own, shown });
  }
  return argumentsOf(given, problems);
}

/** The value in `--name=value`. */
function afterEquals([first, ...rest]: ScriptText): ScriptText {
  return [typeof first === "string" ? first.slice(first.indexOf("=") + 1) : "", ...rest];
}

function takeValues(words: readonly ScriptText[], at: number, spec: ArgumentSpec | undefined, hasOwn: boolean): readonly ScriptText[] {
  if (hasOwn || spec?.arity === "none") return [];
  const end = words.findIndex((word, i) => i >= at && isFlag(word));
  const run = words.slice(at, end < 0 ? undefined : end);
  if (spec === undefined || spec.arity === "some" || spec.arity === "any") return run;
  return run.slice(0, spec.arity === "one" ? 1 : Number(spec.arity));
}

/** Returns the fault of a word in the place of an argument. An unset variable gives no word in bash, unless a script that cannot be read sets it. */
function addStray(word: ScriptText, problems: Problem[]): void {
  const holes = holesOf(word);
  if (holes.length > 0 && word.every((part) => part === "" || (typeof part !== "string" && part.unset && !part.mayBeSet))) return;
  const [hole] = holes;
  const subject = shownText(word);
  if (hole)
    problems.push({
      kind: "value",
      subject: `line ${hole.line}: ${subject}`,
      why: `it may hold arguments, and ${hole.why}`,
      fix: giveValue(hole),
    });
  else
    problems.push({
      kind: "unknown",
      subject,
      why: "it is no argument, and the argument before it takes no more values",
      fix: "remove it",
    });
}

/** Returns the fix for a value that is not known. */
export function giveValue(hole: Hole | undefined): string {
  const fixes = [hole?.isWord && "give the script's words after --", hole?.variable !== undefined && `--set ${hole.variable}=VALUE`];
  return fixes.filter((fix) => typeof fix === "string").join(", or ") || "write the value in the script";
}

function unknownArgument(name: string, values: readonly ScriptText[]): Problem {
  const near = [...argumentSpecs.keys()].map((known) => ({ known, far: leven(name, known) })).sort((a, b) => a.far - b.far)[0];
  const isNear = near !== undefined && near.far <= Math.max(2, Math.floor(name.length / 4));
  return {
    kind: "unknown",
    subject: [`--${name}`, ...values.map(shownText)].join(" "),
    why: "Megatron-LM has no such argument",
    fix: `${isNear ? `--${near.known} is the nearest; ` : ""}--drop ${name} leaves it out`,
  };
}

function checkCount({ arity, default: otherwise }: ArgumentSpec, values: readonly ScriptText[], shown: string, problems: Problem[]): void {
  const wanted = arity === "one" || arity === "some" ? 1 : typeof arity === "number" ? arity : 0;
  if (values.length >= wanted) return;
  const fix = otherwise === undefined ? "write the value" : `write the value, or leave it out for ${otherwise}`;
  problems.push({ kind: "value", subject: shown, why: wanted === 1 ? "its value is missing" : `it takes ${wanted} values`, fix });
}

/** Numbers that Python's `int` and `float` accept: no 0x10; underscores may group digits. */
const INTEGER = /^\s*[-+]?\d+(?:_\d+)*\s*$/;
const FLOAT = /^\s*[-+]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+(?:_\d+)*)(?:[eE][-+]?\d+)?\s*$/;
const NO_NUMBER = /^\s*[-+]?(?:inf|infinity|nan)\s*$/i;

/** Returns the fault of a value by the type of the argument; undefined if there is none. */
function typeFault({ type, choices }: ArgumentSpec, value: string): Pick<Problem, "why" | "fix"> | undefined {
  if (type === "int" && !INTEGER.test(value)) return { why: "Megatron reads a whole number here", fix: "write it with digits alone" };
  if (type === "float" && !FLOAT.test(value) && !NO_NUMBER.test(value))
    return { why: "Megatron reads a number here", fix: "write a number" };
  if (type === "choice" && !choices.includes(value))
    return { why: "Megatron has no such choice", fix: `write one of ${choices.join(", ")}` };
  return undefined;
}

/** Reports known values that Megatron rejects. */
export function checkValues(spec: ArgumentSpec, values: readonly ScriptText[], shown: string, problems: Problem[]): void {
  if (problems.some(({ subject }) => subject === shown)) return;
  const fault = values.map(knownValue).flatMap((value) => (value === undefined ? [] : (typeFault(spec, value) ?? [])))[0];
  if (fault) problems.push({ kind: "value", subject: shown, ...fault });
}

function argumentsOf(given: ReadonlyMap<string, Given>, problems: Problem[]): Arguments {
  const reported = new Set<string>();
  const report = (subject: string, why: string, fix: string): undefined => {
    if (!reported.has(subject)) problems.push({ kind: "value", subject, why, fix });
    reported.add(subject);
    return undefined;
  };
  const valueIn = ({ spec, shown }: Given, text: ScriptText): string | undefined => {
    const value = knownValue(text);
    const [hole] = holesOf(text);
    if (value === undefined)
      return report(hole ? `line ${hole.line}: ${shown}` : shown, hole?.why ?? "its value is not known", giveValue(hole));
    const { type, choices } = spec;
    if (type === "int" && !INTEGER.test(value)) return report(shown, "Megatron reads a whole number here", "write it with digits alone");
    if (type === "float" && !FLOAT.test(value)) return report(shown, "Megatron reads a number here", "write a number");
    if (type === "choice" && !choices.includes(value))
      return report(shown, "Megatron has no such choice", `write one of ${choices.join(", ")}`);
    return type === "int" || type === "float" ? value.replaceAll("_", "") : value;
  };
  const texts = (name: MappedName): readonly string[] | undefined => {
    const found = given.get(name);
    const values = found?.values.map((text) => valueIn(found, text));
    return values?.every((value) => value !== undefined) ? values : undefined;
  };
  const defaultOf = (name: MappedName): string => {
    const otherwise = argumentSpecs.get(name)?.default;
    if (otherwise === undefined) throw new Error(`the table of arguments has no default of --${name}`);
    return otherwise;
  };
  const textIfGiven = (name: MappedName): string | undefined => texts(name)?.[0];
  const numberIfGiven = (name: MappedName): number | undefined => {
    const value = textIfGiven(name);
    return value === undefined ? undefined : Number(value);
  };
  return {
    given,
    has: (name) => given.has(name),
    textIfGiven,
    text: (name) => textIfGiven(name) ?? defaultOf(name),
    textsIfGiven: texts,
    numberIfGiven,
    number: (name) => numberIfGiven(name) ?? Number(defaultOf(name)),
  };
}
