/** Parses YAML text into plain values with the place of every path. Errors of the text are findings; nothing throws. */
import {
  type Document,
  isAlias,
  isMap,
  isScalar,
  isSeq,
  Lexer,
  LineCounter,
  type Node,
  type Pair,
  parseDocument,
  parse as parseYaml,
  visit,
  type YAMLError,
} from "yaml";
import type { At, Finding, SourceLocation } from "./diagnostic.ts";

/** The path of a value: keys and indices. */
export type Path = readonly (string | number)[];

/** A parsed text. */
export interface Source {
  readonly file: string;
  /** The values, with every `--set` applied. */
  readonly value: unknown;
  /** The length of the text in characters. */
  readonly size: number;
  /** Returns the place of the value (or key) of a path, or of its deepest existing ancestor; undefined only for an empty text. */
  at(path: string | Path, part?: "key" | "value"): At | undefined;
}

interface Fault {
  readonly code: string;
  readonly title: string;
  readonly why: string;
  readonly bad: string;
}
const fault = (code: string, title: string, why: string, bad: string): Fault => ({ code, title, why, bad });

/** The faults of a text before it is read as a job. `bad`: the example of `explain`. */
export const textFaults = {
  syntax: fault("S001", "this is not YAML", "After a syntax error the text has no unique meaning.", "name: [a\nmodel: {}\n"),
  duplicate: fault(
    "S002",
    "a key is written twice",
    "Only one of the two values can be used, and the text does not show which.",
    "name: a\nname: b\n",
  ),
  alias: fault(
    "S003",
    "an alias cannot be expanded",
    "An alias may name a missing anchor, or nest so that a few lines expand to gigabytes.",
    "name: *nowhere\n",
  ),
  documents: fault(
    "S004",
    "more than one document",
    "A file holds one job; text after the second --- would be ignored.",
    "name: a\n---\nname: b\n",
  ),
  root: fault("S005", "a job is a map of keys", "Rules and compiler read a job by its keys.", "- name: a\n"),
  set: fault("S006", "--set is not understood", "Without a key and a value the option has no effect.", "--set model.layers\n"),
} as const satisfies Record<string, Fault>;

/** Parses a text and applies `--set` options. */
export function readSource(text: string, file: string, sets: readonly string[] = []): { source: Source; findings: readonly Finding[] } {
  const lines = new LineCounter();
  const findings: Finding[] = [];
  const rows = text.split(/\r?\n/);
  const place = (from: number, to: number): SourceLocation => {
    const a = lines.linePos(Math.min(from, text.length));
    const line = Math.max(1, a.line);
    const lineText = rows[line - 1] ?? "";
    const col = Math.max(1, a.col);
    return { file, line, col, endCol: Math.max(col + 1, Math.min(col + to - from, lineText.length + 1)), lineText };
  };
  const find = (what: Fault, path: string, found: string, fix: string, at: At, related?: readonly At[]) =>
    findings.push({ code: what.code, level: "error", title: what.title, path, found, why: what.why, fix, at, ...(related && { related }) });

  const doc = parse(text, lines);
  let value: unknown;
  if (typeof doc === "string") find(textFaults.syntax, "", doc, "a job has a few dozen keys: remove everything else", place(0, 1));
  else {
    let line = 0;
    for (const e of [...doc.errors, ...doc.warnings]) {
      const at = place(e.pos[0], e.pos[1]);
      // further errors of a line follow from its first one
      if (at.line === line) continue;
      line = at.line;
      const [what, fix] = byYaml(e);
      find(what, "", say(e), fix, at);
    }
    for (const { range } of findings.length ? [] : duplicates(doc))
      find(textFaults.duplicate, "", "the key occurs twice in one map", "keep one of them", place(range?.[0] ?? 0, range?.[1] ?? 1));
    if (!findings.length) {
      try {
        value = doc.toJS({ maxAliasCount: 100 });
      } catch (e) {
        find(textFaults.alias, "", e instanceof Error ? e.message : String(e), "write the values without anchors and aliases", place(0, 1));
      }
    }
    if (!findings.length && !isObject(value))
      find(
        textFaults.root,
        "",
        value === null ? "an empty file" : `the file holds ${Array.isArray(value) ? "a list" : "one value"}`,
        "start with `name:`, `model:`, `train:` and `data:`",
        place(0, 1),
      );
  }

  const written: { path: readonly string[]; set: string }[] = [];
  if (!findings.length && isObject(value)) {
    if (sets.length) value = copy(value);
    for (const set of sets) {
      const problem = lay(value as Record<string, unknown>, set);
      if (typeof problem === "string")
        find(textFaults.set, "", problem, "write --set path=value, for example --set model.layers=3", { set });
      else written.unshift({ path: problem, set });
    }
  }

  const at: Source["at"] = (where, part = "value") => {
    const path = typeof where === "string" ? (where ? where.split(".") : []) : where.map(String);
    const set = written.find((w) => w.path.every((key, i) => path[i] === key));
    if (set) return { set: set.set };
    if (typeof doc === "string" || !doc.contents) return undefined;
    const { node, pair, isWhole } = nodeAt(doc, path);
    const value = isWhole && part === "value" && isScalar(node) && node.value !== null ? node : undefined;
    const range = (value ?? pair?.key ?? undefined)?.range;
    return range ? place(range[0], range[1]) : place(0, 1);
  };
  return { source: { file, value, size: text.length, at }, findings };
}

