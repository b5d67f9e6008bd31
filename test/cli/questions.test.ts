/** docs/questions.md: six questions about the 1,024-GPU plan, each answered by one command at 80 columns. The page is written by this test. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { printDiff, printStat } from "../../src/report/diffText.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { printOverview } from "../../src/report/overview.ts";
import { printCommunication } from "../../src/report/sections.ts";
import { printTensors } from "../../src/report/tensors.ts";
import { paint } from "../../src/report/textLayout.ts";
import { explainId } from "../../src/report/why.ts";
import { printWhy } from "../../src/report/whyText.ts";
import { withoutDigests } from "../support/digests.ts";
import { full } from "../support/tiers.ts";

const WIDTH = 80;
const path = "plans/deepseek-v3-1024gpu/job.yaml";
const text = readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
const planOf = (...sets: string[]) => compile(readJob(text, path, sets).job!).plan;

test("the page has the answers of this version", full, async () => {
  const plan = planOf();
  const view = inspectPlan(plan);
  const other = planOf("parallel.expert_tensor=4", "parallel.expert=16");
  const diff = diffPlans(plan, other);
  const id = "layers.17.mlp.norm@dp,-,-.all_gather";
  const line = text.split("\n").findIndex((l) => l.trim().startsWith("tensor:")) + 1;
  const why = printWhy(
    explainId(plan, findId(plan, id)),
    { path: "parallel.tensor", line: `${path}:${line}: tensor: 2` },
    ["P104", ""],
    WIDTH,
  );
  const first = (lines: readonly string[]): readonly string[] => lines.slice(0, lines.indexOf(""));
  const stage = (lines: readonly string[], n: number): readonly string[] =>
    lines.slice(lines.findIndex((l) => paint(l, false).startsWith(`stage ${n}`)));
  const answers: readonly (readonly [question: string, command: string, lines: readonly string[]])[] = [
    ["What is in this plan?", "rankc inspect plan/", printOverview(plan, view, [], WIDTH).split("\n")],
    [
      "Which ranks talk for experts, and over which links?",
      "rankc inspect plan/ --comms --top 4",
      printCommunication(view, 4, WIDTH).slice(0, 18),
    ],
    ["What takes the most memory on stage 0?", "rankc inspect plan/ --memory", first(stage(printTensors(plan, view, 10, WIDTH), 0))],
    [
      "What does expert_tensor 1 to 4 change?",
      `rankc diff plan/ plan-etp4/`,
      printDiff(diff, { width: WIDTH, isWhole: false }).trimEnd().split("\n"),
    ],
    ["Why is this all-gather there?", `rankc inspect plan/ --why ${id} --job job.yaml`, why],
    ["What did a pull request change?", "rankc diff git:main:plan/ plan/ --stat", printStat(diff, WIDTH).trimEnd().split("\n")],
  ];
  const page = [
    "# Questions about a plan",
    "",
    "DeepSeek-V3 on 1,024 GPUs ([plans/deepseek-v3-1024gpu](../plans/deepseek-v3-1024gpu/job.yaml)), at 80 columns. `plan-etp4/` is the job with",
    "`parallel.expert_tensor=4` and `parallel.expert=16`. The options are listed in [plan.md](plan.md#inspect).",
    "`npx vitest run test/cli/questions.test.ts --update` with `RANKC_TEST=full` writes this page.",
    ...answers.flatMap(([question, command, lines]) => [
      ...["", `## ${question}`, "", "```text", `$ ${command}`],
      ...lines
        .map((l) => paint(l, false))
        .join("\n")
        .trimEnd()
        .split("\n"),
      "```",
    ]),
    ...["", "## Is the committed plan current?", "", "```text", "$ rankc compile job.yaml -o plan/ --check"],
    ...["plan/ is current: plan.json and plan.txt are those of the job", "```", ""],
  ].join("\n");
  for (const l of page.split("\n").filter((l) => !l.startsWith("DeepSeek")))
    if (!l.startsWith("`") && !l.startsWith("$")) expect(l.length, l).toBeLessThanOrEqual(WIDTH);
  await expect(withoutDigests(page)).toMatchFileSnapshot("../../docs/questions.md");
});
