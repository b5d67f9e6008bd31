/** Expansion of words: parameters, arithmetic and quotes, as bash does it. Nothing is executed and no file name is looked up. */
import type { ArithmeticExpression, DoubleQuotedChild, ParameterExpansionPart, Script, Word, WordPart } from "unbash";
import { evaluate, integerOf, type Numbers } from "./arithmetic.ts";
import { matches, patternSource, quotedPattern } from "./glob.ts";
import { itemsOf, type Scope, textOf, type VariableValue } from "./scope.ts";
import {
  type Hole,
  holesOf,
  isKnown,
  joined,
  knownValue,
  newWords,
  type ScriptText,
  shownText,
  testedValue,
  type WordList,
} from "./text.ts";

/** The parts of the surrounding script that expansion reads. */
export interface Shell {
  readonly scope: Scope;
  lineAt(pos: number): number;
  /** Returns the output of a command substitution without its final newlines; undefined if only a shell can compute it. */
  outputOf(script: Script, shell: Shell): ScriptText | undefined;
  /** Returns a script that this one sources and that cannot be read; undefined if there is none. */
  unreadScript(): string | undefined;
  /** Called when `${NAME:-value}` uses its default. */
  tookDefault(name: string, value: string): void;
}

/** The value of a parameter: one text, or several for `$@` and `${A[@]}`. */
type Found = { readonly kind: "one"; readonly text: ScriptText } | { readonly kind: "many"; readonly texts: readonly ScriptText[] };

const one = (text: ScriptText): Found => ({ kind: "one", text });
const asText = (found: Found): ScriptText => (found.kind === "one" ? found.text : joined(found.texts));

/** Expands a word to words, as in a command or an array: unquoted parts are split at blanks. */
export function expandWords(word: Word, shell: Shell): readonly ScriptText[] {
  const words = newWords();
  const parts = word.parts;
  if (parts === undefined) words.quoted([word.value]);
  else for (const part of parts) addPart(part, shell, words);
  words.end();
  return words.all;
}

/** Expands a word to one text, as on the right of an assignment: nothing is split. */
export function expandText(word: Word, shell: Shell): ScriptText {
  return word.parts === undefined ? [word.value] : word.parts.flatMap((part) => textOfPart(part, shell));
}

/** Expands a word to a pattern: quoted characters match themselves. Unknown parts stay. */
export function expandPattern(word: Word, shell: Shell): ScriptText {
  if (word.parts === undefined) return [/['"\\]/.test(word.text) ? quotedPattern(word.value) : word.value];
  return word.parts.flatMap((part) => {
    const isQuoted = part.type === "DoubleQuoted" || part.type === "SingleQuoted" || part.type === "AnsiCQuoted";
    return textOfPart(part, shell).map((piece) => (isQuoted && typeof piece === "string" ? quotedPattern(piece) : piece));
  });
}

/** Expands the parts of a here-document. */
export const expandParts = (parts: readonly WordPart[], shell: Shell): ScriptText => parts.flatMap((part) => textOfPart(part, shell));

function addPart(part: WordPart, shell: Shell, words: WordList): void {
  switch (part.type) {
    case "DoubleQuoted":
    case "LocaleString":
      addQuoted(part.parts, shell, words);
      return;
    case "SimpleExpansion":
    case "ParameterExpansion": {
      const found = parameterOf(part, shell);
      for (const [i, text] of (found.kind === "one" ? [found.text] : found.texts).entries()) {
        if (i > 0) words.end();
        words.split(text);
      }
      return;
    }
    case "CommandExpansion":
    case "ArithmeticExpansion":
      words.split(textOfPart(part, shell));
      return;
    case "BraceExpansion":
      for (const [i, text] of braceItems(part.text).entries()) {
        if (i > 0) words.end();
        words.quoted([text]);
      }
      return;
    default:
      words.quoted(textOfPart(part, shell));
  }
}

/** `"${A[@]}"` gives each item as a word of its own. */
function addQuoted(parts: readonly DoubleQuotedChild[], shell: Shell, words: WordList): void {
  if (parts.length === 0) words.quoted([""]);
  for (const part of parts) {
    const found = part.type === "SimpleExpansion" || part.type === "ParameterExpansion" ? parameterOf(part, shell) : undefined;
    const isList = found?.kind === "many" && !/\*\]?\}?$/.test(part.text);
    if (!isList) {
      words.quoted(found ? asText(found) : textOfPart(part, shell));
      continue;
    }
    for (const [i, text] of found.texts.entries()) {
      if (i > 0) words.end();
      words.quoted(text);
    }
  }
}