/** The node at the longest written prefix of a path, the pair of the last map on the way, and whether the prefix is the whole path. */
interface Found {
  readonly node: Node | null;
  readonly pair: Pair<Node, Node | null> | undefined;
  readonly isWhole: boolean;
}

/** Follows a path into a document. */
function nodeAt(doc: Document, path: readonly string[]): Found {
  let node = doc.contents as Node | null;
  let pair: Found["pair"];
  for (const key of path) {
    const inner: unknown = isAlias(node) ? node.resolve(doc) : node;
    if (isMap<Node, Node | null>(inner)) {
      const next = inner.items.find((p) => isScalar(p.key) && String(p.key.value) === key);
      if (!next) return { node, pair, isWhole: false };
      pair = next;
      node = next.value;
      continue;
    }
    const item = isSeq<Node>(inner) ? inner.items[Number(key)] : undefined;
    if (!item) return { node, pair, isWhole: false };
    node = item;
  }
  return { node, pair, isWhole: true };
}

/** Returns whether a value is a plain object. */
export const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Returns the value at a path; undefined if it does not exist. */
export function valueAt(value: unknown, path: Path): unknown {
  let here = value;
  for (const key of path) {
    if (typeof here !== "object" || here === null || !Object.hasOwn(here, key)) return undefined;
    here = (here as Record<string | number, unknown>)[key];
  }
  return here;
}

/** Sets the value at a path, and creates missing maps. Returns the obstacle if a value on the path is not a map. */
export function setPath(root: Record<string, unknown>, path: readonly string[], value: unknown): string | undefined {
  let here: unknown = root;
  for (const [i, key] of path.entries()) {
    const last = i === path.length - 1;
    if (Array.isArray(here)) {
      if (!/^\d+$/.test(key) || Number(key) >= here.length)
        return `${path.slice(0, i).join(".")} is a list of ${here.length} and has no place ${key}`;
    } else if (!isObject(here)) return `${path.slice(0, i).join(".")} is a value and has no keys`;
    const holder = here as Record<string, unknown>;
    const next = last ? value : Object.hasOwn(holder, key) && holder[key] !== null ? holder[key] : {};
    // defineProperty keeps a key named __proto__ a plain key
    Object.defineProperty(holder, key, { value: next, enumerable: true, writable: true, configurable: true });
    here = next;
  }
  return undefined;
}

/** Deletes the value at a path. */
export function deletePath(root: unknown, path: Path): void {
  const holder = valueAt(root, path.slice(0, -1));
  if (isObject(holder)) delete holder[path.at(-1)!];
}

/** Returns a deep copy. */
export const copy = (value: Record<string, unknown>): Record<string, unknown> => structuredClone(value);

function lay(root: Record<string, unknown>, set: string): readonly string[] | string {
  const eq = set.indexOf("=");
  const path = set.slice(0, Math.max(0, eq)).trim().split(".");
  if (eq < 0) return `"${set}" has no =`;
  if (path.some((key) => !key)) return `"${set}" has no key before =`;
  const doc = parse(set.slice(eq + 1), new LineCounter());
  if (typeof doc === "string") return doc;
  const error = doc.errors[0] ?? doc.warnings[0];
  if (error) return `the value is not YAML: ${say(error)}`;
  try {
    return setPath(root, path, doc.toJS({ maxAliasCount: 100 })) ?? path;
  } catch (e) {
    return e instanceof Error ? e.message : String(e);
  }
}

