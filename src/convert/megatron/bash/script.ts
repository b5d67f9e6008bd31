/**
 * Reads a bash script without running anything: assignments, conditions, loops and functions are followed, and all other commands are
 * collected with their words. What only a running shell can tell becomes a hole (text.ts).
 */
import {
  type Assignment,
  type Function as BashFunction,
  type Case,
  type Command,
  type CompoundList,
  type For,
  type HereDoc,
  type If,
  parse,
  type Statement,
} from "unbash";
import { Trouble } from "../../../../schemas/trouble.ts";
import { evaluate } from "./arithmetic.ts";
import { declare, restore, runBuiltin } from "./builtins.ts";
import type { CalledCommand, ScriptRead, ScriptSettings } from "./calls.ts";
import { outputOfScript } from "./commands.ts";
import { type Answer, both, decides, isDeclaration, testExpression } from "./conditions.ts";
import { expandPattern, expandText, expandWords, numbersOf } from "./expand.ts";
import { assign, type Frame, inCopy, slurmVariables } from "./frame.ts";
import { matches } from "./glob.ts";
import { type InnerScript, innerScript } from "./innerScript.ts";
import { type Flow, Loops } from "./loops.ts";
import { newScope, type Scope } from "./scope.ts";
import { isKnown, joined, knownValue, MOST_CHARACTERS, type ScriptText, shownText, testedValue, unixText } from "./text.ts";

const MOST_STEPS = 200_000;
const MOST_NESTED = 24;

/** What is followed of a statement. */
type Step = Pick<Statement, "command">;

/** How a command ends, and whether it succeeds, where that is known. */
interface Outcome {
  readonly flow: Flow;
  readonly answer: Answer;
}

/** Reads a script. Throws a Trouble if it is no bash, does not end, or is too long. */
export function readScript(text: string, settings: ScriptSettings): ScriptRead {
  const reader = new ScriptReader(settings);
  const scope = newScope(
    settings.pinned,
    settings.words.map((word) => [word]),
    slurmVariables(text),
  );
  const flow = reader.runText(unixText(text), settings.file, scope, { around: [], depth: 0 });
  const { commands, defaults, unread, exit } = reader;
  return { commands, defaults, unread, ...(flow === "exit" && exit !== undefined && { exit }) };
}

class ScriptReader {
  readonly commands: CalledCommand[] = [];
  readonly defaults = new Map<string, string>();
  readonly unread: string[] = [];
  exit: string | undefined;
  readonly #functions = new Map<string, { readonly body: BashFunction["body"]; readonly frame: Frame }>();
  readonly #settings: ScriptSettings;
  #steps = 0;
  readonly #loops = new Loops();

  constructor(settings: ScriptSettings) {
    this.#settings = settings;
  }

  /** Reads the text of a script, or of `eval`, in a scope. `at`: the place of the text where it has no lines of its own. */
  runText(text: string, file: string, scope: Scope, outer: Pick<Frame, "around" | "condition" | "depth"> & { readonly at?: string }): Flow {
    if (outer.depth > MOST_NESTED)
      throw new Trouble(`${file}: scripts call each other more than ${MOST_NESTED} deep`, "name the inner script");
    if (text.length > MOST_CHARACTERS)
      throw new Trouble(
        `${outer.at ?? file}: more than ${MOST_CHARACTERS} characters, too long for a launch`,
        "name the script that calls torchrun",
      );
    const script = parse(text);
    const lineAt = (pos: number): number => text.slice(0, pos).split("\n").length;
    const [error] = script.errors ?? [];
    if (error && outer.at === undefined)
      throw new Trouble(`${file}:${lineAt(error.pos)}: not bash: ${error.message}`, "name a launch script that bash accepts");
    const frame: Frame = {
      around: outer.around,
      depth: outer.depth,
      ...(outer.condition !== undefined && { condition: outer.condition }),
      place: (pos) => outer.at ?? `${file}:${lineAt(pos)}`,
      shell: {
        scope,
        lineAt: (pos) => (outer.at === undefined ? lineAt(pos) : Number(outer.at.split(":").at(-1))),
        tookDefault: (name, value) => void this.defaults.set(name, value),
        ...{ outputOf: outputOfScript, unreadScript: () => this.unread[0] },
      },
    };
    return this.#runAll(script.commands, frame);
  }

