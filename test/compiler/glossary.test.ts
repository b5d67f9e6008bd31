/** docs/glossary.md holds: one exported type per name, and no retired word is an identifier. */
import { readFileSync } from "node:fs";
import { join, relative } from "node:path";
import { Node, Project } from "ts-morph";
import { expect, test } from "vitest";
import { root } from "../support/checkout.ts";

const project = new Project({ skipAddingFilesFromTsConfig: true });
project.addSourceFilesAtPaths(["schemas", "src", "runtime"].map((folder) => join(root, folder, "**/*.ts")));
const files = project.getSourceFiles();
const path = (file: (typeof files)[number]): string => relative(root, file.getFilePath());

/** The words in backticks of the last column of each table. */
const retired = new Set(
  readFileSync(join(root, "docs/glossary.md"), "utf8")
    .split("\n")
    .filter((line) => line.startsWith("| "))
    .flatMap((line) => [...line.split("|")[3]!.matchAll(/`(\w+)`/g)].map((match) => match[1]!)),
);

test("no two files export a type of the same name", () => {
  const exporters = new Map<string, string[]>();
  for (const file of files)
    for (const statement of file.getStatements())
      if (
        (Node.isInterfaceDeclaration(statement) || Node.isTypeAliasDeclaration(statement) || Node.isClassDeclaration(statement)) &&
        statement.isExported()
      ) {
        const name = statement.getName()!;
        exporters.set(name, [...(exporters.get(name) ?? []), path(file)]);
      }
  expect(exporters.size).toBeGreaterThan(100);
  expect([...exporters].filter(([, from]) => from.length > 1)).toEqual([]);
});

test("no identifier is a retired word", () => {
  expect(retired.size).toBeGreaterThan(40);
  const found = files.flatMap((file) => {
    const words = new Set<string>();
    file.forEachDescendant((node) => {
      if (Node.isIdentifier(node) && retired.has(node.getText())) words.add(node.getText());
    });
    return [...words].map((word) => `${path(file)}: ${word}`);
  });
  expect(found).toEqual([]);
});
