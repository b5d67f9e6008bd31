/** A disk that fills up while a data set is prepared: one error that names it, no file of the data set, and the same call continues later. */
import type * as fs from "node:fs";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test, vi } from "vitest";
import { prepareDataset } from "../../runtime/data/prepare/prepare.ts";
import { fixture } from "../support/job.ts";

/** Writes to files whose path matches fail. The path of a descriptor is recorded when the file is opened. */
let full: RegExp | undefined;
vi.mock("node:fs", async (original) => {
  const real = await original<typeof fs>();
  const paths = new Map<unknown, string>();
  return {
    ...real,
    openSync: (...args: Parameters<typeof fs.openSync>) => {
      const fd = real.openSync(...args);
      paths.set(fd, String(args[0]));
      return fd;
    },
    writeSync: (...args: [number, string]) => {
      if (full?.test(paths.get(args[0]) ?? "")) throw Object.assign(new Error("no space"), { code: "ENOSPC" });
      return real.writeSync(...args);
    },
  };
});

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
    full = what;
    await expect(prepare("set"), String(what)).rejects.toMatchObject({
      name: "Trouble",
      message: expect.stringMatching(/set: cannot be written: the disk is full \(ENOSPC\)$/),
      fix: expect.stringContaining("free some space"),
    });
    expect(files()).toEqual([]);
  }
  full = undefined;
  await prepare("set");
  await prepare("whole");
  for (const end of ["bin", "idx"])
    expect(readFileSync(join(folder, `set.${end}`)).equals(readFileSync(join(folder, `whole.${end}`)))).toBe(true);
  expect(readdirSync(folder).filter((name) => name.endsWith(".partial"))).toEqual([]);
});
