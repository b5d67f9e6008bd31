/**
 * Edits of the YAML text of a job: sets, leaves out and renames keys. Everything else stays as it is written: comments, order, quotes, line ends. An
 * edit is returned only if the text then has exactly the changed values and all comments.
 */
import {
  type CST,
  type Document,
  isAlias,
  isMap,
  isScalar,
  isSeq,
  Lexer,
  type Node,
  type Pair,
  parseDocument,
  type Scalar,
  stringify,
  type YAMLMap,
} from "yaml";
import type { Finding } from "./diagnostic.ts";
import { deletePath, isObject, type Path, setPath, valueAt } from "./source.ts";

/** The replacement of the characters from `from` to before `to`. */
export interface TextEdit {
  readonly from: number;
  readonly to: number;
  readonly text: string;
}

/** The change of a fix. */
export type KeyChange = Pick<Finding, "set" | "leftOut" | "renamed">;
/** Returns the keys of a section in their order in the schema. It decides the line of a new key. */
export type KeysOf = (section: Path) => readonly string[];

/** Returns a text with a change of keys; undefined if no edit gives it: a value is shared through an anchor, or a comment would be lost. */
export function changedText(text: string, { set = {}, leftOut = [], renamed }: KeyChange, keysOf: KeysOf): string | undefined {
  let now: string | undefined = text;
  if (renamed)
    now = verified(text, rename(text, renamed.from, renamed.to.split("."), keysOf), (root) => moved(root, renamed.from, renamed.to));
  for (const [path, value] of Object.entries(set)) {
    if (now === undefined) return undefined;
    const keys = path.split(".");
    const before: string = now;
    const without = leftOut.includes(path) ? verified(before, leaveOut(before, keys), (root) => deletePath(root, keys)) : undefined;
    now = without ?? verified(before, put(before, keys, inFlow(value), keysOf), (root) => void setPath(root, keys, value));
  }
  return now;
}

/** Returns the one edit that turns a text into another. */
export function editBetween(before: string, after: string): TextEdit {
  const most = Math.min(before.length, after.length);
  let from = 0;
  while (from < most && before[from] === after[from]) from++;
  let same = 0;
  while (same < most - from && before[before.length - 1 - same] === after[after.length - 1 - same]) same++;
  let [to, text] = [before.length - same, after.slice(from, after.length - same)];
  // a new line begins where a line begins, rather than behind an indentation that both share
  while (from === to && from > 0 && before[from - 1] !== "\n" && text.at(-1) === before[from - 1]) {
    text = text.slice(-1) + text.slice(0, -1);
    from = to = from - 1;
  }
  return { from, to, text };
}

const applied = (text: string, { from, to, text: by }: TextEdit): string => text.slice(0, from) + by + text.slice(to);

/** Returns the edited text if it has the values that `change` makes of the text's values, and its comments. */
function verified(
  text: string,
  edits: readonly TextEdit[] | undefined,
  change: (root: Record<string, unknown>) => void,
): string | undefined {
  if (!edits) return undefined;
  // the last place first, so that offsets stay right
  const edited = edits.toSorted((a, b) => b.from - a.from).reduce(applied, text);
  const [old, now] = [valuesOf(text), valuesOf(edited)];
  if (!old || !now) return undefined;
  const expected = structuredClone(old);
  change(expected);
  return isEqual(now, expected) && isEqual(commentsOf(edited), commentsOf(text)) ? edited : undefined;
}

/** Returns the values of a text; undefined if it is not a map, or an alias cannot be expanded. */
function valuesOf(text: string): Record<string, unknown> | undefined {
  try {
    const values: unknown = parsed(text)?.toJS({ maxAliasCount: 100 });
    return isObject(values) ? values : undefined;
  } catch {
    return undefined;
  }
}

/** Returns the comments of a text, sorted. */
const commentsOf = (text: string): string[] => [...new Lexer().lex(text)].filter((token) => token.startsWith("#")).sort();

function isEqual(a: unknown, b: unknown): boolean {
  if (Array.isArray(a) && Array.isArray(b)) return a.length === b.length && a.every((item, i) => isEqual(item, b[i]));
  if (!isObject(a) || !isObject(b)) return a === b;
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => Object.hasOwn(b, key) && isEqual(a[key], b[key]));
}

function parsed(text: string): Document.Parsed | undefined {
  const doc = parseDocument(text, { keepSourceTokens: true, uniqueKeys: false });
  return doc.errors.length + doc.warnings.length > 0 ? undefined : doc;
}

type Entry = Pair<Node, Node | null>;
type Section = YAMLMap<Node, Node | null>;

/** Where a path leads: its last map, and the pair or item there; `rest` are the keys that are not written. */
interface Spot {
  readonly section?: Section;
  readonly entry?: Entry;
  readonly node: Node | null;
  readonly rest: readonly string[];
}