function textOfPart(part: WordPart, shell: Shell): ScriptText {
  switch (part.type) {
    case "Literal":
    case "SingleQuoted":
    case "AnsiCQuoted":
      return [part.value];
    // no file is looked up: a pattern stays as written, as where no file matches
    case "Glob":
    case "ExtendedGlob":
    case "BraceExpansion":
      return [part.text];
    case "DoubleQuoted":
    case "LocaleString":
      return part.parts.flatMap((inner) => textOfPart(inner, shell));
    case "SimpleExpansion":
    case "ParameterExpansion":
      return asText(parameterOf(part, shell));
    case "ArithmeticExpansion":
      return arithmeticText(part.expression, part.text, part.pos, shell);
    case "CommandExpansion": {
      const output = part.script && shell.outputOf(part.script, shell);
      return output ?? [{ source: part.text, line: shell.lineAt(part.pos), why: `${part.text} is a command, and commands are not run` }];
    }
    case "ProcessSubstitution":
      return [{ source: part.text, line: shell.lineAt(part.pos), why: `${part.text} is a command, and commands are not run` }];
    default:
      return part satisfies never;
  }
}

/** Returns the value of an arithmetic expression, or an unknown value that names the unknown operand. */
function arithmeticText(expression: ArithmeticExpression | undefined, source: string, pos: number, shell: Shell): ScriptText {
  const { numbers, holes } = numbersOf(shell);
  const value = expression && evaluate(expression, numbers);
  if (value !== undefined) return [String(value)];
  const [hole] = holes;
  const line = shell.lineAt(pos);
  if (hole) {
    const { variable, isWord, line: at, why } = hole;
    return [{ ...(variable !== undefined && { variable }), ...(isWord && { isWord }), source, line: at, why }];
  }
  return [{ source, line, why: `${source} has no value` }];
}

/** Returns the numbers of a scope, and the unknown values that were read. */
export function numbersOf(shell: Shell): { readonly numbers: Numbers; readonly holes: readonly Hole[] } {
  const holes: Hole[] = [];
  const numbers: Numbers = {
    read(operand, pos) {
      const literal = integerOf(operand);
      if (literal !== undefined) return literal;
      const text = operandText(operand, pos, shell);
      holes.push(...holesOf(text));
      const value = knownValue(text);
      // bash counts an empty variable as 0
      return value === undefined ? undefined : value.trim() === "" ? 0n : integerOf(value);
    },
    assign: (name, value) =>
      shell.scope.set(name, {
        kind: "text",
        text: value === undefined ? [{ source: `$${name}`, variable: name, line: 0, why: `${name} is not known` }] : [String(value)],
      }),
  };
  return { numbers, holes };
}

