/** `diff` by levels: consequences first, one screen for an ordinary change, selection, Markdown. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { diffPlans, selectDiff } from "../../src/report/diff.ts";
import { diffMarkdown } from "../../src/report/diffMarkdown.ts";
import { printDiff, printStat } from "../../src/report/diffText.ts";
import { paint, textWidth } from "../../src/report/textLayout.ts";
import { withoutDigests } from "../support/digests.ts";

const text = readFileSync(new URL("../../plans/mixtral-8x7b-16gpu/job.yaml", import.meta.url), "utf8");
const planOf = (...sets: string[]) => compile(readJob(text, "job.yaml", sets).job!).plan;
const diff = diffPlans(planOf("parallel.expert_tensor=1"), planOf("parallel.expert_tensor=4"));

describe("expert_tensor 1 to 4 on the Mixtral job", () => {
  test.each([80, 120])("fits 40 lines of %i columns, with and without colour", async (width) => {
    const lines = printDiff(diff, { width, isWhole: false });
    expect(lines.trimEnd().split("\n").length).toBeLessThanOrEqual(40);
    for (const line of lines.split("\n")) expect(textWidth(line), line).toBeLessThanOrEqual(width);
    await expect(withoutDigests(paint(lines, false))).toMatchFileSnapshot(`../fixtures/screens/diff-${width}.txt`);
    await expect(withoutDigests(paint(lines, true))).toMatchFileSnapshot(`../fixtures/screens/diff-${width}-colour.txt`);
  });

  test("names the most important difference first: whether it fits, then groups that leave nodes, then bytes by link", () => {
    const kinds = diff.consequences.map(({ kind }) => kind);
    expect(kinds[0]).toBe("fit");
    expect(kinds.slice(1, 3)).toEqual(["placement", "placement"]);
    expect(diff.consequences[1]).toMatchObject({ is: "worse", text: expect.stringContaining("expert (ep) groups leave the node") });
    expect(kinds.filter((kind) => kind === "traffic")).toHaveLength(3);
    for (const [i, { weight }] of diff.consequences.entries())
      expect(weight).toBeLessThanOrEqual(diff.consequences[i - 1]?.weight ?? Number.POSITIVE_INFINITY);
    expect(diff.placement.map(({ axis, moved }) => [axis, moved])).toEqual([
      ["etp", "stays"],
      ["ep", "leaves the node"],
      ["edp", "enters the node"],
    ]);
  });

  test("the other way round, better is worse and old is new", () => {
    const back = diffPlans(planOf("parallel.expert_tensor=4"), planOf("parallel.expert_tensor=1"));
    const turned = { worse: "better", better: "worse", other: "other" } as const;
    expect(back.consequences.map((c) => [c.kind, c.is]).sort()).toEqual(diff.consequences.map((c) => [c.kind, turned[c.is]]).sort());
    expect(back.placement.map((p) => p.old)).toEqual(diff.placement.map((p) => p.new));
  });

  test("Markdown has a table of keys and folded programs, escapes, and is short enough for a comment", () => {
    const markdown = diffMarkdown(diff);
    expect(markdown).toContain("| `parallel.expert_tensor` | `1` | `4` |");
    expect(markdown).toContain("- 🔺 expert (ep) groups leave the node: 4 ranks inside a node → 4 ranks across 2 nodes");
    expect(markdown.match(/<details>/g)).toHaveLength(2);
    expect(markdown.match(/<\/details>/g)).toHaveLength(2);
    expect(markdown.length).toBeLessThan(60_001);
    const many = diffMarkdown({ ...diff, program: Array(4000).fill(diff.program[0]) });
    expect(many.length).toBeLessThan(60_001);
    expect(many.trimEnd().endsWith("</details>")).toBe(true);
  });
});

describe("selection", () => {
  test("one level is whole, and the others are gone", () => {
    const only = selectDiff(diff, ["program"], []);
    expect([only.job, only.placement, only.summary, only.consequences]).toEqual([[], [], [], []]);
    const whole = paint(printDiff(only, { width: 80, isWhole: true }), false);
    expect(whole).not.toContain("--only program");
    expect(whole.split("\n").length).toBeGreaterThan(80);
    expect(printStat(diff, 120)).toMatch(
      /^1 job key; 3 axes; \d+ consequences; instructions: [\d,]+ added, [\d,]+ removed, [\d,]+ changed\n$/,
    );
  });

  test("ignored keys do not count as a change, and keys below them neither", () => {
    const steps = diffPlans(planOf("model.layers=1"), planOf("model.layers=1", "train.optimizer.lr=0.5"));
    expect(selectDiff(steps, [], ["train.optimizer.lr"]).changes).toBe(false);
    expect(selectDiff(steps, [], ["train"]).changes).toBe(false);
    expect(selectDiff(steps, [], ["job"]).changes).toBe(false);
    expect(selectDiff(steps, [], ["train.optim"]).changes).toBe(true);
  });
});
