/**
 * The language server: publishes the findings of a job at each change, those that need a compiled plan when typing rests; answers hover, completion,
 * definitions and code actions.
 */
import {
  type CodeAction,
  CodeActionKind,
  type CompletionItem,
  CompletionItemKind,
  type Connection,
  createConnection,
  type Hover,
  type Location,
  MarkupKind,
  type Position,
  StreamMessageReader,
  StreamMessageWriter,
  TextDocumentSyncKind,
  TextDocuments,
} from "vscode-languageserver/node";
import { TextDocument } from "vscode-languageserver-textdocument";
import type { Finding } from "../../frontend/diagnostic.ts";
import { fixJob } from "../../frontend/fixJob.ts";
import type { JobRead } from "../../frontend/readJob.ts";
import { valueAt } from "../../frontend/source.ts";
import { needsPrograms } from "../../rules/memory.ts";
import { actionsOf, baseAt, diagnosticsOf, editOf, fileOf, isJob, readDocument } from "./jobDocument.ts";
import { requestMemoryFindings } from "./memoryFindings.ts";
import { describe, isSection, keySchema, keysOf, wordsOf } from "./schemaText.ts";
import { contextAt, spotAt } from "./yamlPath.ts";

/** Milliseconds without an edit before a plan is compiled. */
const REST = 500;

/** What the server has of an open document. */
interface Open {
  readonly read: JobRead;
  readonly findings: readonly Finding[];
  /** Ends what waits or runs for this version. */
  readonly cancel: () => void;
}

/** Serves until the editor ends. Returns the exit code: 0 after `shutdown`, else 1. */
export function serveEditor(input: NodeJS.ReadableStream, output: NodeJS.WritableStream): Promise<number> {
  const connection = createConnection(new StreamMessageReader(input), new StreamMessageWriter(output));
  const documents = new TextDocuments(TextDocument);
  const open = new Map<string, Open>();
  let isShutDown = false;

  connection.onInitialize(() => ({
    serverInfo: { name: "rankc" },
    capabilities: {
      textDocumentSync: TextDocumentSyncKind.Incremental,
      hoverProvider: true,
      definitionProvider: true,
      completionProvider: { triggerCharacters: [" ", ":", "{", ","] },
      codeActionProvider: { codeActionKinds: [CodeActionKind.QuickFix, CodeActionKind.SourceFixAll] },
    },
  }));

  documents.onDidChangeContent(({ document }) => publishFindings(connection, open, document));
  documents.onDidClose(({ document: { uri } }) => {
    open.get(uri)?.cancel();
    open.delete(uri);
    void connection.sendDiagnostics({ uri, diagnostics: [] });
  });

  connection.onHover(({ textDocument: { uri }, position }) => {
    const document = documents.get(uri);
    const state = open.get(uri);
    return document && state && hoverAt(document, state, position);
  });
  connection.onDefinition(({ textDocument: { uri }, position }): Location | undefined => {
    const state = open.get(uri);
    return state && baseAt(state.read, uri, position.line, documents.get(uri)?.getText() ?? "");
  });
  connection.onCompletion(({ textDocument: { uri }, position }): CompletionItem[] => {
    const document = documents.get(uri);
    return document && open.has(uri) ? completionsAt(document, position) : [];
  });
  connection.onCodeAction(async ({ textDocument: { uri }, range, context: { only } }): Promise<CodeAction[]> => {
    const document = documents.get(uri);
    const state = open.get(uri);
    if (!document || !state) return [];
    const isWanted = (kind: string): boolean => only === undefined || only.some((asked) => kind === asked || kind.startsWith(`${asked}.`));
    return [
      ...(isWanted(CodeActionKind.QuickFix) ? actionsOf(state.findings, state.read, document, range) : []),
      ...(isWanted(CodeActionKind.SourceFixAll) ? await allFixes(document) : []),
    ];
  });
  connection.onShutdown(() => {
    isShutDown = true;
    for (const { cancel } of open.values()) cancel();
  });

  documents.listen(connection);
  connection.listen();
  return new Promise((resolve) => {
    const end = (): void => resolve(isShutDown ? 0 : 1);
    connection.onExit(end);
    input.once("end", end);
  });
}