/** Reads an operand of arithmetic: a name with or without `$`, or `${NAME}`, `${A[1]}`, `${NAME:-1}` and `${#A[@]}`. */
function operandText(operand: string, pos: number, shell: Shell): ScriptText {
  const name = /^\$?\{?(?<name>\w+|[#@*?])\}?$/.exec(operand)?.groups?.name;
  if (name !== undefined) return asText(lookUp(name, `$${name}`, pos, shell));
  const { array, index } = /^\$?\{?(?<array>\w+)\[(?<index>[^\]]+)\]\}?$/.exec(operand)?.groups ?? {};
  if (array !== undefined && index !== undefined) {
    const value = shell.scope.get(array);
    const item = value && itemsOf(value)[Number(testedValue(operandText(index, pos, shell)) ?? index)];
    return item ?? [unsetHole(array, operand, pos, shell)];
  }
  const { of, otherwise } = /^\$\{(?<of>\w+):?-(?<otherwise>\d+)\}$/.exec(operand)?.groups ?? {};
  if (of !== undefined && otherwise !== undefined) {
    const text = asText(lookUp(of, operand, pos, shell));
    if (testedValue(text) !== "") return text;
    shell.tookDefault(of, otherwise);
    return [otherwise];
  }
  return [{ source: operand, line: shell.lineAt(pos), why: `${operand} is not a number that rankc can read` }];
}

function unsetHole(name: string, source: string, pos: number, shell: Shell): Hole {
  const line = shell.lineAt(pos);
  if (/^\d+$/.test(name))
    return { source, line, isWord: true, why: `$${name} is a word after the script's name, and it is not given`, unset: true };
  const file = shell.unreadScript();
  if (file === undefined) return { source, line, variable: name, why: `${name} is not set`, unset: true };
  return { source, line, variable: name, why: `${name} is not set, unless ${file} sets it`, unset: true, mayBeSet: true };
}

/** Returns the value of a name: a variable, a positional parameter, or `@`, `*`, `#`, `?`. */
function lookUp(name: string, source: string, pos: number, shell: Shell): Found {
  const { words } = shell.scope;
  if (name === "@" || name === "*") return { kind: "many", texts: words };
  if (name === "#") return one([String(words.length)]);
  if (name === "?") return one(["0"]);
  if (/^[1-9]\d*$/.test(name)) return one(words[Number(name) - 1] ?? [unsetHole(name, source, pos, shell)]);
  const value = shell.scope.get(name);
  return one(value ? textOf(value) : [unsetHole(name, source, pos, shell)]);
}

function parameterOf(part: Extract<WordPart, { type: "SimpleExpansion" | "ParameterExpansion" }>, shell: Shell): Found {
  if (part.type === "SimpleExpansion") return lookUp(part.text.slice(1), part.text, part.pos, shell);
  const { parameter, prefix, index, pos, text: source } = part;
  const value = shell.scope.get(parameter);
  const at = index && knownValue(expandText(index, shell));
  if (prefix === "!") return indirect(part, value, shell);
  if (prefix === "#") return one(lengthOf(part, value, shell));
  const found: Found =
    at === "@" || at === "*"
      ? { kind: "many", texts: value ? itemsOf(value) : unsetArray(part, shell) }
      : index
        ? one(itemAt(part, value, at, shell))
        : lookUp(parameter, source, pos, shell);
  return operate(found, part, shell);
}

/** An array that is not set has no items, unless a script that cannot be read sets it. */
const unsetArray = ({ parameter, text, pos }: ParameterExpansionPart, shell: Shell): readonly ScriptText[] =>
  shell.unreadScript() === undefined ? [] : [[unsetHole(parameter, text, pos, shell)]];

function itemAt(
  { parameter, text, pos }: ParameterExpansionPart,
  value: VariableValue | undefined,
  at: string | undefined,
  shell: Shell,
): ScriptText {
  // an array with names as indices: a hole, or one value of --set for all
  if (value?.kind === "text" && (value.isPinned || holesOf(value.text).length > 0)) return value.text;
  const position = at === undefined ? undefined : (integerOf(at) ?? integerOf(knownValue(operandText(at, pos, shell)) ?? ""));
  const items = value ? itemsOf(value) : [];
  const item = position === undefined ? undefined : items.at(Number(position));
  return item ?? [unsetHole(parameter, text, pos, shell)];
}

/** `${!NAME}` reads the variable that NAME names; `${!A[@]}` lists the indices of an array. */
function indirect({ parameter, index, text, pos }: ParameterExpansionPart, value: VariableValue | undefined, shell: Shell): Found {
  if (index) return { kind: "many", texts: value ? itemsOf(value).map((_, i) => [String(i)]) : [] };
  const name = value && knownValue(textOf(value));
  return name === undefined ? one([unsetHole(parameter, text, pos, shell)]) : lookUp(name, text, pos, shell);
}

function lengthOf({ parameter, index, text, pos }: ParameterExpansionPart, value: VariableValue | undefined, shell: Shell): ScriptText {
  if (index && value) return [String(itemsOf(value).length)];
  if (parameter === "@" || parameter === "*") return [String(shell.scope.words.length)];
  const content = knownValue(asText(lookUp(parameter, text, pos, shell)));
  return content === undefined ? [unsetHole(parameter, text, pos, shell)] : [String(content.length)];
}

/** Applies the operator after the name in `${NAME…}`. */
function operate(found: Found, part: ParameterExpansionPart, shell: Shell): Found {
  const { operation } = part;
  if (operation === undefined) return found;
  const unreadable = (): Found =>
    one([
      {
        source: part.text,
        line: shell.lineAt(part.pos),
        variable: part.parameter,
        why: `${part.text} is not an expansion that rankc reads`,
      },
    ]);
  switch (operation.type) {
    case "Default":
      return otherwise(found, part, operation.operator, operation.operand, shell);
    case "Slice":
      return slice(found, operation.offset, operation.length, shell) ?? unreadable();
    case "Remove": {
      const pattern = knownValue(expandPattern(operation.operand, shell));
      return (pattern !== undefined && mapText(found, (text) => removed(text, operation.operator, pattern))) || unreadable();
    }
    case "Replace": {
      const pattern = knownValue(expandPattern(operation.pattern, shell));
      const by = knownValue(expandText(operation.replacement, shell));
      if (pattern === undefined || by === undefined) return unreadable();
      return mapText(found, (text) => replaced(text, operation.operator, pattern, by)) ?? unreadable();
    }
    case "CaseModification": {
      const { operator } = operation;
      const change = (text: string): string => (operator.startsWith("^") ? text.toUpperCase() : text.toLowerCase());
      return mapText(found, (text) => (operator.length === 2 ? change(text) : change(text.slice(0, 1)) + text.slice(1))) ?? unreadable();
    }
    default:
      return unreadable();
  }
}

/** Applies a function to known texts; a text with a hole stays as it is. Undefined if the function fails. */
function mapText(found: Found, change: (text: string) => string): Found | undefined {
  const mapped = (text: ScriptText): ScriptText => (isKnown(text) ? [change(text.join(""))] : text);
  try {
    return found.kind === "one" ? one(mapped(found.text)) : { kind: "many", texts: found.texts.map(mapped) };
  } catch {
    return undefined; // an invalid range in a pattern
  }
}

function otherwise(found: Found, part: ParameterExpansionPart, operator: string, operand: Word, shell: Shell): Found {
  const isEmpty = found.kind === "many" && found.texts.every((text) => text.some((part) => typeof part !== "string" && part.unset));
  const value = found.kind === "many" ? (isEmpty ? "" : undefined) : testedValue(found.text);
  const isSet = found.kind === "many" ? !isEmpty : !(holesOf(found.text).some((hole) => hole.unset) && value === "");
  const isPresent = operator.startsWith(":") ? value !== "" : isSet;
  const kind = operator.at(-1);
  if (kind === "+") return isPresent ? one(expandText(operand, shell)) : one([""]);
  if (isPresent || kind === "?") return found;
  const text = expandText(operand, shell);
  if (!isSet) shell.tookDefault(part.parameter, shownText(text));
  if (kind === "=") shell.scope.set(part.parameter, { kind: "text", text });
  return one(text);
}

function slice(found: Found, offset: Word, length: Word | undefined, shell: Shell): Found | undefined {
  const numberOf = (word: Word): number | undefined => {
    const text = knownValue(expandText(word, shell));
    const value = text === undefined ? undefined : integerOf(text);
    return value === undefined ? undefined : Number(value);
  };
  const start = numberOf(offset);
  const count = length && numberOf(length);
  if (start === undefined || (length && count === undefined)) return undefined;
  const cut = <T extends string | readonly ScriptText[]>(of: T) => {
    const from = start < 0 ? Math.max(0, of.length + start) : start;
    return of.slice(from, count === undefined ? undefined : count < 0 ? of.length + count : from + count);
  };
  // positional parameters count from 1
  if (found.kind === "many")
    return { kind: "many", texts: found.texts.slice(Math.max(0, start), count === undefined ? undefined : start + count) };
  return mapText(found, (text) => String(cut(text)));
}

function removed(text: string, operator: string, pattern: string): string {
  const source = patternSource(pattern, operator.length === 1);
  if (operator.startsWith("#")) return text.replace(new RegExp(`^(?:${source})`), "");
  // the shortest suffix begins as late as possible
  const starts = Array.from({ length: text.length + 1 }, (_, i) => (operator === "%" ? text.length - i : i));
  const start = starts.find((i) => matches(pattern, text.slice(i)));
  return start === undefined ? text : text.slice(0, start);
}

function replaced(text: string, operator: string, pattern: string, by: string): string {
  const source = patternSource(pattern);
  const anchored = operator === "/#" ? `^(?:${source})` : operator === "/%" ? `(?:${source})$` : source;
  return text.replace(new RegExp(anchored, operator === "//" ? "g" : ""), () => by);
}

/** Returns the items of `{a,b}` or `{1..4}`; another text is one item. */
function braceItems(text: string): readonly string[] {
  const { from, to } = /^\{(?<from>-?\d+)\.\.(?<to>-?\d+)\}$/.exec(text)?.groups ?? {};
  if (from !== undefined && to !== undefined) {
    const [a, b] = [Number(from), Number(to)];
    return Array.from({ length: Math.min(Math.abs(b - a) + 1, 10_000) }, (_, i) => String(a < b ? a + i : a - i));
  }
  const inner = /^\{(?<list>[^{}]*,[^{}]*)\}$/.exec(text)?.groups?.list;
  return inner === undefined ? [text] : inner.split(",");
}
