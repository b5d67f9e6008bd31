import { spawnSync } from "node:child_process";
import { expect, test } from "vitest";
import { root } from "../support/checkout.ts";

test("the demo compiles, inspects and trains, and its loss falls", () => {
  const { status, stdout, stderr } = spawnSync(process.execPath, ["--import", "tsx", "test/demo.ts"], { cwd: root, encoding: "utf8" });
  expect(status, stderr).toBe(0);
  expect(stdout).toMatch(/mesh +16 ranks[\s\S]*The loss fell below 4\.0/);
});
