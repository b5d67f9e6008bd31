/** Screens of `inspect`, `--why`, `--op`, `--rank` and `diff` at 80 and 120 columns, with and without colour. Fast: one small job; full: the published jobs. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import type { Plan } from "../../schemas/plan.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { diffMarkdown } from "../../src/report/diffMarkdown.ts";
import { printDiff, printStat } from "../../src/report/diffText.ts";
import { type EstimateView, printHidden, printTimeSection } from "../../src/report/estimateView.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { inspectRank, printRank } from "../../src/report/inspectRank.ts";
import { printInstructions } from "../../src/report/opText.ts";
import { printOverview } from "../../src/report/overview.ts";
import { printCommunication, printKernels, printMeshSection, printScheduleSection } from "../../src/report/sections.ts";
import { printTensors } from "../../src/report/tensors.ts";
import { paint, textWidth } from "../../src/report/textLayout.ts";
import { explainId } from "../../src/report/why.ts";
import { printWhy } from "../../src/report/whyText.ts";
import { root } from "../support/checkout.ts";
import { withoutDigests } from "../support/digests.ts";
import { full, once } from "../support/tiers.ts";

const planOf = (name: string, ...sets: string[]): Plan => {
  const path = `plans/${name}/job.yaml`;
  return compile(readJob(readFileSync(join(root, path), "utf8"), path, sets).job!).plan;
};
const staged = once(() => planOf("tiny-interleaved"));
const experts = once(() => planOf("tiny-mixtral"));

const whyOf = (plan: Plan, id: string, width: number): string[] => {
  const answer = explainId(plan, findId(plan, id));
  return printWhy(answer, { path: answer.key.path, line: `job.yaml:23: ${answer.key.path}` }, ["P104", "", ""], width);
};

/** An estimate whose figures no law of the estimate moves. */
const hiddenUnder = { grouped_wgrad: 0.004, grouped_dgrad_pair: 0.003, attention_grad: 0.002, "waits for ep": 0.001 };
const times: EstimateView = {
  ...{ profile: { name: "h100-80gb", device: "h100-80gb", stack: "rankc" }, seconds: 87.7, range: [70.9, 104], busiest: 1, bubble: 0.1 },
  ...{
    tokens_per_second: 382_714,
    model_flops_per_second: 97.4e12,
    of_peak: 0.098,
    sources: { measured: 0.02, interpolated: 0.18, law: 0.8 },
  },
  stages: [0, 1].map((stage) => ({
    ...{ stage, kernels: { products: 14.1, attention: 2.97, "other kernels": 4.36, optimizer: 0.0099 } },
    ...{ exposed: { ep: 47.8 + stage, "tp*dp": 0.0241 }, launches: 2.4e-4, bubble: 16.2 * (1 - stage) },
    communication: [
      { axes: "ep", total: 63.8, exposed: 63.8 },
      { axes: "tp*dp", total: 0.0277, exposed: 0.0233 },
    ],
    classes: [
      {
        name: "dispatch",
        axes: "ep",
        stream: undefined,
        bytes: 1.06e12,
        total: 37.6,
        exposed: 37.6 - 5.7e-13,
        under: { grouped_gemm: 5.7e-13 },
      },
      { name: "reduce_scatter", axes: "tp*dp", stream: "gradients", bytes: 5.4e8, total: 0.0139, exposed: 0.0039, under: hiddenUnder },
    ] as EstimateView["stages"][number]["classes"],
  })),
};

/** The screens of one small job: what `inspect` prints about a rank, ids and times, and `diff` on each level. */
const screens = (width: number): Readonly<Record<string, readonly string[]>> => ({
  time: [...printTimeSection(times, width), ...printHidden(times, width)],
  rank: printRank(staged(), inspectRank(staged(), 3), width),
  ids: [
    ...["layers.1.moe.w1", "layers.0.w1", "layers.0.moe.permute"].flatMap((id) => printInstructions(findId(experts(), id), width)),
    ...["layers.0.moe.w1", "layers.0.w1", "layers.0.attn.norm@dp,-,-.all_gather"].flatMap((id) => whyOf(experts(), id, width)),
    ...whyOf(staged(), "layers.0.mlp.residual.send", width),
  ],
  levels: (["job", "placement", "summary", "program"] as const).flatMap((level) => {
    const none = { job: [], consequences: [], placement: [], summary: [], program: [] };
    const all = changed();
    const kept = { ...all, ...none, [level]: all[level], ...(level === "summary" && { consequences: all.consequences }) };
    return [...printDiff(kept, { width, isWhole: true }).split("\n"), ...(level === "job" ? printStat(all, width).split("\n") : [])];
  }),
});
const changed = once(() => diffPlans(experts(), planOf("tiny-mixtral", "parallel.expert_tensor=2", "parallel.expert=1")));

