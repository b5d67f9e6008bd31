/** Parses a YAML file into plain values with the place of every path. Errors of the text are findings; nothing throws. */
import {
  type Alias,
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

/** A job with the files that it builds on. */
export interface Source {
  readonly file: string;
  /** The values of all files, with every `--set` applied. */
  readonly value: unknown;
  /** The paths at which `null` took the place of a value of another file. */
  readonly cleared: readonly Path[];
  /** The length of the texts in characters. */
  readonly size: number;
  /** The paths of values that rankc has chosen in place of `auto`. */
  readonly chosen?: ReadonlySet<string>;
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
  base: fault(
    "S007",
    "the file that a job extends cannot be read",
    "Keys that the job does not write have the values of that file.",
    "extends: base.yaml\n",
  ),
  circle: fault(
    "S008",
    "a job extends itself",
    "Each file of a chain adds keys to the next, so that a chain needs an end.",
    "extends: job.yaml\n",
  ),
  auto: fault(
    "S009",
    "auto cannot be resolved",
    "The value of auto is that of the fastest plan that fits: rules, memory and the estimated step of cluster.device decide it.",
    "parallel: {world: 2, tensor: auto}\n",
  ),
} as const satisfies Record<string, Fault>;

/** A file of a job, parsed. */
export interface ParsedFile {
  readonly file: string;
  /** The map of keys; undefined if there are findings. */
  readonly value?: Record<string, unknown>;
  readonly findings: readonly Finding[];
  /** Finds the longest prefix of a path that the file has; undefined only for an empty text. */
  locate(path: readonly string[], part: "key" | "value"): Located | undefined;
}

/** The place of the longest written prefix of a path in a file. */
export interface Located {
  readonly at: SourceLocation;
  /** The number of keys of the prefix. */
  readonly depth: number;
  readonly isWhole: boolean;
  /** Whether a map stands there: keys of it may come from another file. */
  readonly isMap: boolean;
}

/** Returns the finding of a fault of a text. */
export const textFinding = (what: Fault, path: string, found: string, fix: string, at: At): Finding => ({
  ...{ code: what.code, level: "error", title: what.title, path, found, why: what.why, fix, at },
});

/** Parses a file of a job. */
export function parseFile(text: string, file: string): ParsedFile {
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
  const find = (what: Fault, found: string, fix: string, at: At) => findings.push(textFinding(what, "", found, fix, at));

  const doc = parse(text, lines);
  if (typeof doc === "string") {
    find(textFaults.syntax, doc, "a job has a few dozen keys: remove everything else", place(0, 1));
    return { file, findings, locate: () => undefined };
  }
  const reported = new Set<number>();
  for (const e of [...doc.errors, ...doc.warnings]) {
    const at = place(e.pos[0], e.pos[1]);
    // further errors of a line follow from its first one
    if (reported.has(at.line)) continue;
    reported.add(at.line);
    const [what, fix] = byYaml(e);
    find(what, say(e), fix, at);
  }
  for (const { range } of findings.length ? [] : duplicates(doc))
    find(textFaults.duplicate, "the key occurs twice in one map", "keep one of them", place(range?.[0] ?? 0, range?.[1] ?? 1));
  let value: unknown;
  if (!findings.length) {
    try {
      value = doc.toJS({ maxAliasCount: 100 });
    } catch {
      const loose = looseAlias(doc);
      const [from, to] = loose?.range ?? [0, 1];
      find(
        textFaults.alias,
        loose ? `the alias *${loose.source} has no anchor &${loose.source} before it` : "the aliases expand to too many values",
        "write the values without anchors and aliases",
        place(from, to),
      );
    }
  }
  if (!findings.length && !isObject(value))
    find(
      textFaults.root,
      value === null ? "an empty file" : `the file holds ${Array.isArray(value) ? "a list" : "one value"}`,
      "start with `name:`, `model:`, `train:` and `data:`",
      place(0, 1),
    );

  const locate: ParsedFile["locate"] = (path, part) => {
    if (!doc.contents) return undefined;
    const { node, pair, depth } = nodeAt(doc, path);
    const isWhole = depth === path.length;
    const written = isWhole && part === "value" && isScalar(node) && node.value !== null ? node : undefined;
    const range = (written ?? pair?.key ?? undefined)?.range;
    const isMapThere = isMap(isAlias(node) ? node.resolve(doc) : node);
    return { at: range ? place(range[0], range[1]) : place(0, 1), depth, isWhole, isMap: isMapThere };
  };
  return { file, findings, ...(isObject(value) && findings.length === 0 && { value }), locate };
}

/** The node at the longest written prefix of a path, the pair of the last map on the way, and the number of keys of the prefix. */
interface Found {
  readonly node: Node | null;
  readonly pair: Pair<Node, Node | null> | undefined;
  readonly depth: number;
}

/** Follows a path into a document. */
function nodeAt(doc: Document, path: readonly string[]): Found {
  let node = doc.contents as Node | null;
  let pair: Found["pair"];
  for (const [depth, key] of path.entries()) {
    const inner: unknown = isAlias(node) ? node.resolve(doc) : node;
    if (isMap<Node, Node | null>(inner)) {
      const next = inner.items.find((p) => isScalar(p.key) && String(p.key.value) === key);
      if (!next) return { node, pair, depth };
      pair = next;
      node = next.value;
      continue;
    }
    const item = isSeq<Node>(inner) ? inner.items[Number(key)] : undefined;
    if (!item) return { node, pair, depth };
    node = item;
  }
  return { node, pair, depth: path.length };
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

/** Parses the value of a `--set` option. Throws an Error that says what is wrong with it. */
export function parseValue(text: string): unknown {
  const doc = parse(text, new LineCounter());
  if (typeof doc === "string") throw new Error(doc);
  const error = doc.errors[0] ?? doc.warnings[0];
  if (error) throw new Error(`the value is not YAML: ${say(error)}`);
  return doc.toJS({ maxAliasCount: 100 });
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

/** Returns the first alias that names no anchor. */
function looseAlias(doc: Document.Parsed): Alias | undefined {
  let found: Alias | undefined;
  const anchors = new Set<string>();
  visit(doc, {
    Node(_, node) {
      if (isAlias(node)) {
        if (anchors.has(node.source)) return;
        found = node;
        return visit.BREAK;
      }
      if ("anchor" in node && typeof node.anchor === "string") anchors.add(node.anchor);
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

/** Merges two values map by map; the second has precedence. Lists are replaced as a whole. */
export function merge(under: unknown, over: unknown): unknown {
  if (!isObject(under) || !isObject(over)) return over;
  const merged = { ...under };
  // defineProperty keeps a key named __proto__ a plain key
  for (const [key, value] of Object.entries(over))
    Object.defineProperty(merged, key, {
      ...{ enumerable: true, writable: true, configurable: true },
      value: Object.hasOwn(under, key) ? merge(under[key], value) : value,
    });
  return merged;
}

/** Merges two YAML maps key by key; the second has precedence. */
export const mergeYaml = (under: string, over: string): Record<string, unknown> =>
  merge(parseYaml(under), parseYaml(over)) as Record<string, unknown>;
