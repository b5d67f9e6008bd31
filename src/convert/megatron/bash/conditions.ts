/** Conditions of bash: `test`, `[ ]` and `[[ ]]`. The result is undefined if only a running shell can compute it, as for files. */
import type { PipelineNode, TestExpression, Word } from "unbash";
import { integerOf } from "./arithmetic.ts";
import { expandPattern, expandText, type Shell } from "./expand.ts";
import { matches } from "./glob.ts";
import { type ScriptText, testedValue } from "./text.ts";

/** The result of a condition; undefined if it is unknown. */
export type Answer = boolean | undefined;

/** Returns whether a command declares variables. */
export const isDeclaration = (name: string): boolean => /^(?:export|declare|local|readonly|typeset)$/.test(name);

const not = (answer: Answer): Answer => (answer === undefined ? undefined : !answer);

/** Returns the conjunction: false if either is false, else undefined if either is unknown. */
export const both = (a: Answer, b: Answer): Answer => (a === false || b === false ? false : a && b);

const either = (a: Answer, b: Answer): Answer => not(both(not(a), not(b)));

const numeric: Readonly<Record<string, (a: bigint, b: bigint) => boolean>> = {
  "-eq": (a, b) => a === b,
  "-ne": (a, b) => a !== b,
  "-lt": (a, b) => a < b,
  "-le": (a, b) => a <= b,
  "-gt": (a, b) => a > b,
  "-ge": (a, b) => a >= b,
};

const isNumeric = (operator: string): boolean => Object.hasOwn(numeric, operator);

/** Compares two texts, or two integers. A text that is no integer makes bash report an error, which counts as false. */
function compare(a: ScriptText, operator: string, b: ScriptText): Answer {
  const [left, right] = [testedValue(a), testedValue(b)];
  if (left === undefined || right === undefined) return undefined;
  const byNumber = isNumeric(operator) ? numeric[operator] : undefined;
  if (byNumber) {
    const [m, n] = [integerOf(left), integerOf(right)];
    return m !== undefined && n !== undefined && byNumber(m, n);
  }
  if (operator === "=" || operator === "==") return left === right;
  if (operator === "!=") return left !== right;
  if (operator === "<" || operator === "\\<") return left < right;
  return operator === ">" || operator === "\\>" ? left > right : undefined;
}

/** A test of one operand: emptiness, or a variable that is set. Tests of files are not known. */
function single(operator: string, operand: ScriptText, shell: Shell): Answer {
  const value = testedValue(operand);
  if (operator === "-z") return value === undefined ? undefined : value === "";
  if (operator === "-n") return value === undefined ? undefined : value !== "";
  if (operator === "-v" && value !== undefined) return shell.scope.get(value) !== undefined;
  return undefined;
}

/** Answers `test` or `[`, without the brackets. */
export function testWords(words: readonly ScriptText[], shell: Shell): Answer {
  let at = 0;
  const peek = (): string | undefined => {
    const word = words[at];
    return word && testedValue(word);
  };
  const anyOf = (): Answer => {
    let answer = allOf();
    for (; peek() === "-o"; answer = either(answer, allOf())) at++;
    return answer;
  };
  const allOf = (): Answer => {
    let answer = unit();
    for (; peek() === "-a"; answer = both(answer, unit())) at++;
    return answer;
  };
  const unit = (): Answer => {
    const [first, second, third] = words.slice(at, at + 3);
    if (first === undefined) return false;
    const operator = second && testedValue(second);
    if (third !== undefined && operator !== undefined && (isNumeric(operator) || /^(?:==?|!=|\\?[<>])$/.test(operator))) {
      at += 3;
      return compare(first, operator, third);
    }
    const head = testedValue(first);
    if (head === "!" && second !== undefined) {
      at++;
      return not(unit());
    }
    if (head === "(" && second !== undefined) {
      at++;
      const inner = anyOf();
      at++;
      return inner;
    }
    if (head !== undefined && /^-[a-zA-Z]$/.test(head) && second !== undefined) {
      at += 2;
      return single(head, second, shell);
    }
    at++;
    return head === undefined ? undefined : head !== "";
  };
  const answer = anyOf();
  // what is left over is an error of bash, which counts as false
  return at < words.length ? false : answer;
}

/** Answers `[[ … ]]`. */
export function testExpression(expression: TestExpression, shell: Shell): Answer {
  switch (expression.type) {
    case "TestUnary":
      return single(expression.operator, expandText(expression.operand, shell), shell);
    case "TestBinary":
      return testBinary(expression.left, expression.operator, expression.right, shell);
    case "TestLogical": {
      const answers = expression.operands.map((operand) => testExpression(operand, shell));
      return answers.reduce<Answer>(expression.operator === "&&" ? both : either, expression.operator === "&&");
    }
    case "TestNot":
      return expression.negations.length % 2 === 1
        ? not(testExpression(expression.operand, shell))
        : testExpression(expression.operand, shell);
    case "TestGroup":
      return testExpression(expression.expression, shell);
    default:
      return expression satisfies never;
  }
}

function testBinary(left: Word, operator: string, right: Word, shell: Shell): Answer {
  const text = testedValue(expandText(left, shell));
  if (operator === "==" || operator === "=" || operator === "!=") {
    const pattern = testedValue(expandPattern(right, shell));
    if (text === undefined || pattern === undefined) return undefined;
    return matches(pattern, text) === (operator !== "!=");
  }
  if (operator === "=~") {
    // quoted parts stand for themselves
    const isQuoted = /["']/.test(right.text);
    const source = testedValue(expandText(right, shell));
    if (text === undefined || source === undefined) return undefined;
    try {
      return isQuoted ? text.includes(source) : new RegExp(source.replace(/\[\[:digit:\]\]/g, "\\d")).test(text);
    } catch {
      return undefined;
    }
  }
  return compare(expandText(left, shell), operator, expandText(right, shell));
}

/** Returns whether a command, or one of a group, assigns variables. */
function assigns(node: PipelineNode): boolean {
  if (node.type === "BraceGroup") return node.body.commands.some(({ command }) => command.type !== "AndOr" && assigns(command));
  if (node.type === "Pipeline") return node.commands.length === 1 && node.commands.every(assigns);
  return node.type === "Command" && (node.name === undefined || isDeclaration(node.name.value));
}

/** Returns whether a command that is not known to succeed decides about the one after it: a test does, and what an assignment follows. */
export function decides(before: PipelineNode, after: PipelineNode): boolean {
  if (assigns(after)) return true;
  if (before.type === "Pipeline") return before.commands.every((inner) => decides(inner, after));
  return before.type === "TestCommand" || (before.type === "Command" && /^(?:\[|test)$/.test(before.name?.value ?? ""));
}
