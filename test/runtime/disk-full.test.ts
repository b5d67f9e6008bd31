/** A disk that fills up while a run saves: one error that names it, and nothing of the checkpoint remains. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test, vi } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { disk } from "../support/fullDisk.ts";
import { fixture, jobOf } from "../support/job.ts";

vi.mock("node:fs", async (original) => (await import("../support/fullDisk.ts")).fullDisk(await original()));

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
  const faults = [
    [/safetensors/, "ENOSPC", "the disk is full"],
    [/snapshot\.json/, "ENOSPC", "the disk is full"],
    [/safetensors/, "EDQUOT", "the disk quota is used up"],
  ] as const;
  for (const [what, code, why] of faults) {
    Object.assign(disk, { full: what, code });
    await expect(opened.save(), `${what} ${code}`).rejects.toMatchObject({
      name: "Trouble",
      message: expect.stringMatching(new RegExp(`step-00000002.*: cannot be written: ${why} \\(${code}\\)$`)),
      fix: expect.stringContaining("free some space"),
    });
    expect(readdirSync(place).sort()).toEqual(["run.lock", "step-00000001"]);
  }
  disk.code = "ENOSPC";
  disk.full = undefined;
  disk.free = 1000;
  await expect(opened.save()).rejects.toMatchObject({
    name: "Trouble",
    message: expect.stringMatching(/: the disk has 0\.0 MB free, and the checkpoint needs 0\.1 MB$/),
    fix: expect.stringContaining("--keep"),
  });
  expect(readdirSync(place).sort()).toEqual(["run.lock", "step-00000001"]);
  disk.free = undefined;
  disk.full = /run\.lock/;
  await opened.close();
  await expect(openRun(plan, settings)).rejects.toThrow("the disk is full (ENOSPC)");
  disk.full = undefined;
  expect(readdirSync(place)).toEqual(["step-00000001"]);
  expect(readFileSync(join(first, "snapshot.json"), "utf8")).toBe(text);
});
