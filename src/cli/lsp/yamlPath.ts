/** Where a position of an editor lies in a job: the keys above it. */
import { isMap, isScalar, isSeq, type Node, type Pair, parseDocument } from "yaml";
import type { Path } from "../../frontend/source.ts";

/** A key or value at an offset. */
export interface Spot {
  readonly path: Path;
  /** The characters of the key, or of the value where the offset is on a value. */
  readonly from: number;
  readonly to: number;
}

/** Returns the innermost key or value at an offset of a text; undefined if there is none. */
export function spotAt(text: string, offset: number): Spot | undefined {
  let found: Spot | undefined;
  const covers = (node: Node | null | undefined): node is Node => {
    const [from = 0, to = -1] = node?.range ?? [];
    return from <= offset && offset <= to;
  };
  const descend = (node: Node | null, path: Path): void => {
    if (isMap<Node, Node | null>(node))
      for (const pair of node.items as Pair<Node, Node | null>[]) {
        const key = isScalar(pair.key) ? String(pair.key.value) : "";
        for (const part of [pair.key, pair.value]) {
          if (!covers(part)) continue;
          const here = [...path, key];
          if (part === pair.key || isScalar(part)) found = { path: here, from: part.range?.[0] ?? 0, to: part.range?.[1] ?? 0 };
          else descend(part, here);
        }
      }
    else if (isSeq<Node>(node))
      for (const [i, item] of node.items.entries())
        if (covers(item)) {
          found = { path: [...path, i], from: item.range?.[0] ?? 0, to: item.range?.[1] ?? 0 };
          descend(item, [...path, i]);
        }
  };
  descend(parseDocument(text, { uniqueKeys: false, logLevel: "silent" }).contents, []);
  return found;
}

/** What may be written at a position: a key of the section `path`, or the value of `key` there. */
export interface CursorContext {
  readonly path: Path;
  readonly key?: string;
  /** The characters that are typed already. */
  readonly typed: string;
}

/** Returns what may be written at the end of `before`, the text up to the cursor. It reads lines, because a text is rarely valid while it is typed. */
export function contextAt(before: string): CursorContext | undefined {
  const lines = before.split(/\r?\n/);
  const line = lines.pop() ?? "";
  if (/(^|\s)#/.test(line)) return undefined;
  const indent = line.length - line.trimStart().length;
  const path = keysAbove(lines, indent);
  // sections in braces on this line: each open brace belongs to the key before it
  const open = openBraces(line);
  const rest = line.slice(open.at).replace(/^\s*-\s+/, "");
  const value = /^\s*([\w.-]+)\s*:\s+(.*)$/.exec(open.keys.length > 0 ? (rest.split(",").at(-1) ?? "") : rest);
  const here = [...path, ...open.keys];
  if (value?.[1] !== undefined) return /[[\]"']/.test(value[2] ?? "") ? undefined : { path: here, key: value[1], typed: value[2] ?? "" };
  const typed = (open.keys.length > 0 ? (rest.split(",").at(-1) ?? "") : rest).trim();
  return /^[\w-]*$/.test(typed) ? { path: here, typed } : undefined;
}

/** Returns the keys of the sections around a line with this indentation. */
function keysAbove(lines: readonly string[], indent: number): string[] {
  const keys: string[] = [];
  let most = indent;
  for (const line of lines.toReversed()) {
    const [, spaces, key] = /^( *)([\w.-]+)\s*:\s*(?:#.*)?$/.exec(line) ?? [];
    const depth = line.length - line.trimStart().length;
    if (line.trim() === "" || line.trim().startsWith("#") || depth >= most) continue;
    most = depth;
    if (spaces !== undefined && key !== undefined) keys.unshift(key);
    if (depth === 0) break;
  }
  return keys;
}

/** Returns the keys whose braces are open at the end of a line, and the place behind the last open one. */
function openBraces(line: string): { readonly keys: string[]; readonly at: number } {
  const keys: string[] = [];
  const places: number[] = [];
  for (const [i, char] of [...line].entries()) {
    if (char === "{") {
      const [, key] = /([\w.-]+)\s*:\s*$/.exec(line.slice(0, i)) ?? [];
      keys.push(key ?? "");
      places.push(i + 1);
    } else if (char === "}") {
      keys.pop();
      places.pop();
    }
  }
  return { keys, at: places.at(-1) ?? 0 };
}
