/**
 * Translates the regular expressions of tokenizer files to JavaScript. Hugging Face tokenizers uses Oniguruma, tiktoken Rust's
 * fancy-regex; both mean Unicode by \s, \d and \w, and have possessive quantifiers and local flags, which JavaScript lacks. What has no
 * translation here is refused by name.
 */
import { Trouble } from "../../../schemas/trouble.ts";

/** The engine that a pattern was written for. They differ in `$`, `^` and a `+` after braces. */
export type PatternDialect = "oniguruma" | "rust";

/** Characters of \w without its brackets; Unicode Technical Standard 18, annex C. */
export const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
const classes: Readonly<Record<string, string>> = {
  ...{ s: "\\p{White_Space}", S: "\\P{White_Space}", d: "\\p{Nd}", D: "\\P{Nd}", w: `[${WORD}]`, W: `[^${WORD}]` },
  ...{ h: "[0-9a-fA-F]", H: "[^0-9a-fA-F]" },
};
const controls: Readonly<Record<string, number>> = { n: 10, r: 13, t: 9, f: 12, v: 11, a: 7, e: 27, "0": 0 };
const posix = new Map([
  ["alpha", "\\p{Alphabetic}"],
  ["digit", "\\p{Nd}"],
  ["alnum", "\\p{Alphabetic}\\p{Nd}"],
  ["lower", "\\p{Lowercase}"],
  ["upper", "\\p{Uppercase}"],
  ["space", "\\p{White_Space}"],
  ["punct", "\\p{P}\\p{S}"],
  ["cntrl", "\\p{Cc}"],
  ["word", WORD],
]);

/** Returns the pattern as a RegExp with the flags g and v. Throws a Trouble that names what has no translation. */
export function translatePattern(source: string, dialect: PatternDialect): RegExp {
  const reader = new PatternReader(source, dialect);
  const text = reader.alternatives(false);
  if (reader.at < source.length) throw reader.refused(") without (");
  try {
    return new RegExp(text, "gv");
  } catch {
    throw reader.refused("its syntax");
  }
}

/** Returns a pattern that matches the text itself, as a part of a RegExp with the flag v. */
export const literally = (text: string): string => Array.from(text, (c) => escapeOf(c)).join("");
const escapeOf = (c: string): string => (/[\p{L}\p{N}]/u.test(c) ? c : `\\u{${(c.codePointAt(0) ?? 0).toString(16)}}`);

/** Every form in which a character may stand where case is ignored: simple case folding. */
function casesOf(c: string): readonly string[] {
  const equivalents = { s: ["\u017f"], k: ["\u212a"] }[c.toLowerCase()] ?? [];
  return [...new Set([c, c.toLowerCase(), c.toUpperCase(), ...equivalents])].filter((form) => [...form].length === 1);
}

/** A recursive-descent reader: each method consumes one construct and returns its translation. */
class PatternReader {
  at = 0;
  private atomics = 0;

  constructor(
    private readonly source: string,
    private readonly dialect: PatternDialect,
  ) {}

  refused(what: string): Trouble {
    return new Trouble(
      `the pattern ${this.source} uses ${what} at character ${this.at}, which rankc does not translate`,
      "tokenize with the tokenizer's own library, and name the .bin file of the ids",
    );
  }

  private readonly peek = (text: string): boolean => this.source.startsWith(text, this.at);
  private take(text: string): boolean {
    if (!this.peek(text)) return false;
    this.at += text.length;
    return true;
  }
  private next(): string {
    const c = String.fromCodePoint(this.source.codePointAt(this.at) ?? 0);
    this.at += c.length;
    return c;
  }

  alternatives(ignoreCase: boolean): string {
    let [out, ignores] = ["", ignoreCase];
    while (this.at < this.source.length && !this.peek(")")) {
      if (this.take("(?i)")) ignores = true;
      else if (this.take("|")) out += "|";
      else out += this.quantified(this.atom(ignores));
    }
    return out;
  }

