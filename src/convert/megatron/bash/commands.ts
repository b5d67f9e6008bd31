/** Commands whose output is known without running them: `$(echo …)`, `$(expr …)`, `$(seq …)` and the like. */
import type { Script } from "unbash";
import { integerOf } from "./arithmetic.ts";
import { expandWords, type Shell } from "./expand.ts";
import { holesOf, isKnown, joined, knownValue, type ScriptText, shownText } from "./text.ts";

const MOST_ITEMS = 10_000;

const numbersOf = (words: readonly ScriptText[]): readonly number[] | undefined => {
  const numbers = words.map((word) => integerOf(knownValue(word) ?? ""));
  return numbers.every((n) => n !== undefined) ? numbers.map(Number) : undefined;
};

const pathPart = (words: readonly ScriptText[], part: (path: string) => string): ScriptText | undefined => {
  const path = words.length === 1 && words[0] ? knownValue(words[0]) : undefined;
  return path === undefined ? undefined : [part(path)];
};

/** Returns what `printf` prints; undefined for a format with more than %s, %d and \\n. */
export function printed([format, ...words]: readonly ScriptText[]): ScriptText | undefined {
  const text = format && knownValue(format);
  if (text === undefined || !/^(?:[^%\\]|%[sd]|\\n)*$/.test(text)) return undefined;
  const rest = [...words];
  return text
    .replaceAll("\\n", "\n")
    .split(/%[sd]/)
    .flatMap((literal, i) => (i === 0 ? [literal] : [...(rest.shift() ?? []), literal]));
}

const outputs: Readonly<Record<string, (words: readonly ScriptText[]) => ScriptText | undefined>> = {
  echo(words) {
    const [first] = words;
    const option = first && knownValue(first);
    return joined(option !== undefined && /^-[neE]+$/.test(option) ? words.slice(1) : words);
  },
  printf: printed,
  expr(words) {
    const [left, operator, right] = words;
    const numbers = left && right && words.length === 3 ? numbersOf([left, right]) : undefined;
    const sign = operator && knownValue(operator);
    if (!numbers || sign === undefined) return undefined;
    const [a = 0, b = 0] = numbers;
    if ((sign === "/" || sign === "%") && b === 0) return undefined;
    const value = { "+": a + b, "-": a - b, "*": a * b, "/": Math.trunc(a / b), "%": a % b }[sign];
    return value === undefined ? undefined : [String(value)];
  },
  seq(words) {
    const numbers = numbersOf(words);
    if (!numbers || numbers.length === 0 || numbers.length > 3) return undefined;
    const first = numbers.length > 1 ? (numbers[0] ?? 1) : 1;
    const step = numbers.length > 2 ? (numbers[1] ?? 1) : 1;
    const last = numbers.at(-1) ?? 1;
    const count = step === 0 ? 0 : Math.floor((last - first) / step) + 1;
    if (count > MOST_ITEMS) return undefined;
    return [Array.from({ length: Math.max(0, count) }, (_, i) => first + i * step).join("\n")];
  },
  basename: (words) => pathPart(words, (path) => path.replace(/\/+$/, "").replace(/^.*\//, "")),
  dirname: (words) => pathPart(words, (path) => (path.includes("/") ? path.replace(/\/+[^/]*\/*$/, "") || "/" : ".")),
};

function outputOfCommand([name, ...words]: readonly ScriptText[]): ScriptText | undefined {
  if (name === undefined || !isKnown(name)) return undefined;
  const command = name.join("");
  return Object.hasOwn(outputs, command) ? outputs[command]?.(words) : undefined;
}

/** Returns the output of a command substitution; undefined if only a shell can tell. A command on a hole is a hole of the same variable. */
export function outputOfScript(script: Script, shell: Shell): ScriptText | undefined {
  const [statement, ...more] = script.commands;
  if (!statement || more.length > 0 || statement.command.type !== "Command") return undefined;
  const { command } = statement;
  if (command.name === undefined || command.redirects.length > 0) return undefined;
  const args = command.args.flatMap((part) => (part.type === "Word" ? expandWords(part, shell) : [[part.text] satisfies ScriptText]));
  const words = [...expandWords(command.name, shell), ...args];
  const output = outputOfCommand(words);
  if (output) return output;
  // a command on a hole: the hole says which variable to give
  const hole = words.flatMap(holesOf).find((found) => found.variable !== undefined);
  return hole && [{ ...hole, source: `$(${words.map(shownText).join(" ")})` }];
}
