/** `check --print`: the keys of a job from all its files, and where each value comes from. */
import { Document, isScalar, isSeq, visit } from "yaml";
import type { Job } from "../../schemas/job.ts";
import type { At } from "./diagnostic.ts";
import { isObject, merge, type Path, type Source, valueAt } from "./source.ts";

/** A job with all its files merged. */
export interface ResolvedJob {
  readonly value: unknown;
  /** The origin of each value, by its path: `file:line`, `--set …` or `default`, after `auto` where rankc chose it. A list has one origin. */
  readonly origins: Readonly<Record<string, string>>;
  /** Returns the job as YAML, with the origins as comments. */
  text(): string;
}

/** Returns the keys of a job that its files and `--set` write; with `complete`, also those that have their defaults. */
export function resolvedJob(source: Source, complete?: Job): ResolvedJob {
  const value = complete ? merge(complete, source.value) : source.value;
  const origins: Record<string, string> = {};
  for (const path of leavesOf(value, [])) {
    const name = path.join(".");
    const at = valueAt(source.value, path) === undefined ? undefined : source.at(path);
    const own = at ? originOf(at) : "default";
    origins[name] = source.chosen?.has(name) ? `auto, ${own}` : own;
  }
  return { value, origins, text: () => withComments(value, origins) };
}

const originOf = (at: At): string => ("set" in at ? `--set ${at.set}` : `${at.file}:${at.line}`);

/** Returns the paths of all values that are no maps, and of empty maps. */
const leavesOf = (value: unknown, path: Path): Path[] =>
  isObject(value) && Object.keys(value).length > 0
    ? Object.entries(value).flatMap(([key, inner]) => leavesOf(inner, [...path, key]))
    : [path];

/** Marks the beginning of an origin: a character that YAML escapes in values. */
const MARK = "\u0001";
/** The column of comments is not further to the right, for the sake of one long value. */
const WIDEST = 60;

function withComments(value: unknown, origins: Readonly<Record<string, string>>): string {
  const document = new Document(value);
  visit(document, {
    Pair: (_, { key, value: node }, ancestors) => {
      const keys = [
        ...ancestors.flatMap((a) => ("key" in a && isScalar(a.key) ? [String(a.key.value)] : [])),
        isScalar(key) ? key.value : "",
      ];
      const origin = origins[keys.join(".")];
      if (origin === undefined || !(isScalar(node) || isSeq(node))) return undefined;
      if (isSeq(node)) node.flow = true;
      node.comment = `${MARK}${origin.replace(/[\r\n]/g, " ")}`;
      return visit.SKIP;
    },
  });
  const lines = document.toString({ lineWidth: 0, flowCollectionPadding: false }).split("\n");
  const parts = lines.map((line) => line.split(` #${MARK}`));
  const column = Math.min(WIDEST, Math.max(...parts.map(([text = "", origin]) => (origin === undefined ? 0 : text.length))));
  return parts.map(([text = "", origin]) => (origin === undefined ? text : `${text.padEnd(column)}  # ${origin}`)).join("\n");
}
