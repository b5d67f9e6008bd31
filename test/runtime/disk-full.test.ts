/** A disk that fills up while a run saves: one error that names it, and nothing of the checkpoint remains. */
import type * as fs from "node:fs";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test, vi } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

/** Writes to files whose path matches fail. The path of a descriptor is recorded when the file is opened. */
let full: RegExp | undefined;
/** The file system states so many free bytes. */
let free: number | undefined;
vi.mock("node:fs", async (original) => {
  const real = await original<typeof fs>();
  const paths = new Map<unknown, string>();
  const expectSpace = (file: unknown): void => {
    if (full?.test(paths.get(file) ?? String(file))) throw Object.assign(new Error("no space"), { code: "ENOSPC" });
  };
  return {
    ...real,
    openSync: (...args: Parameters<typeof fs.openSync>) => {
      const fd = real.openSync(...args);
      paths.set(fd, String(args[0]));
      return fd;
    },
    writeSync: (...args: [number, string]) => {
      expectSpace(args[0]);
      return real.writeSync(...args);
    },
    statfsSync: (path: string) => (free === undefined ? real.statfsSync(path) : { bavail: free, bsize: 1, blocks: 10 }),
    writeFileSync: (...args: Parameters<typeof fs.writeFileSync>) => {
      expectSpace(args[0]);
      real.writeFileSync(...args);
    },
  };
});

const place = mkdtempSync(join(tmpdir(), "rankc-full-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));

test("is one error, and the previous checkpoint stays intact", async () => {
  const job = jobOf({
    name: "full",
    model: { layers: 1, hidden: 16, heads: 2, vocab: 256, seq: 8 },
    train: { global_batch: 2, steps: 4, precision: "fp32", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
  const { plan } = compile(job);
  const settings = { baseDir: fixture(""), save: place };
  const opened = await openRun(plan, settings);
  await opened.step();
  const first = await opened.save();
  const text = readFileSync(join(first, "snapshot.json"), "utf8");
  await opened.step();
  for (const what of [/safetensors/, /snapshot\.json/]) {
    full = what;
    await expect(opened.save(), String(what)).rejects.toMatchObject({
      name: "Trouble",
      message: expect.stringMatching(/step-00000002.*: cannot be written: the disk is full \(ENOSPC\)$/),
      fix: expect.stringContaining("free some space"),
    });
    expect(readdirSync(place).sort()).toEqual(["run.lock", "step-00000001"]);
  }
  full = undefined;
  free = 1000;
  await expect(opened.save()).rejects.toMatchObject({
    name: "Trouble",
    message: expect.stringMatching(/: the disk has 0\.0 MB free, and the checkpoint needs 0\.1 MB$/),
    fix: expect.stringContaining("--keep"),
  });
  expect(readdirSync(place).sort()).toEqual(["run.lock", "step-00000001"]);
  free = undefined;
  full = /run\.lock/;
  await opened.close();
  await expect(openRun(plan, settings)).rejects.toThrow("the disk is full (ENOSPC)");
  full = undefined;
  expect(readdirSync(place)).toEqual(["step-00000001"]);
  expect(readFileSync(join(first, "snapshot.json"), "utf8")).toBe(text);
});