/** Follows a path as far as it is written; undefined if it leads through an alias, whose value other keys share. */
function spotOf(doc: Document, path: readonly string[]): Spot | undefined {
  let spot: Spot = { node: doc.contents as Node | null, rest: path };
  for (const [i, key] of path.entries()) {
    const { node } = spot;
    if (isAlias(node)) return undefined;
    if (isMap<Node, Node | null>(node)) {
      const entry = node.items.find((pair) => isScalar(pair.key) && String(pair.key.value) === key);
      if (!entry) return { ...spot, section: node, rest: path.slice(i) };
      spot = { section: node, entry, node: entry.value, rest: path.slice(i + 1) };
      continue;
    }
    const item = isSeq<Node>(node) ? node.items[Number(key)] : undefined;
    if (!item) return spot;
    spot = { node: item, rest: path.slice(i + 1) };
  }
  return spot;
}

/** Returns the edits that write a value, given as YAML, at a path. */
function put(text: string, path: readonly string[], value: string, keysOf: KeysOf, comment = ""): TextEdit[] | undefined {
  const doc = parsed(text);
  const spot = doc && spotOf(doc, path);
  if (!spot) return undefined;
  const { entry, node, section, rest } = spot;
  const [first] = rest;
  // the sections that are not written yet become one line
  const nested = (keys: readonly string[]): string => keys.reduceRight((inner, key) => `{${inFlow(key)}: ${inner}}`, value);
  if (first !== undefined && isMap(node)) {
    const order = keysOf(path.slice(0, path.length - rest.length));
    return insert(text, (section ?? node) as Section, inFlow(first), nested(rest.slice(1)), order, comment);
  }
  if (comment !== "") return undefined;
  const isEmpty = !node?.range || node.range[0] === node.range[1];
  if (isEmpty) return entry && fill(entry, nested(rest));
  if (first !== undefined && !(isScalar(node) && node.value === null)) return undefined;
  return replacement(text, node, nested(rest));
}

/** Writes a value after the colon of an entry that has none. */
function fill(entry: Entry, value: string): TextEdit[] | undefined {
  const { sep = [] } = (entry.srcToken ?? {}) as { readonly sep?: readonly CST.SourceToken[] };
  const colon = sep.find(({ type }) => type === "map-value-ind");
  const end = entry.key.range?.[1];
  if (colon) return [{ from: colon.offset + 1, to: colon.offset + 1, text: ` ${value}` }];
  return end === undefined ? undefined : [{ from: end, to: end, text: `: ${value}` }];
}

/** Replaces a value, in the quotes that it has. */
function replacement(text: string, node: Node, value: string): TextEdit[] {
  const from = node.range?.[0] ?? 0;
  const end = endOf(text, node);
  const by = isScalar(node) ? quotedLike(node, value) : value;
  return [{ from, to: end, text: by }, ...columnEdits(text, end, by.length - (end - from))];
}

/** Keeps the column of the comment behind a place whose line grows by `growth` characters, where there is room. */
function columnEdits(text: string, place: number, growth: number): TextEdit[] {
  const [, spaces] = /^( {2,})#/.exec(text.slice(place, lineEnd(text, place))) ?? [];
  if (spaces === undefined) return [];
  return [{ from: place, to: place + Math.max(0, Math.min(growth, spaces.length - 1)), text: " ".repeat(Math.max(0, -growth)) }];
}

function quotedLike({ type, value: before }: Scalar, value: string): string {
  if (typeof before !== "string" || !/^[\w.-]+$/.test(value) || typeof parsed(value)?.toJS() !== "string") return value;
  return type === "QUOTE_DOUBLE" ? `"${value}"` : type === "QUOTE_SINGLE" ? `'${value}'` : value;
}

/** Writes a new key into a section: behind the written key that comes before it in `order`, else at the end. */
function insert(
  text: string,
  section: Section,
  key: string,
  value: string,
  order: readonly string[],
  comment: string,
): TextEdit[] | undefined {
  const place = order.indexOf(key);
  const placed = section.items.map((entry) => ({ entry, place: order.indexOf(isScalar(entry.key) ? String(entry.key.value) : "") }));
  const before = placed.filter((one) => one.place >= 0 && one.place < place).sort((a, b) => b.place - a.place);
  const neighbour = (before[0] ?? placed.at(-1))?.entry;
  // a job in JSON stays JSON
  const name = neighbour && isScalar(neighbour.key) ? quotedLike(neighbour.key, key) : key;
  if (section.flow) {
    if (comment !== "") return undefined;
    const from = neighbour ? endOfEntry(text, neighbour) : (section.range?.[0] ?? 0) + 1;
    return [{ from, to: from, text: neighbour ? `, ${name}: ${value}` : `${name}: ${value}` }];
  }
  const start = neighbour?.key.range?.[0];
  if (!neighbour || start === undefined) return undefined;
  const indent = text.slice(lineStart(text, start), start).replace(/[^ ]/g, " ");
  const from = lineEnd(text, endOfEntry(text, neighbour));
  return [{ from, to: from, text: `${text.includes("\r\n") ? "\r\n" : "\n"}${indent}${name}: ${value}${comment}` }];
}