/** Expects that no line is wider than `width`, and that colour changes no column. */
function expectToFit(lines: readonly string[], width: number): void {
  for (const line of lines.flatMap((l) => l.split("\n"))) {
    expect(textWidth(line), paint(line, false)).toBeLessThanOrEqual(width);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: codes of a terminal
    expect(paint(line, true).replace(/\u001b\[\d+m/g, "")).toBe(paint(line, false));
  }
}

describe.each([80, 120])("at %i columns", (width) => {
  test("rank, ids, times and levels are the screens of test/fixtures/screens", async () => {
    for (const [name, lines] of Object.entries(screens(width))) {
      expectToFit(lines, width);
      for (const hasColor of [false, true]) {
        const text = withoutDigests(paint(`${lines.join("\n").trimEnd()}\n`, hasColor));
        await expect(text).toMatchFileSnapshot(`../fixtures/screens/${name}-${width}${hasColor ? "-colour" : ""}.txt`);
      }
    }
  });
});

test("Markdown of a difference is the file of test/fixtures/screens", async () => {
  await expect(withoutDigests(diffMarkdown(changed()))).toMatchFileSnapshot("../fixtures/screens/diff.md");
});

/** What `inspect` prints about a plan; tables have `top` rows. */
function everything(plan: Plan, top: number, width: number): readonly string[] {
  const view = inspectPlan(plan, { profile: packageProfile(plan.job.cluster.device) });
  const ids = [
    ...new Set(plan.programs.flatMap(({ chunks }) => chunks.flatMap(({ forward }) => forward.slice(0, 40).map(({ id }) => id)))),
  ];
  return [
    ...printOverview(plan, view, [], width).split("\n"),
    ...printMeshSection(plan, view, width),
    ...printTensors(plan, view, top, width),
    ...printCommunication(view, top, width),
    ...printScheduleSection(plan, view, width),
    ...printKernels(plan, top, width),
    ...printTimeSection(view.estimate, width),
    ...printRank(plan, inspectRank(plan, plan.mesh.world - 1), width),
    ...ids.slice(0, 24).flatMap((id) => whyOf(plan, id, width)),
    ...ids.slice(0, 24).flatMap((id) => printInstructions(findId(plan, id), width)),
  ];
}

describe("the published jobs", full, () => {
  test.each(readdirSync(join(root, "plans")))(
    "%s: all that inspect prints fits 72, 80 and 120 columns; the first screen has 40 lines",
    (name) => {
      const plan = planOf(name);
      for (const width of [72, 80, 120]) expectToFit(everything(plan, 12, width), width);
      expect(printOverview(plan, inspectPlan(plan), [], 80).split("\n").length).toBeLessThanOrEqual(40);
    },
  );

  test.each([
    ["deepseek-v3-1024gpu", ["parallel.expert_tensor=4", "parallel.expert=16"]],
    ["mixtral-8x7b-16gpu", ["parallel.expert_tensor=1"]],
    ["qwen3-235b-a22b-256gpu", ["parallel.tensor=2"]],
  ])("%s: each level of diff fits 72, 80 and 120 columns, and the first screen has 40 lines of 80", (name, sets) => {
    const diff = diffPlans(planOf(name), planOf(name, ...sets));
    for (const width of [72, 80, 120]) {
      expectToFit(printDiff(diff, { width, isWhole: true }).split("\n"), width);
      expectToFit(printDiff(diff, { width, isWhole: false }).split("\n"), width);
    }
    expect(printDiff(diff, { width: 80, isWhole: false }).trimEnd().split("\n").length).toBeLessThanOrEqual(40);
  });
});
