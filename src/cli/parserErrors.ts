/** Errors of the command line's syntax, as rankc prints errors: what is wrong, then the fix. */
import leven from "leven";

type Wording = readonly [found: string, fix: string];
type Rule = readonly [pattern: RegExp, write: (...groups: string[]) => Wording];

/** Messages of commander, and how rankc states them. */
const wordings: readonly Rule[] = [
  [/^unknown command '(.*)'$/, (name) => [`there is no command ${name}`, "rankc --help lists the commands"]],
  [/^unknown option '(.*)'$/, (name) => [`there is no option ${name} here`, "--help after the command lists its options"]],
  [
    /^option '(.*)' argument '(.*)' is invalid\. Allowed choices are (.*)\.$/,
    (flags, value, choices) => [`${flagOf(flags)} is "${value}"`, choiceOf(value, choices.split(", "))],
  ],
  [
    /^option '(.*)' argument '(.*)' is invalid\. (.*)$/,
    (flags, value, reason) => [`${flagOf(flags)} is "${value}": ${lower(reason)}`, `write ${flags.replace(/^-\w, /, "")}`],
  ],
  [
    /^command-argument value '(.*)' is invalid for argument '(.*)'\. Allowed choices are (.*)\.$/,
    (value, name, choices) => [`<${name}> is "${value}"`, choiceOf(value, choices.split(", "))],
  ],
  [
    /^command-argument value '(.*)' is invalid for argument '(.*)'\. (.*)$/,
    (value, name, reason) => [`<${name}> is "${value}"`, lower(reason)],
  ],
  [/^option '(.*)' argument missing$/, (flags) => [`${flagOf(flags)} has no value`, `write ${flags.replace(/^-\w, /, "")}`]],
  [/^required option '(.*)' not specified$/, (flags) => [`${flagOf(flags)} is missing`, `write ${flags.replace(/^-\w, /, "")}`]],
  [/^missing required argument '(.*)'$/, (name) => [`the argument <${name}> is missing`, "--help after the command shows an example"]],
  [
    /^too many arguments for '(.*)'\. Expected (\d+) arguments? but got (\d+)\.$/,
    (command, most, given) => [
      `${command} takes ${most} argument${most === "1" ? "" : "s"}, and ${given} are given`,
      "put a value with spaces in quotes, and an option before its value",
    ],
  ],
];

/** Returns commander's message in rankc's form. A message without a wording keeps its text. */
export function parserError(text: string): string {
  const [line = "", ...rest] = text.trimEnd().split("\n");
  const message = line.replace(/^error: /, "");
  const near = /Did you mean (?:one of )?(.*)\?/.exec(rest.join(" "))?.[1];
  for (const [pattern, write] of wordings) {
    const match = pattern.exec(message);
    if (!match) continue;
    const [found, fix] = write(...match.slice(1));
    return `rankc: ${found}\n  fix: ${near === undefined ? fix : `did you mean ${near}?`}\n`;
  }
  return `rankc: ${message}\n${near === undefined ? "" : `  fix: did you mean ${near}?\n`}`;
}

const flagOf = (flags: string): string => /--[\w-]+/.exec(flags)?.[0] ?? flags;
const lower = (text: string): string => text.charAt(0).toLowerCase() + text.slice(1).replace(/\.$/, "");

function choiceOf(value: string, choices: readonly string[]): string {
  const far = (choice: string): number => (choice.startsWith(value.toLowerCase()) ? 0 : leven(choice, value.toLowerCase()));
  const [near] = choices
    .filter((choice) => far(choice) <= 2)
    .sort((a, b) => far(a) - far(b) || Math.abs(a.length - value.length) - Math.abs(b.length - value.length));
  return `${near === undefined ? "" : `did you mean ${near}? `}the choices are ${choices.join(", ")}`;
}
