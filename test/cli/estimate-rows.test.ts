/** The rows of test/fixtures/estimate: which are fitted, held out and excluded, and that their jobs are jobs of rankc. `npm run bench:estimate` prints their errors. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { largest } from "../../src/units.ts";
import { estimateRow, planOfRow, readTable } from "../bench/estimateRows.ts";
import { root } from "../support/checkout.ts";
import { full } from "../support/tiers.ts";

const rows = readTable("rows.tsv");
const stackOf = ({ device, stack }: (typeof rows)[number]): string => `${device} ${stack}`;
const rowOf = (id: string) => rows.find((row) => row.id === id)!;

test("every row says whether it is fitted, held out, or why it is excluded; at most a quarter of a stack's rows are fitted", () => {
  expect(rows.length).toBeGreaterThan(70);
  for (const { id, use } of rows) expect(use, id).toMatch(/^(fit|held out|excluded: .{20,})$/);
  for (const stack of new Set(rows.map(stackOf))) {
    const used = rows.filter((row) => stackOf(row) === stack && !row.use!.startsWith("excluded"));
    expect(used.filter(({ use }) => use === "fit").length, stack).toBeLessThanOrEqual(Math.ceil(used.length / 4));
  }
});

test("the jobs of the table of one H200 exist", () => {
  const jobs = readdirSync(join(root, "test/bench/jobs"));
  expect(
    readTable("h200.tsv")
      .map(({ job }) => `${job}.yaml`)
      .sort(),
  ).toEqual(jobs.sort());
});

test("a row becomes a plan of as many ranks, whose estimate has its device and stack", async () => {
  const row = rowOf("V201");
  const [plan, { seconds, profile }] = [await planOfRow(row), await estimateRow(row)];
  expect(plan.mesh.world).toBe(Number(row.gpus));
  expect(profile.name).toBe("b200-192gb.megatron");
  expect(seconds).toBeGreaterThan(0.1);
  expect(largest(plan.memory, ({ peak }) => peak) / 2 ** 30).toBeGreaterThan(20);
});

// the fifth run of the model zoo uses FSDP, which rankc does not have
test("four runs of Qwen3-235B on 256 H100 are in the order that was measured", full, async () => {
  const ids = ["V117", "V116", "V119", "V120"];
  const measured = ids.map((id) => Number(rowOf(id).seconds));
  expect(measured).toEqual([...measured].sort((a, b) => a - b));
  const seconds: number[] = [];
  for (const id of ids) seconds.push((await estimateRow(rowOf(id))).seconds);
  expect(seconds).toEqual([...seconds].sort((a, b) => a - b));
});