/** Returns the edits that remove a key with its lines; undefined if a comment stands there, or no other key is left in the section. */
function leaveOut(text: string, path: readonly string[]): TextEdit[] | undefined {
  const doc = parsed(text);
  const spot = doc && spotOf(doc, path);
  const { section, entry } = spot ?? {};
  const start = entry?.key.range?.[0];
  if (!section || !entry || spot?.rest.length !== 0 || start === undefined) return undefined;
  const i = section.items.indexOf(entry);
  if (section.flow) {
    const previous = section.items[i - 1];
    const next = section.items[i + 1]?.key.range?.[0];
    if (previous) return [{ from: endOfEntry(text, previous), to: endOfEntry(text, entry), text: "" }];
    return [{ from: start, to: next ?? endOfEntry(text, entry), text: "" }];
  }
  const from = lineStart(text, start);
  if (section.items.length === 1 || text.slice(from, start).trim() !== "") return undefined;
  const end = lineEnd(text, endOfEntry(text, entry));
  const isLast = text.indexOf("\n", end) < 0;
  // the last line of a text without a final newline takes the newline before it along
  return [isLast ? { from: Math.max(0, from - 1), to: text.length, text: "" } : { from, to: text.indexOf("\n", end) + 1, text: "" }];
}

/** Returns the edits that give a key another name, or move it with its value and comment into another section. */
function rename(text: string, from: Path, to: readonly string[], keysOf: KeysOf): TextEdit[] | undefined {
  const keys = from.map(String);
  const doc = parsed(text);
  const spot = doc && spotOf(doc, keys);
  const range = spot?.entry?.key.range;
  if (!spot?.entry || !range || spot.rest.length > 0 || !isScalar(spot.entry.key)) return undefined;
  if (keys.slice(0, -1).join("\0") === to.slice(0, -1).join("\0")) return renamedKey(text, spot.entry, range, to.at(-1) ?? "");
  const value = spot.node?.range ? text.slice(spot.node.range[0], endOf(text, spot.node)) : "";
  if (value.includes("\n")) return undefined;
  const end = endOfEntry(text, spot.entry);
  const [comment = ""] = /^[ \t]+#[^\r\n]*/.exec(text.slice(end, lineEnd(text, end))) ?? [];
  const written = put(text, to, value, keysOf, spot.section?.flow ? "" : comment);
  const removed = leaveOut(text, keys);
  return written && removed && [...written, ...removed];
}

function renamedKey(text: string, entry: Entry, [from, end]: readonly number[], name: string): TextEdit[] {
  const by = quotedLike(entry.key as Scalar, inFlow(name));
  const to = end ?? from ?? 0;
  return [{ from: from ?? 0, to, text: by }, ...columnEdits(text, endOfEntry(text, entry), by.length - (to - (from ?? 0)))];
}

/** Does to values what `rename` does to their text. */
function moved(root: Record<string, unknown>, from: Path, to: string): void {
  const value = valueAt(root, from);
  deletePath(root, from);
  setPath(root, to.split("."), value);
}

/** Returns the place behind a value, without the comments and line ends that follow it. */
function endOf(text: string, node: Node): number {
  if (isMap<Node, Node | null>(node) && !node.flow && node.items.length > 0) return endOfEntry(text, node.items.at(-1)!);
  if (isSeq<Node>(node) && !node.flow && node.items.length > 0) return endOf(text, node.items.at(-1)!);
  const [from = 0, to = 0] = node.range ?? [];
  return from + text.slice(from, to).trimEnd().length;
}

function endOfEntry(text: string, entry: Entry): number {
  const { sep = [] } = (entry.srcToken ?? {}) as { readonly sep?: readonly CST.SourceToken[] };
  const colon = sep.find(({ type }) => type === "map-value-ind");
  const key = Math.max(entry.key.range?.[1] ?? 0, colon ? colon.offset + 1 : 0);
  return entry.value?.range && entry.value.range[0] !== entry.value.range[1] ? Math.max(key, endOf(text, entry.value)) : key;
}

const lineStart = (text: string, at: number): number => text.lastIndexOf("\n", at - 1) + 1;

function lineEnd(text: string, at: number): number {
  const end = text.indexOf("\n", at);
  if (end < 0) return text.length;
  return text[end - 1] === "\r" ? end - 1 : end;
}

/** Formats a value as YAML on one line that may stand inside brackets. */
function inFlow(value: unknown): string {
  const text = stringify([value], { collectionStyle: "flow", flowCollectionPadding: false, lineWidth: 0 }).trim().slice(1, -1);
  // 1e-8 is a text in YAML 1.1
  return typeof value === "number" ? text.replace(/^(-?\d+)(e[-+]?\d+)$/, "$1.0$2") : text;
}
