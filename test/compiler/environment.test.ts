/** docs/environment.md lists every variable of rankc's own that the code reads, and no other. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { root } from "../support/checkout.ts";

const namesIn = (text: string): string[] => text.match(/\bRANKC_[A-Z0-9_]+\b/g) ?? [];
const filesBelow = (folder: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && /\.(ts|py)$/.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name));

test("the table of environment variables is complete", () => {
  const documented = new Set(namesIn(readFileSync(join(root, "docs/environment.md"), "utf8")));
  const used = new Set(["src", "runtime", "test"].flatMap(filesBelow).flatMap((file) => namesIn(readFileSync(file, "utf8"))));
  // the include guard of generated CUDA sources is no variable
  used.delete("RANKC_PRELUDE");
  expect([...used].filter((name) => !documented.has(name))).toEqual([]);
  expect([...documented].filter((name) => !used.has(name))).toEqual([]);
});
