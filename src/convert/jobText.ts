/** Writes a job in its shortest form: keys that differ from rankc's defaults, each with a comment on its source, in the order of docs/job.md. */
import { isDeepStrictEqual } from "node:util";
import { Document, isCollection, isMap, isPair, isScalar, type YAMLMap } from "yaml";
import { completeJob, JobText } from "../../schemas/job.ts";
import { schemaPath } from "./schemaPath.ts";

/** A key of the job with its comment. */
export interface CommentedKey {
  /** As in "model.moe.experts". */
  readonly key: string;
  readonly value: unknown;
  readonly comment: string;
  /** The text has the key although it has its default. */
  readonly isKept?: boolean;
}

/** The job as text, and its keys. */
export interface WrittenJob {
  readonly text: string;
  /** The keys in the text; all others have rankc's default. */
  readonly kept: readonly CommentedKey[];
}

const sections = ["name", "model", "parallel", "train", "data", "cluster"];

/** Keys whose default depends on another key: they stay, so that a change of the other one does not change them. */
const stays = new Set(["model.ffn", "model.rope.scaling.original_seq", "train.global_batch"]);

type Tree = { [key: string]: unknown };

const isTree = (value: unknown): value is Tree => typeof value === "object" && value !== null && !Array.isArray(value);

/** Returns the keys as one object. */
function nested(keys: readonly CommentedKey[]): Tree {
  const root: Tree = {};
  for (const { key, value } of keys) {
    const path = key.split(".");
    const last = path.pop();
    let at = root;
    for (const part of path) {
      const inner = at[part];
      const next: Tree = isTree(inner) ? inner : {};
      at[part] = next;
      at = next;
    }
    if (last !== undefined) at[last] = value;
  }
  return root;
}

/** Removes each key without which the job is the same. */
function withoutDefaults(keys: readonly CommentedKey[]): readonly CommentedKey[] {
  const all = JobText.safeParse(nested(keys));
  if (!all.success) return keys;
  const complete = completeJob(all.data);
  let kept = keys;
  for (const key of keys) {
    if (stays.has(key.key) || key.isKept) continue;
    const fewer = kept.filter((other) => other !== key);
    const { data } = JobText.safeParse(nested(fewer));
    if (data && isDeepStrictEqual(completeJob(data), complete)) kept = fewer;
  }
  return kept;
}

/** Writes a job. `notes` stand above it, below the line by which editors find the schema. */
export function writeJob(keys: readonly CommentedKey[], notes: readonly string[], schema: string = schemaPath): WrittenJob {
  const kept = withoutDefaults(keys);
  const tree = nested(kept);
  const document = new Document(Object.fromEntries(sections.flatMap((name) => (name in tree ? [[name, tree[name]] as const] : []))));
  const comments = new Map(kept.map(({ key, comment }) => [key, comment]));
  if (isMap(document.contents)) comment(document.contents, [], comments);
  const head = [` yaml-language-server: $schema=${oneLine(schema)}`, ...notes.map((note) => ` ${oneLine(note)}`)]
    .map((line) => `#${line}`)
    .join("\n");
  const body = document.toString({ lineWidth: 0, flowCollectionPadding: false });
  // readers of YAML 1.1 take 1e-5 for a text, and 1.0e-5 for a number
  return { text: `${head}\n${body.replace(/^( *\w+: -?\d+)(e-\d+)(?= #|$)/gm, "$1.0$2")}`, kept };
}

// a line break ends a YAML comment
const oneLine = (text: string): string => text.replace(/\p{Cc}/gu, " ");

/** Formats small numbers with an exponent: 0.00001 as 1e-5. */
const isTiny = (value: number): boolean => value !== 0 && Math.abs(value) < 1e-3;

/** Sets the comments of a map, and the blank lines between sections. */
function comment(map: YAMLMap, path: readonly string[], comments: ReadonlyMap<string, string>): void {
  for (const pair of map.items) {
    if (!isPair(pair) || !isScalar(pair.key)) continue;
    const here = [...path, String(pair.key.value)];
    const text = comments.get(here.join("."));
    const { value } = pair;
    if (path.length === 0 && here[0] !== "name") pair.key.spaceBefore = true;
    if (isScalar(value)) {
      if (typeof value.value === "number" && isTiny(value.value)) value.format = "EXP";
      if (text !== undefined && text !== "") value.comment = ` ${oneLine(text)}`;
    } else if (isMap(value) && text === undefined) {
      comment(value, here, comments);
    } else if (isCollection(value)) {
      value.flow = true;
      if (text !== undefined && text !== "") value.comment = ` ${oneLine(text)}`;
    }
  }
}
