/** `rankc lsp`, by a client of the protocol over stdio. One server serves all tests. */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { afterAll, beforeAll, expect, test } from "vitest";
import {
  type CodeAction,
  type CompletionItem,
  createProtocolConnection,
  type Hover,
  type Location,
  type ProtocolConnection,
  type PublishDiagnosticsParams,
  StreamMessageReader,
  StreamMessageWriter,
} from "vscode-languageserver/node";
import { TextDocument } from "vscode-languageserver-textdocument";
import { contextAt } from "../../src/cli/lsp/yamlPath.ts";
import { root } from "../support/checkout.ts";
import { builtCli } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-lsp-"));
const uriOf = (name: string): string => pathToFileURL(join(folder, name)).href;
let server: ChildProcess;
let client: ProtocolConnection;
const published: PublishDiagnosticsParams[] = [];
const waiting: (() => void)[] = [];

beforeAll(async () => {
  server = spawn(process.execPath, [builtCli(), "lsp", "--stdio"], { stdio: ["pipe", "pipe", "inherit"] });
  if (!server.stdout || !server.stdin) throw new Error("the server has no pipes");
  client = createProtocolConnection(new StreamMessageReader(server.stdout), new StreamMessageWriter(server.stdin));
  client.onNotification("textDocument/publishDiagnostics", (params: PublishDiagnosticsParams) => {
    published.push(params);
    for (const wake of waiting.splice(0)) wake();
  });
  client.listen();
  const { capabilities } = await client.sendRequest<{ capabilities: object }>("initialize", {
    ...{ processId: process.pid, rootUri: null, capabilities: {} },
  });
  expect(capabilities).toMatchObject({ hoverProvider: true, definitionProvider: true });
  await client.sendNotification("initialized", {});
});

/** The last test of the file: the server ends by its own. */
afterAll(async () => {
  await client.sendRequest("shutdown");
  const ended = new Promise((resolve) => server.once("exit", resolve));
  await client.sendNotification("exit");
  expect(await ended).toBe(0);
  client.dispose();
  rmSync(folder, { recursive: true, force: true });
});

/** Waits for diagnostics of a version that fulfil a condition. */
async function diagnostics(uri: string, version: number, holds: (found: PublishDiagnosticsParams) => boolean = () => true) {
  for (;;) {
    const found = published.find((p) => p.uri === uri && p.version === version && holds(p));
    if (found) return found.diagnostics;
    await new Promise<void>((wake) => waiting.push(wake));
  }
}
const openJob = async (name: string, text: string) => {
  const uri = uriOf(name);
  await client.sendNotification("textDocument/didOpen", { textDocument: { uri, languageId: "yaml", version: 1, text } });
  return { uri, found: await diagnostics(uri, 1), document: TextDocument.create(uri, "yaml", 1, text) };
};
const codes = (found: readonly { code?: string | number }[]): unknown[] => found.map(({ code }) => code);

const job = `name: edited 😀
model:
  layers: 2
  hidden: 64
  heads: 4
  vocab: 256
  seq: 64
  moe: {experts: 4, top_k: 2, ffn: 96, router: {aux_coeff: 0.01}}
parallel: {world: 4, tensor: 2, expert: 4}
train: {global_batch: 4, steps: 20, optimizer: {lr: 3.0e-3}}
data: {path: corpus.txt}
cluster: {device: cpu}
`;

