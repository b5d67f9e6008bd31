/** docs/questions.md: questions about a job and about the 1,024-GPU plan, each answered by one command at 80 columns. The page is written by a test here. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { loadSearchJob } from "../../src/cli/searchJob.ts";
import { warningsOf } from "../../src/cli/warnings.ts";
import { loadDeviceTargets } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { printDiff, printStat } from "../../src/report/diffText.ts";
import { printTimeSection } from "../../src/report/estimateView.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { printOverview } from "../../src/report/overview.ts";
import { printCommunication } from "../../src/report/sections.ts";
import { printTensors } from "../../src/report/tensors.ts";
import { paint } from "../../src/report/textLayout.ts";
import { explainId } from "../../src/report/why.ts";
import { printWhy } from "../../src/report/whyText.ts";
import { search } from "../../src/search/search.ts";
import { printSearch } from "../../src/search/searchText.ts";
import { withoutDigests } from "../support/digests.ts";
import { rankc } from "../support/rankc.ts";
import { full } from "../support/tiers.ts";

const WIDTH = 80;

interface Answer {
  readonly question: string;
  readonly command: string;
  readonly lines: readonly string[];
}

/** The first paragraph of a report. */
const first = (lines: readonly string[]): readonly string[] => lines.slice(0, lines.indexOf(""));

/** The answers about the job at `path`, as the commands print them; `id` names an all-gather of the job, `sets` the change that is compared. */
async function answersOf(path: string, id: string, sets: readonly string[]): Promise<readonly Answer[]> {
  const text = readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
  const planOf = (...set: string[]) => compile(readJob(text, path, set).job!).plan;
  const plan = planOf();
  const profile = packageProfile(plan.job.cluster.device);
  const view = inspectPlan(plan, { profile });
  const diff = diffPlans(plan, planOf(...sets), { profileOf: () => profile });
  const line = text.split("\n").findIndex((l) => l.trim().startsWith("tensor:")) + 1;
  const key = { path: "parallel.tensor", line: `${path}:${line}: tensor: 2` };
  const tensors = printTensors(plan, view, 10, WIDTH);
  return [
    {
      question: "What is in this plan?",
      command: "rankc inspect plan/",
      lines: printOverview(plan, view, await warningsOf(plan), WIDTH).split("\n"),
    },
    {
      question: "Which ranks talk for experts, and over which links?",
      command: "rankc inspect plan/ --comms --top 4",
      lines: printCommunication(view, 4, WIDTH).slice(0, 18),
    },
    {
      question: "What takes the most memory on stage 0?",
      command: "rankc inspect plan/ --memory",
      lines: first(tensors.slice(tensors.findIndex((l) => paint(l, false).startsWith("stage 0")))),
    },
    {
      question: "What does expert_tensor 1 to 4 change?",
      command: "rankc diff plan/ plan-etp4/",
      lines: printDiff(diff, { width: WIDTH, isWhole: false }).trimEnd().split("\n"),
    },
    {
      question: "Why is this all-gather there?",
      command: `rankc inspect plan/ --why ${id} --job job.yaml`,
      lines: printWhy(explainId(plan, findId(plan, id), profile), key, ["P104", ""], WIDTH),
    },
    {
      question: "What did a pull request change?",
      command: "rankc diff git:main:plan/ plan/ --stat",
      lines: printStat(diff, WIDTH).trimEnd().split("\n"),
    },
  ];
}

const mixtral = "plans/mixtral-8x7b-16gpu/job.yaml";

/** The answers that need no plan: how long a step of Mixtral takes, and how it would run on other GPUs. */
async function forecastsOf(): Promise<readonly Answer[]> {
  const { job } = readJob(readFileSync(new URL(`../../${mixtral}`, import.meta.url), "utf8"), mixtral);
  const targetOf = await loadDeviceTargets();
  const { plan } = compile(job!, { target: targetOf("a100-80gb") });
  const { estimate } = inspectPlan(plan, { profile: packageProfile("a100-80gb") });
  const { job: free } = await loadSearchJob(mixtral, { set: [], overlay: [], gpus: 64, device: "h100-80gb" });
  const found = search(free, { profile: packageProfile("h100-80gb")!, target: targetOf("h100-80gb"), plans: 6 });
  return [
    {
      question: "How long is a step on 16 A100?",
      command: `rankc inspect ${mixtral} --time`,
      lines: printTimeSection(estimate, WIDTH),
    },
    {
      question: "Which mesh for 64 H100?",
      command: `rankc search ${mixtral} --gpus 64 --device h100-80gb --plans 6 --top 3`,
      lines: printSearch(free, found, { top: 3, width: WIDTH, fixed: {} }),
    },
  ];
}

