/** docs/glossary.md holds: one exported type per name, and no retired word is an identifier. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { root } from "../support/checkout.ts";

const files = ["schemas", "src", "runtime"].flatMap((folder) =>
  readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => /\.tsx?$/.test(name))
    .map((name) => ({ path: join(folder, name), text: readFileSync(join(root, folder, name), "utf8") })),
);

/** The words in backticks of the last column of each table. */
const retired = new Set(
  readFileSync(join(root, "docs/glossary.md"), "utf8")
    .split("\n")
    .filter((line) => line.startsWith("| "))
    .flatMap((line) => [...line.split("|")[3]!.matchAll(/`(\w+)`/g)].map((match) => match[1]!)),
);

test("no two files export a type of the same name", () => {
  const exporters = new Map<string, string[]>();
  for (const { path, text } of files)
    for (const [, name] of text.matchAll(/^export (?:declare )?(?:abstract )?(?:interface|type|class) (\w+)/gm))
      exporters.set(name!, [...(exporters.get(name!) ?? []), path]);
  expect(exporters.size).toBeGreaterThan(100);
  expect([...exporters].filter(([, from]) => from.length > 1)).toEqual([]);
});

test("no identifier is a retired word", async () => {
  expect(retired.size).toBeGreaterThan(40);
  expect(await identifiersOf("const letters = owes; // text\n", new Set(["owes", "text"]))).toEqual(["owes"]);
  const word = new RegExp(`\\b(${[...retired].join("|")})\\b`);
  const found: string[] = [];
  // comments and strings may have the word: the few files with one are parsed
  for (const { path, text } of files)
    if (word.test(text)) found.push(...(await identifiersOf(text, retired)).map((name) => `${path}: ${name}`));
  expect(found).toEqual([]);
});

/** Those of these words that are identifiers of a source. */
async function identifiersOf(text: string, words: ReadonlySet<string>): Promise<string[]> {
  const { ts } = await import("ts-morph");
  const found = new Set<string>();
  const visit = (node: import("ts-morph").ts.Node): void => {
    if (ts.isIdentifier(node) && words.has(node.text)) found.add(node.text);
    ts.forEachChild(node, visit);
  };
  visit(ts.createSourceFile("source.ts", text, ts.ScriptTarget.Latest));
  return [...found];
}