  #runAll(statements: readonly Step[], frame: Frame): Flow {
    for (const { command } of statements) {
      const flow = this.#run(command, frame).flow;
      if (flow !== "next") return flow;
    }
    return "next";
  }

  /** Follows a command. `answer`: whether it succeeds, where that is known. */
  #run(node: Statement["command"], frame: Frame): Outcome {
    if (++this.#steps > MOST_STEPS)
      throw new Trouble(`${frame.place(node.pos)}: the script takes more than ${MOST_STEPS} steps`, "import its flags after --");
    const next = (flow: Flow, answer: Answer) => ({ flow, answer });
    switch (node.type) {
      case "Command":
        return this.#runCommand(node, frame);
      case "AndOr":
        return this.#runAndOr(node, frame);
      case "Pipeline": {
        const isNegated = node.prefixes.some((prefix) => prefix.type === "Negation");
        if (node.commands.length === 1 && node.commands[0]) {
          const { flow, answer } = this.#run(node.commands[0], frame);
          return next(flow, answer === undefined ? undefined : answer !== isNegated);
        }
        for (const command of node.commands) this.#run(command, inCopy(frame));
        return next("next", undefined);
      }
      case "If":
        return next(this.#runIf(node, frame), true);
      case "For":
        return next(this.#runFor(node, frame), true);
      case "ArithmeticFor": {
        const { numbers } = numbersOf(frame.shell);
        if (node.initialize) evaluate(node.initialize, numbers);
        const test = (): Answer => {
          const value = node.test && evaluate(node.test, numbers);
          return node.test === undefined ? true : value === undefined ? undefined : value !== 0n;
        };
        const update = (): void => void (node.update && evaluate(node.update, numbers));
        return next(this.#loop(test, node.body, frame, update), true);
      }
      case "While": {
        const test = (): Answer => {
          const answer = this.#answerOf(node.clause, frame);
          return answer === undefined ? undefined : answer === (node.kind === "while");
        };
        return next(this.#loop(test, node.body, frame), true);
      }
      case "Case":
        return next(this.#runCase(node, frame), true);
      case "BraceGroup":
        return next(this.#runAll(node.body.commands, frame), true);
      case "Subshell":
        this.#runAll(node.body.commands, inCopy(frame));
        return next("next", true);
      case "Redirected":
        return this.#run(node.command, frame);
      case "TestCommand":
        return next("next", testExpression(node.expression, frame.shell));
      case "ArithmeticCommand": {
        const value = node.expression && evaluate(node.expression, numbersOf(frame.shell).numbers);
        return next("next", value === undefined ? undefined : value !== 0n);
      }
      case "Function":
        this.#functions.set(node.name.value, { body: node.body, frame });
        return next("next", true);
      case "Coproc":
      case "Select":
        return next("next", undefined);
      default:
        return node satisfies never;
    }
  }

  #runAndOr(node: Extract<Statement["command"], { type: "AndOr" }>, frame: Frame): Outcome {
    let answer: Answer = true;
    for (const [i, command] of node.commands.entries()) {
      const operator = i === 0 ? undefined : node.operators[i - 1];
      const before = node.commands[i - 1];
      if (operator && answer === undefined && before && decides(before, command)) {
        this.#runUnsure([[{ command }], []], frame, before.pos);
        continue;
      }
      // any other command of which nothing is known is taken to succeed: what follows `||` handles its failure
      if (operator === "||" && answer !== false) continue;
      if (operator === "&&" && answer === false) continue;
      const result = this.#run(command, frame);
      if (result.flow !== "next") return result;
      answer = operator === "&&" ? both(answer, result.answer) : result.answer;
    }
    return { flow: "next", answer };
  }

  #answerOf(clause: CompoundList, frame: Frame): Answer {
    let answer: Answer = true;
    for (const { command } of clause.commands) answer = this.#run(command, frame).answer;
    return answer;
  }

  #runIf(node: If, frame: Frame): Flow {
    const branches = [node, ...node.elif];
    for (const [i, branch] of branches.entries()) {
      const answer = this.#answerOf(branch.clause, frame);
      if (answer === true) return this.#runAll(branch.then.commands, frame);
      if (answer === undefined) {
        const rest = [...branches.slice(i).map((other) => other.then.commands), node.else?.commands ?? []];
        return this.#runUnsure(rest, frame, branch.clause.pos);
      }
    }
    return node.else ? this.#runAll(node.else.commands, frame) : "next";
  }

  /** Follows all branches of a condition that is not known. A variable on which they disagree becomes a hole. */
  #runUnsure(branches: readonly (readonly Step[])[], frame: Frame, pos: number): Flow {
    const condition = `the condition at ${frame.place(pos)}`;
    const ends = branches.map((branch) => {
      const copy = inCopy({ ...frame, condition });
      return { flow: this.#runAll(branch, copy), scope: copy.shell.scope };
    });
    return this.#loops.mergeBranches(ends, frame, pos);
  }

  #runFor(node: For, frame: Frame): Flow {
    const { shell } = frame;
    const words = node.wordlist ? node.wordlist.flatMap((word) => expandWords(word, shell)) : shell.scope.words;
    return this.#loops.follow(frame, node.pos, () => {
      for (const word of words) {
        if (!isKnown(word)) return this.#runUnsure([node.body.commands, []], frame, node.pos);
        shell.scope.set(node.name.value, { kind: "text", text: word });
        const end = this.#loops.endPass(this.#runAll(node.body.commands, frame), frame, node.pos);
        if (end) return end;
      }
      return "next";
    });
  }

  #loop(test: () => Answer, body: CompoundList, frame: Frame, update: () => void = () => {}): Flow {
    return this.#loops.follow(frame, body.pos, () => {
      for (let answer = test(); answer !== false; answer = test()) {
        if (answer === undefined) return this.#runUnsure([body.commands, []], frame, body.pos);
        const end = this.#loops.endPass(this.#runAll(body.commands, frame), frame, body.pos);
        if (end) return end;
        // how often such a loop runs is not known
        if (this.#loops.mayHaveEnded) return "next";
        update();
      }
      return "next";
    });
  }

  #runCase(node: Case, frame: Frame): Flow {
    const text = testedValue(expandText(node.word, frame.shell));
    if (text === undefined) return this.#runUnsure([...node.items.map((item) => item.body.commands), []], frame, node.pos);
    let fallsThrough = false;
    for (const { pattern, body, terminator } of node.items) {
      const isMatch = pattern.some((one) => matches(knownValue(expandPattern(one, frame.shell)) ?? "", text));
      if (!isMatch && !fallsThrough) continue;
      const flow = this.#runAll(body.commands, frame);
      if (flow !== "next" || (terminator !== ";&" && terminator !== ";;&")) return flow;
      fallsThrough = terminator === ";&";
    }
    return "next";
  }

  #runCommand(node: Command, frame: Frame): Outcome {
    const prefixes = node.prefix.filter((part): part is Assignment => part.type === "Assignment");
    if (node.name === undefined) {
      for (const assignment of prefixes) assign(assignment, frame.shell);
      return { flow: "next", answer: true };
    }
    if (isDeclaration(node.name.value)) {
      declare(node.name.value, node.args, node.pos, frame);
      return { flow: "next", answer: true };
    }
    // assignments before a command hold for the command alone
    const inner = prefixes.length > 0 ? inCopy(frame) : frame;
    for (const assignment of prefixes) assign(assignment, inner.shell);
    // but its words are expanded before
    const args = node.args.flatMap((part) => (part.type === "Word" ? expandWords(part, frame.shell) : [[part.text]]));
    const words = [...expandWords(node.name, frame.shell), ...args];
    const document = node.redirects.find((redirect): redirect is HereDoc => redirect.type === "HereDoc");
    return this.#call(words, node.pos, inner, frame, document);
  }

  #call(words: readonly ScriptText[], pos: number, frame: Frame, outer: Frame, document?: HereDoc): Outcome {
    const [head, ...args] = words;
    const name = head && knownValue(head);
    const next = (answer: Answer): Outcome => ({ flow: "next", answer });
    // of assignments before a builtin none outlives it but its own
    const builtin = name === undefined ? undefined : runBuiltin(name, args, pos, outer);
    if (builtin) return next(builtin.answer);
    switch (name) {
      case "exit":
        this.exit ??= frame.place(pos);
        return { flow: "exit", answer: undefined };
      case "return":
        return { flow: name, answer: undefined };
      case "break":
      case "continue":
        this.#loops.levels = Number(knownValue(args[0] ?? ["1"]) ?? 1);
        return { flow: name, answer: undefined };
      case "eval":
        return { flow: this.#runWords(joined(args), pos, frame, frame.around), answer: undefined };
      case "source":
      case ".":
        return { flow: this.#runFile(args, pos, frame, frame.shell.scope), answer: true };
      case undefined:
        this.#collect(words, pos, frame);
        return next(undefined);
      default:
        return this.#callOther(name, words, pos, frame, document);
    }
  }

  #callOther(name: string, words: readonly ScriptText[], pos: number, frame: Frame, document?: HereDoc): Outcome {
    const called = this.#functions.get(name);
    if (called) {
      if (frame.depth >= MOST_NESTED)
        throw new Trouble(`${frame.place(pos)}: functions call each other more than ${MOST_NESTED} deep`, "import its flags after --");
      const outer = frame.shell.scope.words;
      frame.shell.scope.words = words.slice(1);
      const inner: Frame = { ...frame, place: called.frame.place, depth: frame.depth + 1, locals: new Map() };
      const { flow } =
        called.body.type === "CompoundList" ? { flow: this.#runAll(called.body.commands, inner) } : this.#run(called.body, inner);
      restore(inner);
      frame.shell.scope.words = outer;
      return { flow: flow === "exit" ? "exit" : "next", answer: undefined };
    }
    const inner = innerScript(name, words, document, frame.shell);
    if (inner) this.#runInner(inner, pos, frame);
    else this.#collect(words, pos, frame);
    return { flow: "next", answer: undefined };
  }

  /** Reads a script that a command runs in a shell of its own. */
  #runInner(inner: InnerScript, pos: number, frame: Frame): void {
    const copy = inCopy(frame);
    const { scope } = copy.shell;
    const around = inner.before.length > 0 ? [...frame.around, inner.before] : frame.around;
    switch (inner.kind) {
      case "text":
        scope.words = inner.words;
        this.#runWords(inner.text, pos, copy, around);
        break;
      case "document":
        for (const [variable, value] of slurmVariables(shownText(inner.text))) scope.set(variable, value);
        this.#runWords(inner.text, pos, copy, around);
        break;
      case "file":
        this.#runFile(inner.words, pos, { ...copy, around }, scope);
        break;
      default:
        inner satisfies never;
    }
  }

  /** Reads a text as a script of its own, as `eval` does. Its holes become variables that stay holes. */
  #runWords(text: ScriptText, pos: number, frame: Frame, around: Frame["around"]): Flow {
    const { scope } = frame.shell;
    const source = text
      .map((part) => {
        if (typeof part === "string") return part;
        const name = `__hole_${this.#steps++}`;
        scope.set(name, { kind: "text", text: [part] });
        return `\${${name}}`;
      })
      .join("");
    const { condition, depth } = frame;
    return this.runText(source, this.#settings.file, scope, {
      ...(condition !== undefined && { condition }),
      ...{ around, depth: depth + 1, at: frame.place(pos) },
    });
  }

  #runFile([file, ...words]: readonly ScriptText[], pos: number, frame: Frame, scope: Scope): Flow {
    const path = file && knownValue(file);
    const text = path === undefined ? undefined : this.#settings.readScript(path);
    if (path === undefined || text === undefined) {
      this.unread.push(`${file ? shownText(file) : ""} (${frame.place(pos)})`);
      return "next";
    }
    const outer = scope.words;
    if (words.length > 0 || scope !== frame.shell.scope) scope.words = words;
    const { around, condition, depth } = frame;
    const flow = this.runText(unixText(text), path, scope, { around, depth: depth + 1, ...(condition !== undefined && { condition }) });
    scope.words = outer;
    return flow === "return" ? "next" : flow;
  }

  #collect(words: readonly ScriptText[], pos: number, frame: Frame): void {
    const { around, condition, shell } = frame;
    this.commands.push({
      words,
      around,
      place: frame.place(pos),
      scope: shell.scope.copy(),
      ...(condition !== undefined && { condition }),
    });
  }
}