/** The lines of an answer, without colour. */
const plain = ({ lines }: Answer): string[] =>
  lines
    .map((l) => paint(l, false))
    .join("\n")
    .trimEnd()
    .split("\n");

test("each question about a job of 16 ranks has an answer of 80 columns", async () => {
  const answers = await answersOf("plans/tiny-mixtral/job.yaml", "layers.0.attn.norm@dp,-,-.all_gather", [
    "parallel.expert_tensor=2",
    "parallel.expert=1",
  ]);
  for (const answer of answers) {
    expect(plain(answer).length, answer.question).toBeGreaterThan(1);
    for (const l of plain(answer)) expect(l.length, l).toBeLessThanOrEqual(WIDTH);
  }
});

test("each question is answered by its command within ten CPU seconds", full, async () => {
  const out = mkdtempSync(join(tmpdir(), "rankc-questions-"));
  const deepseek = "plans/deepseek-v3-1024gpu/job.yaml";
  const plan = join(out, "plan");
  // the plan exists before it is asked about
  expect(await rankc("compile", deepseek, "-o", plan)).toMatchObject({ exit: 0 });
  const commands = [
    ["inspect", mixtral, "--time"],
    ["search", mixtral, "--gpus", "64", "--device", "h100-80gb", "--plans", "6", "--top", "3"],
    ["inspect", plan, "--memory"],
    ["inspect", plan, "--comms", "--top", "4"],
    ["diff", deepseek, "--set", "parallel.expert_tensor=4", "--set", "parallel.expert=16"],
    ["inspect", plan, "--why", "layers.17.mlp.norm@dp,-,-.all_gather"],
  ];
  for (const command of commands) {
    const began = process.cpuUsage();
    const { out: printed } = await rankc(...command);
    const { user, system } = process.cpuUsage(began);
    expect(printed.length, command.join(" ")).toBeGreaterThan(100);
    expect((user + system) / 1e6, command.join(" ")).toBeLessThan(10);
  }
  rmSync(out, { recursive: true });
});

test("the page has the answers of this version", full, async () => {
  const answers = await answersOf("plans/deepseek-v3-1024gpu/job.yaml", "layers.17.mlp.norm@dp,-,-.all_gather", [
    "parallel.expert_tensor=4",
    "parallel.expert=16",
  ]);
  const page = [
    "# Questions about a plan",
    "",
    "Mixtral-8x7B ([plans/mixtral-8x7b-16gpu](../plans/mixtral-8x7b-16gpu/job.yaml)) before it runs, by [the estimate](estimate.md), and",
    "DeepSeek-V3 on 1,024 GPUs ([plans/deepseek-v3-1024gpu](../plans/deepseek-v3-1024gpu/job.yaml)), at 80 columns. `plan-etp4/` is the job with",
    "`parallel.expert_tensor=4` and `parallel.expert=16`. The options are listed in [plan.md](plan.md#inspect).",
    "`npx vitest run test/cli/questions.test.ts --update` with `RANKC_TEST=full` writes this page.",
    ...[...(await forecastsOf()), ...answers].flatMap((a) => ["", `## ${a.question}`, "", "```text", `$ ${a.command}`, ...plain(a), "```"]),
    ...["", "## Is the committed plan current?", "", "```text", "$ rankc compile job.yaml -o plan/ --check"],
    ...["plan/ is current: plan.json and plan.txt are those of the job", "```", ""],
  ].join("\n");
  for (const l of page.split("\n").filter((l) => !/^(DeepSeek|Mixtral)/.test(l)))
    if (!l.startsWith("`") && !l.startsWith("$")) expect(l.length, l).toBeLessThanOrEqual(WIDTH);
  await expect(withoutDigests(page)).toMatchFileSnapshot("../../docs/questions.md");
});
