import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { demoCommands, lossIn } from "../demo.ts";
import { root } from "../support/checkout.ts";
import { rankc } from "../support/rankc.ts";
import { full } from "../support/tiers.ts";

test("the demo compiles, inspects and trains, and its loss falls", full, () => {
  const { status, stdout, stderr } = spawnSync(process.execPath, ["--import", "tsx", "test/demo.ts"], { cwd: root, encoding: "utf8" });
  expect(status, stderr).toBe(0);
  expect(stdout).toMatch(/mesh +16 ranks[\s\S]*The loss fell below 4\.0/);
});

test("the commands of the demo show 16 ranks and train: the loss falls from that of guesses among 256 bytes", async () => {
  const folder = mkdtempSync(join(tmpdir(), "rankc-demo-"));
  const before = process.cwd();
  process.chdir(root);
  const printed: string[] = [];
  try {
    for (const command of demoCommands(join(folder, "plan"), 3)) {
      const { exit, out, err } = await rankc(...command.split(" "));
      expect(exit, err).toBe(0);
      printed.push(out);
    }
  } finally {
    process.chdir(before);
    rmSync(folder, { recursive: true });
  }
  expect(printed[1]).toMatch(/mesh +16 ranks/);
  expect(lossIn(printed[2]!)).toBeLessThan(Math.log(256));
});