/** Publishes the findings of a changed document: those of the text at once, those that need a compiled plan when typing rests. */
function publishFindings(connection: Connection, open: Map<string, Open>, document: TextDocument): void {
  const { uri, version } = document;
  const before = open.get(uri);
  before?.cancel();
  const text = document.getText();
  // editors send every YAML file; a job stays one while its keys are typed again
  if (!before && !isJob(text)) return;
  const read = readDocument(text, uri);
  const publish = (findings: readonly Finding[], cancel: () => void): void => {
    open.set(uri, { read, findings, cancel });
    void connection.sendDiagnostics({ uri, version, diagnostics: diagnosticsOf(findings, read, fileOf(uri)) });
  };
  const { job, findings } = read;
  if (!job || !needsPrograms(job)) {
    publish(findings, () => {});
    return;
  }
  let end = (): void => {};
  const timer = setTimeout(() => {
    end = requestMemoryFindings({ text, file: fileOf(uri) }, (more) => publish([...findings, ...more], () => {}));
  }, REST);
  publish(findings, () => {
    clearTimeout(timer);
    end();
  });
}

/** Returns the safe fixes of a document as one action, as `check --fix` applies them; none if there are none. */
async function allFixes(document: TextDocument): Promise<CodeAction[]> {
  const text = document.getText();
  const read = async (of: string): Promise<JobRead> => readDocument(of, document.uri);
  const { text: then } = await fixJob(text, { job: read, file: read });
  if (then === text) return [];
  const edit = { changes: { [document.uri]: [editOf(document, text, then)] } };
  return [{ title: "rankc: apply all safe fixes", kind: CodeActionKind.SourceFixAll, edit }];
}

function hoverAt(document: TextDocument, { read, findings }: Open, position: Position): Hover | undefined {
  const spot = spotAt(document.getText(), document.offsetAt(position));
  if (!spot) return undefined;
  const path = spot.path.join(".");
  const parts = [describe(spot.path)];
  const at = read.source.at(spot.path);
  const value = valueAt(read.job ?? read.source.value, spot.path);
  if (value !== undefined && typeof value !== "object") {
    const isElsewhere = at && !("set" in at) && at.file !== fileOf(document.uri);
    parts.push(`value: \`${JSON.stringify(value)}\`${isElsewhere ? `, from ${at.file}:${at.line}` : ""}`);
  }
  for (const { code, title, found, why, fix, path: of } of findings)
    if (of === path) parts.push(`**${code}: ${title}**\n\n${found}\n\n${why}\n\nfix: ${fix}`);
  const contents = parts.filter((part) => part !== undefined).join("\n\n");
  if (contents === "") return undefined;
  const range = { start: document.positionAt(spot.from), end: document.positionAt(spot.to) };
  return { contents: { kind: MarkupKind.Markdown, value: contents }, range };
}

function completionsAt(document: TextDocument, position: Position): CompletionItem[] {
  const text = document.getText();
  const offset = document.offsetAt(position);
  const context = contextAt(text.slice(0, offset));
  if (!context) return [];
  const { path, key } = context;
  const documentation = (of: readonly (string | number)[]) => ({ kind: MarkupKind.Markdown, value: describe(of) ?? "" });
  if (key !== undefined)
    return wordsOf(keySchema([...path, key]) ?? {}).map((word) => ({
      ...{ label: word, kind: CompletionItemKind.EnumMember, documentation: documentation([...path, key]) },
    }));
  const section = valueAt(readDocument(text, document.uri).source.value, path);
  const written = typeof section === "object" && section !== null ? Object.keys(section) : [];
  return keysOf(path)
    .filter(([name]) => !written.includes(name))
    .map(([name, schema]) => ({
      ...{ label: name, kind: isSection(schema) ? CompletionItemKind.Module : CompletionItemKind.Property },
      ...{ insertText: isSection(schema) ? `${name}:` : `${name}: `, documentation: documentation([...path, name]) },
    }));
}