  private quantified(atom: string): string {
    let text = atom;
    for (;;) {
      const found = /^(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})/.exec(this.source.slice(this.at, this.at + 16))?.[0];
      if (found === undefined) return text;
      this.at += found.length;
      const quantifier = found.startsWith("{,") ? `{0${found.slice(1)}` : found;
      if (this.take("?")) text = `(?:${text}${quantifier}?)`;
      // in Oniguruma's Ruby syntax a + after braces repeats once more
      else if ((this.dialect === "rust" || !found.startsWith("{")) && this.take("+")) text = this.atomic(`${text}${quantifier}`);
      else text = `(?:${text}${quantifier})`;
    }
  }

  /** A match that is never shortened again: a lookahead keeps what it matched first. */
  private atomic(text: string): string {
    const name = `atomic${this.atomics++}`;
    return `(?:(?=(?<${name}>${text}))\\k<${name}>)`;
  }

  private atom(ignoreCase: boolean): string {
    if (this.peek("(")) return this.group(ignoreCase);
    if (this.take("[")) return this.charClass(ignoreCase);
    if (this.take(".")) return "[^\\n]";
    if (this.take("^")) return this.dialect === "rust" ? "(?<![\\s\\S])" : "(?:(?<![\\s\\S])|(?<=\\n))";
    if (this.take("$")) return this.dialect === "rust" ? "(?![\\s\\S])" : "(?:(?![\\s\\S])|(?=\\n))";
    if (/^[*+?]/.test(this.source.slice(this.at))) throw this.refused("a quantifier without an operand");
    if (this.peek("\\")) return this.escape(ignoreCase);
    return this.character(this.next(), ignoreCase);
  }

  private readonly character = (c: string, ignoreCase: boolean): string => {
    const cases = ignoreCase ? casesOf(c) : [c];
    return cases.length === 1 ? escapeOf(c) : `[${cases.map(escapeOf).join("")}]`;
  };

  private group(ignoreCase: boolean): string {
    const heads = { "(?:": "(?:", "(?i:": "(?:", "(?-i:": "(?:", "(?=": "(?=", "(?!": "(?!", "(?<=": "(?<=", "(?<!": "(?<!", "(?>": "" };
    for (const [head, translated] of Object.entries(heads)) {
      if (!this.take(head)) continue;
      const inner = this.closed(head === "(?i:" ? true : head === "(?-i:" ? false : ignoreCase);
      return head === "(?>" ? this.atomic(inner) : `${translated}${inner})`;
    }
    if (this.peek("(?")) throw this.refused(this.source.slice(this.at, this.at + 4));
    this.take("(");
    return `(?:${this.closed(ignoreCase)})`;
  }
  private closed(ignoreCase: boolean): string {
    const inner = this.alternatives(ignoreCase);
    if (!this.take(")")) throw this.refused("( without )");
    return inner;
  }

  private escape(ignoreCase: boolean): string {
    if (this.take("\\A")) return "(?<![\\s\\S])";
    if (this.take("\\z")) return "(?![\\s\\S])";
    const set = this.classEscape();
    if (set !== undefined) return set;
    return this.character(String.fromCodePoint(this.escapedCode()), ignoreCase);
  }

  /** Reads an escape that stands for a set of characters, if one is next. */
  private classEscape(): string | undefined {
    const rest = this.source.slice(this.at);
    const property = /^\\([pP])(?:\{(\^?)(\w+)(?:=(\w+))?\}|([A-Z]))/.exec(rest);
    if (property) {
      const [whole, p, caret, name, value, letter] = property;
      const negated = (p === "P") !== (caret === "^");
      const text = [letter ?? (value ? `${name}=${value}` : name), `Script=${name}`].find(isProperty);
      if (text === undefined) throw this.refused(whole);
      this.at += whole.length;
      return `\\${negated ? "P" : "p"}{${text}}`;
    }
    const known = classes[rest[1] ?? ""];
    if (known === undefined) return undefined;
    this.at += 2;
    return known;
  }

  private escapedCode(): number {
    const rest = this.source.slice(this.at);
    const hex = /^\\(?:x\{([0-9a-fA-F]+)\}|x([0-9a-fA-F]{2})|u\{([0-9a-fA-F]+)\}|u([0-9a-fA-F]{4}))/.exec(rest);
    const digits = hex?.slice(1).find((found) => found !== undefined);
    if (hex && digits !== undefined) {
      this.at += hex[0].length;
      return Number.parseInt(digits, 16);
    }
    const control = controls[rest[1] ?? ""];
    if (control === undefined && /^\\(?:[a-zA-Z0-9]|$)/.test(rest)) throw this.refused(rest.slice(0, 2));
    this.at++;
    const c = this.next();
    return control ?? c.codePointAt(0) ?? 0;
  }

  /** Reads a class after its `[`. Intersections bind weaker than unions. */
  private charClass(ignoreCase: boolean): string {
    const negated = this.take("^");
    const operands: string[] = [];
    let union = "";
    for (let first = true; ; first = false) {
      if (this.at >= this.source.length) throw this.refused("[ without ]");
      if (!first && this.take("]")) break;
      if (this.take("&&")) {
        operands.push(`[${union}]`);
        union = "";
      } else union += this.classItem(ignoreCase);
    }
    const body = operands.length === 0 ? union : [...operands, `[${union}]`].join("&&");
    return `[${negated ? "^" : ""}${body}]`;
  }

  private classItem(ignoreCase: boolean): string {
    const named = /^\[:(\^?)(\w+):\]/.exec(this.source.slice(this.at));
    if (named) {
      const [whole, caret, name = ""] = named;
      const set = posix.get(name);
      if (set === undefined) throw this.refused(whole);
      this.at += whole.length;
      return `[${caret}${set}]`;
    }
    if (this.take("[")) return this.charClass(ignoreCase);
    if (this.peek("\\")) {
      const set = this.classEscape();
      if (set !== undefined) return set;
    }
    const from = this.classCharacter();
    const isRange = this.peek("-") && !this.peek("-]") && !this.peek("-[") && !/^-\\[sSdDwWhHpP]/.test(this.source.slice(this.at));
    if (!isRange) return (ignoreCase ? casesOf(from) : [from]).map(escapeOf).join("");
    this.take("-");
    const to = this.classCharacter();
    const range = `${escapeOf(from)}-${escapeOf(to)}`;
    if (!ignoreCase) return range;
    const letters = Array.from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").filter((c) => from <= c && c <= to);
    return (
      range +
      [...new Set(letters.flatMap(casesOf))]
        .filter((c) => c < from || c > to)
        .map(escapeOf)
        .join("")
    );
  }
  private readonly classCharacter = (): string => (this.peek("\\") ? String.fromCodePoint(this.escapedCode()) : this.next());
}

function isProperty(text: string | undefined): text is string {
  try {
    return text !== undefined && new RegExp(`\\p{${text}}`, "v") !== undefined;
  } catch {
    return false;
  }
}