test("a finding is a diagnostic with code, severity, both places and a link; its fix is an edit that removes it", async () => {
  const { uri, found, document } = await openJob("job.yaml", job);
  expect(codes(found)).toEqual(["P104"]);
  const [diagnostic] = found;
  expect(diagnostic).toMatchObject({ severity: 1, source: "rankc", codeDescription: { href: expect.stringMatching(/^file:/) } });
  expect(diagnostic?.message).toMatch(/^expert and tensor parallelism need sequence parallelism: .*\nwhy: .*\nfix: /);
  expect(diagnostic?.relatedInformation?.map(({ location, message }) => [location.range.start.line, message])).toEqual([
    [8, "parallel.expert"],
    [8, "parallel.tensor"],
  ]);
  const actions = await client.sendRequest<CodeAction[]>("textDocument/codeAction", {
    ...{ textDocument: { uri }, range: diagnostic?.range, context: { diagnostics: found } },
  });
  const [fix] = actions.filter(({ kind }) => kind === "quickfix");
  expect(fix).toMatchObject({ title: "set parallel.sequence: true", diagnostics: [{ code: "P104" }] });
  const [edit] = fix?.edit?.changes?.[uri] ?? [];
  if (!edit) throw new Error("the fix has no edit");
  expect(TextDocument.applyEdits(document, [edit])).toBe(job.replace("tensor: 2,", "tensor: 2, sequence: true,"));
  await client.sendNotification("textDocument/didChange", {
    ...{ textDocument: { uri, version: 2 }, contentChanges: [{ range: edit.range, text: edit.newText }] },
  });
  expect(await diagnostics(uri, 2)).toEqual([]);
});

test("each keystroke has its diagnostics: texts that are no YAML, empty or no job, and columns in UTF-16", async () => {
  const { uri } = await openJob("typing.yaml", job);
  let version = 1;
  const type = async (text: string) => {
    version++;
    await client.sendNotification("textDocument/didChange", { textDocument: { uri, version }, contentChanges: [{ text }] });
    return diagnostics(uri, version);
  };
  expect(codes(await type("name: [\n"))).toEqual(["S001"]);
  expect(codes(await type(""))).toEqual(["S005"]);
  expect(codes(await type("\ufeff# nothing\r\n"))).toEqual(["S005"]);
  const misspelt = (await type(`{"😀": 1, nane: x}`)).find(({ message }) => JSON.stringify(message).includes("nane"));
  expect(misspelt).toMatchObject({ code: "S010", range: { start: { line: 0, character: 10 }, end: { character: 14 } } });
  for (const text of [job.slice(0, 40), job.slice(0, 200), "- a\n", "extends: nowhere.yaml\n", "extends: [a]\n", "extends: typing.yaml\n"])
    expect((await type(text)).length).toBeGreaterThan(0);
});

test("hover shows the description, the default or the value, and the finding; completion has the keys and words of the schema", async () => {
  const text = job.replace("layers: 2", "layers: two");
  const { uri } = await openJob("hover.yaml", text);
  const hover = async (line: number, character: number) => {
    const answer = await client.sendRequest<Hover | null>("textDocument/hover", { textDocument: { uri }, position: { line, character } });
    return answer && typeof answer.contents === "object" && "value" in answer.contents ? answer.contents.value : undefined;
  };
  expect(await hover(2, 4)).toMatch(/^\*\*model\.layers\*\*\n\ntransformer layers\n\n[\s\S]*S012/);
  expect(await hover(8, 22)).toContain("default: `1`\n\nvalue: `2`");
  expect(await hover(7, 60)).toContain("model.moe.router");
  expect(await hover(1, 0)).toContain("the transformer");
  const complete = async (appended: string) => {
    const now = job + appended;
    const opened = await openJob(`complete-${appended.length}.yaml`, now);
    const position = opened.document.positionAt(now.length);
    return client.sendRequest<CompletionItem[]>("textDocument/completion", { textDocument: { uri: opened.uri }, position });
  };
  const labels = async (appended: string) => (await complete(appended)).map(({ label }) => label);
  // name, model, parallel, train, data and cluster are written
  expect(await labels("")).toEqual(["extends", "allow"]);
  const nested = job.replace("cluster: {device: cpu}\n", "");
  expect(contextAt(`${nested}cluster:\n  `)).toEqual({ path: ["cluster"], typed: "" });
  expect(contextAt(`${nested}cluster: {nodes: 2, dev`)).toEqual({ path: ["cluster"], typed: "dev" });
  expect(contextAt("train:\n  optimizer:\n    type: ")).toEqual({ path: ["train", "optimizer"], key: "type", typed: "" });
  expect(contextAt("a: 1 # b")).toBeUndefined();
  const devices = await client.sendRequest<CompletionItem[]>("textDocument/completion", {
    ...{ textDocument: { uri: (await openJob("devices.yaml", "cluster:\n  device: ")).uri }, position: { line: 1, character: 10 } },
  });
  expect(devices.map(({ label }) => label)).toContain("h200-141gb");
});

