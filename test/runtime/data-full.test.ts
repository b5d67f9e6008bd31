/** A disk that fills up while a data set is prepared: one error that names it, no file of the data set, and the same call continues later. */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test, vi } from "vitest";
import { prepareDataset } from "../../runtime/data/prepare/prepare.ts";
import { disk } from "../support/fullDisk.ts";
import { fixture } from "../support/job.ts";

vi.mock("node:fs", async (original) => (await import("../support/fullDisk.ts")).fullDisk(await original()));

const folder = mkdtempSync(join(tmpdir(), "rankc-data-full-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test("is one error, nothing is half-written, and the call can be repeated", async () => {
  const corpus = join(folder, "corpus.jsonl");
  writeFileSync(corpus, Array.from({ length: 100 }, (_, i) => `{"text": "document ${i}"}\n`).join(""));
  const prepare = (out: string) =>
    prepareDataset({
      ...{ inputs: [corpus], prefix: join(folder, out), tokenizer: fixture("tokenizers/gpt2.json"), threads: 1, restart: false },
      ...{ documents: { border: "file", key: "text" }, overwrite: false, signal: new AbortController().signal, onProgress: () => {} },
    });
  const files = (): string[] => readdirSync(folder).filter((name) => /\.(bin|idx|json)$/.test(name));
  for (const what of [/partial\/ids$/, /partial\/lengths$/, /partial\/index$/]) {
    disk.full = what;
    await expect(prepare("set"), String(what)).rejects.toMatchObject({
      name: "Trouble",
      message: expect.stringMatching(/set: cannot be written: the disk is full \(ENOSPC\)$/),
      fix: expect.stringContaining("free some space"),
    });
    expect(files()).toEqual([]);
  }
  disk.full = undefined;
  await prepare("set");
  await prepare("whole");
  for (const end of ["bin", "idx"])
    expect(readFileSync(join(folder, `set.${end}`)).equals(readFileSync(join(folder, `whole.${end}`)))).toBe(true);
  expect(readdirSync(folder).filter((name) => name.endsWith(".partial"))).toEqual([]);
});
