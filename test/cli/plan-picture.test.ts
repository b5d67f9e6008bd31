/** `inspect --picture`: what is drawn is what the plan says. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { timesOf } from "../../src/passes/schedule.ts";
import { drawPlan } from "../../src/report/planPicture.ts";
import { bytesText } from "../../src/units.ts";
import { root } from "../support/checkout.ts";

function drawn(sets: readonly string[] = []) {
  const path = join(root, "plans/tiny-interleaved/job.yaml");
  const { plan } = compile(readJob(readFileSync(path, "utf8"), path, sets).job!);
  return { plan, svg: drawPlan(plan) };
}
const pieces = (svg: string) =>
  [
    ...svg.matchAll(
      /<title>microbatch (\d+)(?:, chunk (\d+))?: (\w+), units (\d+) to (\d+)<\/title><rect x="([\d.]+)" y="(\d+)" width="([\d.]+)"/g,
    ),
  ].map(([, microbatch, chunk, kind, from, to, x, y, width]) => ({
    ...{ microbatch: Number(microbatch), chunk: Number(chunk ?? 0), kind: kind!, from: Number(from), to: Number(to) },
    ...{ x: Number(x), y: Number(y), width: Number(width) },
  }));

test("every block of every stage is drawn at its time", () => {
  const { plan, svg } = drawn();
  const stages = timesOf(
    plan.programs.map((p) => p.order),
    2,
  );
  const all = pieces(svg);
  expect(all.length).toBe(stages.flat().length);
  const rows = [...new Set(all.map((p) => p.y))];
  expect(rows.length).toBe(2);
  const last = all.reduce((a, b) => (b.to > a.to ? b : a));
  const unit = (last.x + last.width - all[0]!.x) / last.to;
  for (const [stage, y] of rows.entries()) {
    const row = all.filter((p) => p.y === y);
    expect(row.map(({ kind, microbatch, chunk }) => ({ kind, microbatch, chunk }))).toEqual(plan.programs[stage]!.order);
    expect(row.map((p) => [p.from, p.to])).toEqual(stages[stage]!.map((p) => [p.start, p.end]));
    for (const p of row) {
      expect(p.width).toBeCloseTo(unit * (p.to - p.from), 1);
      expect(p.x - all[0]!.x).toBeCloseTo(unit * p.from, 1);
    }
  }
  expect(svg).toContain("2 stages of 2 chunks, bubble 5.9 %");
});

test("with each stage's peak; the device's memory is a line where it is in sight", () => {
  const { plan, svg } = drawn();
  for (const { peak } of plan.memory) expect(svg).toContain(`>${bytesText(peak)}</text>`);
  expect(svg).not.toContain("<line");
  const path = join(root, "plans/mixtral-8x7b-16gpu/job.yaml");
  expect(drawPlan(compile(readJob(readFileSync(path, "utf8"), path).job!).plan)).toContain("<line");
});

test("gradients of weights have a colour of their own, and names are escaped", () => {
  const { svg } = drawn(["parallel.schedule=zero_bubble", "parallel.virtual_pipeline=1", 'name="a<b"']);
  expect(new Set(pieces(svg).map((p) => p.kind))).toEqual(new Set(["forward", "backward", "weights"]));
  expect(svg).toContain("gradients of weights");
  expect(svg).toContain("a&lt;b");
});

test("the picture of the README is the picture of plans/tiny-interleaved", async () => {
  await expect(drawn().svg).toMatchFileSnapshot("../../docs/images/tiny-interleaved.svg");
});