/** The limit of keys, values and items of a job: far above real jobs, and parsed in well under a second. */
const NODES = 2 ** 15;
const DEPTH = 100;

/** Returns why a text is too large to parse: too many nodes, or nesting that is too deep. */
function excess(text: string): string | undefined {
  let [nodes, depth] = [0, 0];
  for (const token of new Lexer().lex(text)) {
    const kind = token[0] ?? "";
    // the lexer marks a scalar with the control character U+001F
    if ("\u001f-?:[{&*!".includes(kind)) nodes++;
    if (kind === "[" || kind === "{") depth++;
    else if (kind === "]" || kind === "}") depth--;
    if (depth > DEPTH) return `the text nests more than ${DEPTH} brackets deep`;
    if (nodes > NODES) return `the text has more than ${NODES} keys and values`;
  }
  return undefined;
}

/** Finds duplicate keys. The check of the yaml package has quadratic cost. */
function duplicates(doc: Document.Parsed): Node[] {
  const found: Node[] = [];
  visit(doc, {
    Map(_, { items }) {
      const seen = new Set<string>();
      for (const { key } of items) {
        if (!isScalar(key)) continue;
        const name = String(key.value);
        if (seen.has(name)) found.push(key);
        seen.add(name);
      }
    },
  });
  return found;
}

function parse(text: string, lineCounter: LineCounter): Document.Parsed | string {
  const why = excess(text);
  if (why !== undefined) return why;
  try {
    return parseDocument(text, { lineCounter, prettyErrors: false, uniqueKeys: false });
  } catch {
    return "the text is nested too deeply"; // the parser is recursive and throws only on stack overflow
  }
}

function byYaml(e: YAMLError): readonly [Fault, string] {
  switch (e.code) {
    case "MULTIPLE_DOCS":
      return [textFaults.documents, "keep one job in each file"];
    case "BAD_ALIAS":
    case "ALIAS_PROPS":
    case "MULTIPLE_ANCHORS":
      return [textFaults.alias, "write the value instead, or define the anchor with & before its use"];
    case "TAB_AS_INDENT":
      return [textFaults.syntax, "indent with spaces"];
    case "RESOURCE_EXHAUSTION":
      return [textFaults.syntax, "nest less deeply"];
    default:
      return [textFaults.syntax, "correct the line at the caret; a bracket, a quote or the space after a colon may be missing"];
  }
}

/** What is wrong, by the parser's code. A code without an entry keeps the parser's first line. */
const yamlFaults: Partial<Record<YAMLError["code"], string>> = {
  BAD_ALIAS: "the alias has no name, or names no anchor",
  BAD_COLLECTION_TYPE: "the tag does not fit the value",
  BAD_DQ_ESCAPE: "the text in double quotes has an invalid escape; \\\\ is a backslash",
  BAD_INDENT: "the indentation does not fit the lines above",
  BAD_SCALAR_START: "a value cannot begin with this character; put it in quotes",
  BLOCK_AS_IMPLICIT_KEY: "a second colon in a line: a value that contains a colon and a space must be in quotes",
  BLOCK_IN_FLOW: "a list or map of several lines inside brackets",
  IMPOSSIBLE: "this text has no meaning in YAML",
  MISSING_CHAR: "a character is missing here: a closing bracket or quote, a comma, or the space after a colon",
  MULTILINE_IMPLICIT_KEY: "a line without a colon where a key is expected",
  MULTIPLE_DOCS: "a second document begins here",
  TAB_AS_INDENT: "a tab is used as indentation",
  UNEXPECTED_TOKEN: "unexpected text",
  TAG_RESOLVE_FAILED: "the tag is not known",
};
const say = (e: YAMLError): string => yamlFaults[e.code] ?? e.message.split("\n")[0] ?? e.code;

/** Merges two YAML maps key by key; the second has precedence. */
export function mergeYaml(under: string, over: string): Record<string, unknown> {
  const merge = (a: unknown, b: unknown): unknown => {
    if (!isObject(a) || !isObject(b)) return b;
    return { ...a, ...Object.fromEntries(Object.entries(b).map(([key, value]) => [key, merge(a[key], value)])) };
  };
  return merge(parseYaml(under), parseYaml(over)) as Record<string, unknown>;
}
