/**
 * Merges the files of a job: the file that `extends` names, and the chain behind it, lies under a file; overlays (`-f`) lie over the job; `--set`
 * options come last. Each value keeps its place in the file that wrote it.
 */
import { posix } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import type { Finding } from "./diagnostic.ts";
import {
  copy,
  isObject,
  merge,
  type ParsedFile,
  type Path,
  parseFile,
  parseValue,
  type Source,
  setPath,
  textFaults,
  textFinding,
} from "./source.ts";

/** How the files beside a job are found. */
export interface JobFiles {
  /** The files over the job, in order: the last one has precedence. */
  readonly overlays: readonly string[];
  /** Returns the name of the file that `extends: path` in the file `from` means. */
  resolve(path: string, from: string): string;
  /** Returns the text of a file. Throws a Trouble. */
  read(file: string): string;
}

/** The files of a job that is a text alone. */
const noFiles: JobFiles = {
  overlays: [],
  resolve: (path, from) => posix.join(posix.dirname(from), path),
  read: (file) => {
    throw new Trouble(`${file} is not read: the job is a text without files beside it`, "leave out extends, or name the job by its file");
  },
};

/** The longest chain of files, each of which extends the next. */
const LONGEST = 32;

/** Reads the files of a job, and applies `--set` options. Throws a Trouble if an overlay cannot be read. */
export function readSource(
  text: string,
  file: string,
  sets: readonly string[] = [],
  files: JobFiles = noFiles,
): { source: Source; findings: readonly Finding[] } {
  const findings: Finding[] = [];
  const overlays = files.overlays.map((overlay) => ({ file: overlay, text: files.read(overlay) }));
  const texts = [{ file, text }, ...overlays];
  const parsed = texts.flatMap((one) => chainOf(one.text, one.file, files, findings));
  const cleared: Path[] = [];
  let value: Record<string, unknown> | undefined;
  if (!findings.length)
    for (const { value: over = {} } of parsed) {
      const { extends: _, ...keys } = over;
      if (value) clearedBy(value, keys, [], cleared);
      value = value ? (merge(value, keys) as Record<string, unknown>) : keys;
    }

  const written: { path: readonly string[]; set: string }[] = [];
  if (value && sets.length) {
    value = copy(value);
    for (const set of sets) {
      const problem = applySet(value, set);
      if (typeof problem === "string")
        findings.push(textFinding(textFaults.set, "", problem, "write --set path=value, for example --set model.layers=3", { set }));
      else written.unshift({ path: problem, set });
    }
  }

  const at: Source["at"] = (where, part = "value") => {
    const path = typeof where === "string" ? (where ? where.split(".") : []) : where.map(String);
    const set = written.find((w) => w.path.every((key, i) => path[i] === key));
    return set ? { set: set.set } : placeIn(parsed, path, part);
  };
  const size = parsed.reduce((sum, one) => sum + one.size, 0);
  return { source: { file, value, cleared, size, at }, findings };
}

interface SizedFile extends ParsedFile {
  readonly size: number;
}

/** Returns a file and those that it extends, the last one of the chain first. Adds the findings of all of them. */
function chainOf(text: string, file: string, files: JobFiles, findings: Finding[]): SizedFile[] {
  const chain: SizedFile[] = [];
  const names: string[] = [];
  let next: { text: string; file: string } | undefined = { text, file };
  while (next) {
    const { file: name, text: content }: { text: string; file: string } = next;
    const parsed = parseFile(content, name);
    chain.unshift({ ...parsed, size: content.length });
    names.push(name);
    findings.push(...parsed.findings);
    next = undefined;
    if (!parsed.value || !Object.hasOwn(parsed.value, "extends")) continue;
    const base = baseOf(parsed, names, files);
    if ("finding" in base) findings.push(base.finding);
    else next = base;
  }
  return chain;
}

/** Returns the file that a file extends, or the finding about it. `names`: the chain that leads to the file, with the file itself. */
function baseOf(
  { file, value, locate }: ParsedFile,
  names: readonly string[],
  files: JobFiles,
): { readonly file: string; readonly text: string } | { readonly finding: Finding } {
  const path = value?.extends;
  const at = locate(["extends"], "value")?.at ?? { file, line: 1, col: 1, endCol: 2, lineText: "" };
  const finding = (found: string, fix: string, fault: (typeof textFaults)["base" | "circle"] = textFaults.base) => ({
    finding: textFinding(fault, "extends", found, fix, at),
  });
  if (typeof path !== "string" || path.trim() === "") {
    const kind = Array.isArray(path)
      ? `a list of ${path.length}`
      : isObject(path)
        ? "a map"
        : path === null || String(path).trim() === ""
          ? "empty"
          : String(path);
    return finding(`extends is ${kind}`, "write the path of one file, relative to this one; the option -f lays more files over a job");
  }
  try {
    const base = files.resolve(path, file);
    if (names.includes(base)) {
      const circle = [...names.slice(names.indexOf(base)), base].join(" extends ");
      return finding(circle, "remove one of these extends", textFaults.circle);
    }
    if (names.length === LONGEST) return finding(`a chain of more than ${LONGEST} files`, "merge some of the files");
    return { file: base, text: files.read(base) };
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    return finding(error.message, error.fix ?? "check the path");
  }
}

/** Lists the paths of a map at which `over` has null in place of a value. */
function clearedBy(under: Record<string, unknown>, over: Record<string, unknown>, path: Path, cleared: Path[]): void {
  for (const [key, value] of Object.entries(over)) {
    const before = Object.hasOwn(under, key) ? under[key] : undefined;
    if (value === null && before !== undefined && before !== null) cleared.push([...path, key]);
    else if (isObject(value) && isObject(before)) clearedBy(before, value, [...path, key], cleared);
  }
}

/** Returns the place of a path: in the last file that has it, or else in the last of the files that have most of it. */
function placeIn(files: readonly ParsedFile[], path: readonly string[], part: "key" | "value"): ReturnType<Source["at"]> {
  let best: ReturnType<ParsedFile["locate"]>;
  for (const file of files.toReversed()) {
    const found = file.locate(path, part);
    if (!found) continue;
    if (!best || found.depth > best.depth) best = found;
    // what is not a map hides the values of the files below
    if (found.isWhole || !found.isMap) break;
  }
  return best?.at;
}

/** Applies a `--set` option. Returns its path, or what is wrong with it. */
function applySet(root: Record<string, unknown>, set: string): readonly string[] | string {
  const eq = set.indexOf("=");
  const path = set.slice(0, Math.max(0, eq)).trim().split(".");
  if (eq < 0) return `"${set}" has no =`;
  if (path.some((key) => !key)) return `"${set}" has no key before =`;
  if (path[0] === "extends") return "extends is read from files, before --set; the option -f lays a file over the job";
  try {
    return setPath(root, path, parseValue(set.slice(eq + 1))) ?? path;
  } catch (e) {
    return e instanceof Error ? e.message : String(e);
  }
}
