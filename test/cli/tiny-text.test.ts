/** plans/tiny-text: its data sets are what `rankc data prepare` makes of its texts, and it trains, evaluates and logs. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { root } from "../support/checkout.ts";
import { builtCli } from "../support/rankc.ts";

const home = join(root, "plans/tiny-text");
const folder = mkdtempSync(join(tmpdir(), "rankc-tiny-text-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const rankc = (...args: string[]): string =>
  execFileSync(process.execPath, [builtCli(), ...args], { cwd: home, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] });

test("its data sets are those of its texts and its tokenizer", () => {
  for (const source of ["prose", "code"]) {
    rankc("data", "prepare", `${source}.jsonl`, "--tokenizer", "tokenizer.json", "--out", join(folder, source), "--workers", "1");
    for (const end of ["bin", "idx"])
      expect(readFileSync(join(folder, `${source}.${end}`)).equals(readFileSync(join(home, `${source}.${end}`))), `${source}.${end}`).toBe(
        true,
      );
  }
});

test("it trains, evaluates each source, and logs", () => {
  const sets = ["train.evaluation.every=1", "train.evaluation.steps=1"].flatMap((set) => ["--set", set]);
  const result = JSON.parse(rankc("run", "job.yaml", "--steps", "2", "--log", join(folder, "log"), "--format", "json", ...sets));
  expect(result.validation.sources.map(({ source }: { source: string }) => source)).toEqual(["prose", "code"]);
  expect(Object.keys(result)).toContain("test");
  const lines = readFileSync(join(folder, "log/metrics.jsonl"), "utf8")
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(lines.map((line) => [line.step, Object.keys(line).find((name) => name.startsWith("lm loss"))])).toEqual([
    [1, "lm loss"],
    [1, "lm loss validation"],
    [2, "lm loss"],
    [2, "lm loss validation"],
    [2, "lm loss test"],
  ]);
  expect(lines[4]).toMatchObject({ "lm loss test/prose": expect.any(Number), "lm loss test/code": expect.any(Number) });
});