test("a finding of a base file stands at extends, with its own place beside it; extends leads to the file", async () => {
  writeFileSync(join(folder, "base.yaml"), job);
  const { uri, found } = await openJob("derived.yaml", "name: derived\nextends: base.yaml\n");
  expect(found).toMatchObject([{ code: "P104", range: { start: { line: 1, character: 0 } } }]);
  expect(found[0]?.relatedInformation?.[0]?.location).toMatchObject({ uri: uriOf("base.yaml"), range: { start: { line: 8 } } });
  const position = { line: 1, character: 12 };
  const there = await client.sendRequest<Location>("textDocument/definition", { textDocument: { uri }, position });
  expect(there).toMatchObject({ uri: uriOf("base.yaml") });
  expect(await client.sendRequest("textDocument/definition", { textDocument: { uri }, position: { line: 0, character: 0 } })).toBeNull();
});

test("findings that need a compiled plan follow when typing rests, and an edit cancels them", async () => {
  const large = `name: large
model: {layers: 32, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8, vocab: 32000, seq: 2048}
train: {steps: 10, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`;
  const { uri, found } = await openJob("large.yaml", large);
  expect(found).toEqual([]);
  const later = await diagnostics(uri, 1, ({ diagnostics: all }) => all.length > 0);
  expect(later).toMatchObject([{ code: "C510", severity: 2 }]);
  for (const [version, text] of [
    [2, `${large}# a comment\n`],
    [3, job.replace("tensor: 2, ", "")],
  ] as const)
    await client.sendNotification("textDocument/didChange", { textDocument: { uri, version }, contentChanges: [{ text }] });
  expect(await diagnostics(uri, 3)).toEqual([]);
  expect(published.filter((p) => p.uri === uri && p.version === 2).flatMap((p) => p.diagnostics)).toEqual([]);
});

test("all jobs of plans/ that are valid have no error; source.fixAll offers nothing there", async () => {
  for (const name of ["deepseek-v3-1024gpu", "tiny-mixtral"]) {
    const { uri, found } = await openJob(`${name}.yaml`, readFileSync(join(root, "plans", name, "job.yaml"), "utf8"));
    expect(found.filter(({ severity }) => severity === 1)).toEqual([]);
    const range = { start: { line: 0, character: 0 }, end: { line: 100, character: 0 } };
    const context = { diagnostics: [], only: ["source.fixAll"] };
    expect(await client.sendRequest("textDocument/codeAction", { textDocument: { uri }, range, context })).toEqual([]);
  }
});

test("a YAML file that is no job has no findings, until it becomes one", async () => {
  const uri = uriOf("compose.yaml");
  const text = "services: {web: {image: a}}\n";
  await client.sendNotification("textDocument/didOpen", { textDocument: { uri, languageId: "yaml", version: 1, text } });
  const complete = { textDocument: { uri }, position: { line: 1, character: 0 } };
  expect(await client.sendRequest("textDocument/completion", complete)).toEqual([]);
  expect(published.filter((p) => p.uri === uri)).toEqual([]);
  const now = { textDocument: { uri, version: 2 }, contentChanges: [{ text: "model: {}\n" }] };
  await client.sendNotification("textDocument/didChange", now);
  expect((await diagnostics(uri, 2)).length).toBeGreaterThan(0);
});

test("a document without a file, one that is closed and an unknown request do no harm", async () => {
  await client.sendNotification("textDocument/didOpen", { textDocument: { uri: "untitled:a", languageId: "yaml", version: 1, text: job } });
  expect(codes(await diagnostics("untitled:a", 1))).toEqual(["P104"]);
  await client.sendNotification("textDocument/didClose", { textDocument: { uri: "untitled:a" } });
  const hover = { textDocument: { uri: "untitled:a" }, position: { line: 0, character: 0 } };
  expect(await client.sendRequest("textDocument/hover", hover)).toBeNull();
  await expect(client.sendRequest("rankc/unknown")).rejects.toMatchObject({ code: -32601 });
});
