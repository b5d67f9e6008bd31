/** The JSON Schema of jobs in the yaml-language-server that editors use, over stdio: no false errors, hover, completion. */
import { type ChildProcess, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { Ajv } from "ajv";
import { afterAll, beforeAll, expect, test } from "vitest";
import {
  type CompletionList,
  createProtocolConnection,
  type Diagnostic,
  type Hover,
  type ProtocolConnection,
  StreamMessageReader,
  StreamMessageWriter,
} from "vscode-languageserver/node";
import { keyExamples } from "../../schemas/job/keyExamples.ts";
import { valueTexts } from "../../schemas/job/valueTexts.ts";
import { jobSchema } from "../../schemas/jobSchema.ts";
import { root } from "../support/checkout.ts";

const require = createRequire(import.meta.url);
let server: ChildProcess;
let client: ProtocolConnection;
const waiting = new Map<string, (found: Diagnostic[]) => void>();

beforeAll(async () => {
  server = spawn(process.execPath, [require.resolve("yaml-language-server/bin/yaml-language-server"), "--stdio"]);
  if (!server.stdout || !server.stdin) throw new Error("the server has no pipes");
  client = createProtocolConnection(new StreamMessageReader(server.stdout), new StreamMessageWriter(server.stdin));
  client.onNotification("textDocument/publishDiagnostics", ({ uri, diagnostics }: { uri: string; diagnostics: Diagnostic[] }) =>
    waiting.get(uri)?.(diagnostics),
  );
  const settings = { yaml: { validate: true, hover: true, completion: true, schemaStore: { enable: false } } };
  client.onRequest("workspace/configuration", ({ items }: { items: readonly { section?: string }[] }) =>
    items.map(({ section }) => (section === "yaml" ? settings.yaml : null)),
  );
  client.listen();
  await client.sendRequest("initialize", { processId: process.pid, rootUri: null, capabilities: { workspace: { configuration: true } } });
  await client.sendNotification("initialized", {});
  await client.sendNotification("workspace/didChangeConfiguration", { settings });
});
afterAll(() => {
  client.dispose();
  server.kill();
});

const uriOf = (name: string): string => pathToFileURL(join(root, "plans", name, "job.yaml")).href;
const textOf = (name: string): string => readFileSync(join(root, "plans", name, "job.yaml"), "utf8");

/** Opens a text in the place of a job of plans/ and returns its diagnostics. */
async function open(name: string, text: string): Promise<Diagnostic[]> {
  const uri = uriOf(name);
  const found = new Promise<Diagnostic[]>((resolve) => waiting.set(uri, resolve));
  await client.sendNotification("textDocument/didOpen", { textDocument: { uri, languageId: "yaml", version: 1, text } });
  return found;
}

test.each(readdirSync(join(root, "plans")))("plans/%s has no error", async (name) => {
  expect(await open(name, textOf(name))).toEqual([]);
});

const line = "# yaml-language-server: $schema=../../schemas/job.schema.json\n";

test("a missing key, an unknown key and a wrong value are errors; a job that extends another needs no key", async () => {
  const messages = async (name: string, text: string) =>
    (await open(`../plans/${name}`, line + text)).map(({ message }) => message).join("\n");
  expect(await messages("missing", "name: a\n")).toContain('Missing property "model"');
  expect(await messages("unknown", "extends: a.yaml\nnane: a\n")).toContain("nane");
  expect(await messages("wrong", "extends: a.yaml\ntrain: {precision: fp8}\n")).toContain("bf16");
  expect(await messages("derived", "extends: a.yaml\nmodel: {moe: {top_k: 1}}\n")).toBe("");
});

test("hover has the description of a key; completion has keys, and the words of a choice", async () => {
  await open("hovered", `${line}extends: a.yaml\nparallel: {tensor: 2}\ntrain:\n  precision: \n`);
  const textDocument = { uri: uriOf("hovered") };
  const hover = await client.sendRequest<Hover>("textDocument/hover", { textDocument, position: { line: 2, character: 13 } });
  expect(JSON.stringify(hover.contents)).toContain("ranks that share the attention");
  const labels = async (position: { line: number; character: number }) =>
    (await client.sendRequest<CompletionList>("textDocument/completion", { textDocument, position })).items.map(({ label }) => label);
  expect(await labels({ line: 4, character: 13 })).toEqual(expect.arrayContaining(["bf16", "fp32", "fp16"]));
  expect(await labels({ line: 5, character: 0 })).toEqual(expect.arrayContaining(["model", "data", "cluster", "allow"]));
  const device = await client.sendRequest<Hover>("textDocument/hover", { textDocument, position: { line: 2, character: 13 } });
  expect(JSON.stringify(device.contents)).toContain("Default: `1`");
  await open("empty", line);
  const atStart = { textDocument: { uri: uriOf("empty") }, position: { line: 1, character: 0 } };
  const { items } = await client.sendRequest<CompletionList>("textDocument/completion", atStart);
  const snippet = items.find(({ label }) => label === "job");
  expect(snippet?.insertText).toContain("world: ");
});

test("each named value of a key has a text, and each text a key", () => {
  const keys = new Set<string>();
  const visit = (schema: Record<string, unknown>, path: string): void => {
    if (Array.isArray(schema.enum)) {
      keys.add(path);
      expect(schema.enumDescriptions, path).toEqual(
        schema.enum.map((value: string) => valueTexts[path]?.[value] ?? `no text for ${value}`),
      );
    }
    const isMap = (value: unknown): value is Record<string, unknown> =>
      typeof value === "object" && value !== null && !Array.isArray(value);
    for (const inner of [schema.items, schema.anyOf].flat()) if (isMap(inner)) visit(inner, path);
    if (isMap(schema.properties))
      for (const [key, inner] of Object.entries(schema.properties)) if (isMap(inner)) visit(inner, path === "" ? key : `${path}.${key}`);
  };
  visit(jobSchema(), "");
  expect([...keys].toSorted()).toEqual(Object.keys(valueTexts).toSorted());
});

test("each example of a key is valid there", () => {
  for (const [path, examples] of Object.entries(keyExamples)) {
    let schema: Record<string, unknown> = jobSchema();
    for (const key of path.split(".")) {
      const variants = [schema, ...(Array.isArray(schema.anyOf) ? schema.anyOf : [])];
      schema = variants.flatMap((v) => v.properties?.[key] ?? [])[0];
      expect(schema, path).toBeDefined();
    }
    expect(schema.examples, path).toEqual(examples);
    const { markdownDescription: _, enumDescriptions: __, defaultSnippets: ___, ...plain } = schema;
    const isValid = new Ajv({ strict: false }).compile(plain);
    for (const example of examples) expect(isValid(example), `${path}: ${JSON.stringify(example)}`).toBe(true);
  }
});
