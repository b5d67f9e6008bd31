/** `inspect --picture`: the drawing has the numbers of the plan. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { schedule, timesOf } from "../../src/passes/schedule.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { axisTitle, trafficOf } from "../../src/report/overview.ts";
import { drawPlan } from "../../src/report/planPicture.ts";
import { drawSchedulePieces } from "../../src/report/schedulePieces.ts";
import { page } from "../../src/report/svg.ts";
import { bytesText } from "../../src/units.ts";
import { root } from "../support/checkout.ts";

const mixtralPath = join(root, "plans/mixtral-8x7b-16gpu/job.yaml");
const mixtralPlan = compile(readJob(readFileSync(mixtralPath, "utf8"), mixtralPath).job!).plan;
const mixtral = drawPlan(mixtralPlan);

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

test("with each stage's peak; the device's memory is a labelled limit if it lies within the picture", () => {
  const { plan, svg } = drawn();
  for (const { peak } of plan.memory) expect(svg).toContain(`>${bytesText(peak)}</text>`);
  expect(svg).not.toContain('class="limit"');
  expect(svg).toContain("cpu has 4.00 GiB");
  expect(mixtral).toContain('<path class="limit"');
  expect(mixtral).toContain(">a100-80gb: 80.0 GiB</text>");
});

test("axes have numbers, and traffic has a bar per axis with its links", () => {
  const { svg } = drawn();
  for (const label of [">0</text>", ">10</text>", ">50</text>", ">512.0 KiB</text>"]) expect(svg).toContain(label);
  const { roles } = inspectPlan(mixtralPlan);
  for (const { axes, inside } of trafficOf(roles[0]!).slice(0, 3))
    expect(mixtral).toContain(`${axisTitle(axes)}: inside a node ${bytesText(Math.round(inside))}</title>`);
  expect(mixtral).toContain(
    `expert (ep): across nodes ${bytesText(Math.round(trafficOf(roles[0]!).find((t) => t.axes === "ep")!.across))}</title>`,
  );
});

test("a picture has the colours of the page that shows it, or those of the option", () => {
  expect(drawPlan(mixtralPlan)).toContain("prefers-color-scheme:dark");
  expect(drawPlan(mixtralPlan, "dark")).toMatch(/<style>svg\{background:#0d1117/);
  expect(drawPlan(mixtralPlan, "light")).not.toContain("prefers-color-scheme");
});

test("many microbatches are drawn as shares of time, with the first units in detail, in less than 200 kB", () => {
  const parallel = { ...mixtralPlan.job.parallel, pipeline: 8, data: 64, layout: null };
  const train = { ...mixtralPlan.job.train, global_batch: 8192, micro_batch: 1 };
  const lanes = timesOf(
    schedule({ train, parallel }, 4).map(({ order }) => order),
    4,
  );
  const parts = drawSchedulePieces(lanes, 4);
  const svg = page("many", parts, "auto");
  expect(parts).toHaveLength(2);
  expect(svg.length).toBeLessThan(190_000);
  expect(svg).toMatch(/the share of [\d,]+ units that each kind takes/);
  expect(pieces(svg).length).toBeGreaterThan(100);
  // the area of a kind is its share of the time of a stage
  const height = 19;
  for (const kind of ["forward", "backward"] as const) {
    const [, d] = new RegExp(`d="([^"]*)"><title>stage 0: ${kind}`).exec(svg)!;
    const area = [...d!.matchAll(/h([\d.]+)v-([\d.]+)/g)].reduce((sum, [, w, h]) => sum + Number(w) * Number(h), 0);
    const busy = lanes[0]!.filter(({ run }) => run.kind === kind).reduce((sum, { start, end }) => sum + end - start, 0);
    const units = Math.max(...lanes.flat().map(({ end }) => end));
    expect(area / (1500 * height)).toBeCloseTo(busy / units, 2);
  }
});

test("gradients of weights have a colour of their own, and names are escaped", () => {
  const { svg } = drawn(["parallel.schedule=zero_bubble", "parallel.virtual_pipeline=1", 'name="a<b"']);
  expect(new Set(pieces(svg).map((p) => p.kind))).toEqual(new Set(["forward", "backward", "weights"]));
  expect(svg).toContain("gradients of weights");
  expect(svg).toContain("a&lt;b");
});

test("the pictures of the README and of docs/plan.md are those of the plans; npm run pictures writes them", async () => {
  await expect(drawn().svg).toMatchFileSnapshot("../../docs/images/tiny-interleaved.svg");
  await expect(mixtral).toMatchFileSnapshot("../../docs/images/mixtral-8x7b-16gpu.svg");
});
