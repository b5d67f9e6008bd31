/** A job in an editor: its findings as diagnostics, and its fixes as edits. */
import { dirname, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import {
  type CodeAction,
  CodeActionKind,
  type Diagnostic,
  DiagnosticSeverity,
  type Location,
  type Range,
  TextEdit,
} from "vscode-languageserver";
import type { TextDocument } from "vscode-languageserver-textdocument";
import type { At, Finding, SourceLocation } from "../../frontend/diagnostic.ts";
import { changedText, editBetween } from "../../frontend/keyEdits.ts";
import { type JobRead, readQuickly } from "../../frontend/readJob.ts";
import { keysAt } from "../../frontend/shapeFaults.ts";
import { root } from "../../packageFile.ts";
import { jobFiles } from "../jobFiles.ts";

/** Returns the path of a document; a document without a file has one in the current folder. */
export const fileOf = (uri: string): string => (uri.startsWith("file:") ? fileURLToPath(uri) : resolve("untitled.yaml"));

/** Whether a YAML text is a job: it names the schema of jobs, or has one of their sections. */
export const isJob = (text: string): boolean =>
  /^#.*\$schema=.*job\.schema\.json/m.test(text) || /^(model|parallel|train|cluster|extends)[ \t]*:/m.test(text);

/** Reads the text of a document by the rules that need no compiled plan. */
export const readDocument = (text: string, uri: string): JobRead => readQuickly(text, fileOf(uri), [], jobFiles([]));

/** The page that explains the codes. */
const docs = new URL("README.md", root).href;

/** Returns the findings as diagnostics of a document. A finding about another file stands at `extends`, with its own place as a related one. */
export function diagnosticsOf(findings: readonly Finding[], { source }: JobRead, file: string): Diagnostic[] {
  return findings.map((finding) => {
    const { at, related = [], code, level, title, found, why, fix } = finding;
    const isElsewhere = at !== undefined && !("set" in at) && at.file !== file;
    const here = isElsewhere ? source.at("extends", "key") : at;
    const places = [...(isElsewhere ? [{ ...at, label: title }] : []), ...related];
    return {
      ...{ range: rangeOf(here, file), code, source: "rankc", codeDescription: { href: docs } },
      severity: level === "error" ? DiagnosticSeverity.Error : DiagnosticSeverity.Warning,
      message: `${title}: ${found}\nwhy: ${why}\nfix: ${fix}`,
      relatedInformation: places.flatMap((place) =>
        "set" in place ? [] : [{ location: locationOf(place), message: place.label ?? title }],
      ),
    };
  });
}

function rangeOf(at: At | undefined, file: string): Range {
  if (!at || "set" in at || at.file !== file) return { start: { line: 0, character: 0 }, end: { line: 0, character: 1 } };
  return locationOf(at).range;
}

const locationOf = ({ file, line, col, endCol }: SourceLocation): Location => ({
  uri: pathToFileURL(file).href,
  range: { start: { line: line - 1, character: col - 1 }, end: { line: line - 1, character: endCol - 1 } },
});

/** Returns the fixes of findings that touch a range. A fix is offered if its finding is gone from the text with the edit. */
export function actionsOf(findings: readonly Finding[], read: JobRead, document: TextDocument, range: Range): CodeAction[] {
  const text = document.getText();
  const file = fileOf(document.uri);
  return findings.flatMap((finding): CodeAction[] => {
    const [diagnostic] = diagnosticsOf([finding], read, file);
    if (!diagnostic || !overlap(diagnostic.range, range) || !(finding.set ?? finding.renamed)) return [];
    const then = changedText(text, finding, keysAt);
    if (then === undefined || then === text) return [];
    const isGone = !readDocument(then, document.uri).findings.some(({ code, path }) => code === finding.code && path === finding.path);
    if (!isGone) return [];
    return [
      {
        ...{ title: titleOf(finding), kind: CodeActionKind.QuickFix, diagnostics: [diagnostic], isPreferred: finding.isSafe === true },
        edit: { changes: { [document.uri]: [editOf(document, text, then)] } },
      },
    ];
  });
}

const titleOf = ({ set = {}, renamed }: Finding): string =>
  renamed
    ? `rename ${renamed.from.join(".")} to ${renamed.to}`
    : `set ${Object.entries(set)
        .map(([path, value]) => `${path}: ${JSON.stringify(value)}`)
        .join(", ")}`;

/** Returns the edit of a document that gives it another text. */
export function editOf(document: TextDocument, text: string, then: string): TextEdit {
  const { from, to, text: by } = editBetween(text, then);
  return TextEdit.replace({ start: document.positionAt(from), end: document.positionAt(to) }, by);
}

const overlap = (a: Range, b: Range): boolean => !isBefore(a, b) && !isBefore(b, a);
const isBefore = (a: Range, b: Range): boolean =>
  a.end.line < b.start.line || (a.end.line === b.start.line && a.end.character < b.start.character);

/** Returns the file that `extends` names in a document, if the position is on that line. */
export function baseAt({ source }: JobRead, uri: string, line: number, text: string): Location | undefined {
  const at = source.at("extends", "value");
  if (!at || "set" in at || at.file !== fileOf(uri) || at.line !== line + 1) return undefined;
  const [, path] = /^extends:\s*["']?([^"'#\r\n]+?)["']?\s*(?:#.*)?$/.exec(text.split(/\r?\n/)[line] ?? "") ?? [];
  if (path === undefined) return undefined;
  return locationOf({ file: resolve(dirname(fileOf(uri)), path), line: 1, col: 1, endCol: 1, lineText: "" });
}
