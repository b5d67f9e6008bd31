/** The GitHub Action and the pre-commit hooks: their commands, taken from their YAML, run on a small repository. */
import { execFileSync, spawnSync } from "node:child_process";
import { chmodSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { parse } from "yaml";
import { root } from "../support/checkout.ts";
import { builtCli } from "../support/rankc.ts";
import { full } from "../support/tiers.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-ci-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const [repository, bin, temp] = ["repository", "bin", "temp"].map((name) => join(folder, name)) as [string, string, string];
const at = (...path: string[]): string => join(repository, ...path);
const git = (...args: string[]): string =>
  execFileSync("git", ["-c", "user.name=a", "-c", "user.email=a@example.org", ...args], { cwd: repository, encoding: "utf8" }).trim();

interface Step {
  readonly id: string;
  readonly if?: string;
  readonly run: string;
  readonly env?: Readonly<Record<string, string>>;
}
const action = parse(readFileSync(join(root, ".github/actions/rankc/action.yml"), "utf8")) as {
  readonly inputs: Readonly<Record<string, { readonly default: string }>>;
  readonly runs: { readonly steps: readonly Step[] };
};

let base = "";
beforeAll(() => {
  for (const path of [repository, bin, temp, at("small job")]) mkdirSync(path, { recursive: true });
  writeFileSync(join(bin, "rankc"), `#!/bin/sh\nexec "${process.execPath}" "${builtCli()}" "$@"\n`);
  // in place of GitHub's command line: prints the comments in a file, and appends its arguments and bodies to another
  writeFileSync(
    join(bin, "gh"),
    `#!/bin/bash\ncase "$*" in *--jq*) cat "${temp}/known";; *) echo "$*" >> "${temp}/calls"; cat "\${!#/body=@/}" >> "${temp}/calls" 2>/dev/null || cat "\${@: -1}" > /dev/null;; esac\n`,
  );
  for (const name of ["rankc", "gh"]) chmodSync(join(bin, name), 0o755);
  git("init", "-q", "-b", "main");
  for (const name of ["job.yaml", "plan.txt"]) cpSync(join(root, "plans/tiny-dense", name), at("small job", name));
  git("add", "-A");
  git("commit", "-qm", "a job and its plan");
  base = git("rev-parse", "HEAD");
  git("update-ref", "refs/remotes/origin/main", base);
});

/** Runs a step of the action as GitHub does, for a pull request to main. */
function runStep(id: string, inputs: Readonly<Record<string, string>> = {}) {
  const step = action.runs.steps.find((one) => one.id === id)!;
  const known: Readonly<Record<string, string>> = {
    ...Object.fromEntries(Object.entries(action.inputs).map(([name, input]) => [`inputs.${name}`, inputs[name] ?? input.default])),
    ...{ "runner.temp": temp, "github.token": "a token", "github.event.pull_request.number": "7" },
  };
  const evaluated = (text: string): string =>
    text.replace(/\$\{\{ ([^}]+) \}\}/g, (_, name: string) => {
      if (!Object.hasOwn(known, name)) throw new Error(`the test knows no ${name}`);
      return known[name]!;
    });
  const env = Object.fromEntries(Object.entries(step.env ?? {}).map(([name, value]) => [name, evaluated(value)]));
  const github = {
    ...{ GITHUB_BASE_REF: "main", GITHUB_REPOSITORY: "owner/repository" },
    ...{ GITHUB_OUTPUT: join(temp, "output"), GITHUB_STEP_SUMMARY: join(temp, "summary") },
  };
  const { status, stdout, stderr } = spawnSync("bash", ["--noprofile", "--norc", "-eo", "pipefail", "-c", step.run], {
    cwd: repository,
    env: { ...process.env, ...github, ...env, PATH: `${bin}${delimiter}${process.env.PATH}` },
    encoding: "utf8",
  });
  return { exit: status, out: stdout, err: stderr };
}
const inTemp = (name: string): string => (existsSync(join(temp, name)) ? readFileSync(join(temp, name), "utf8") : "");

test("the action passes a job whose committed plan is current, and has nothing to comment", () => {
  expect(runStep("check")).toMatchObject({ exit: 0, err: "" });
  expect(runStep("compare").exit).toBe(0);
  writeFileSync(join(temp, "known"), "");
  expect(runStep("comment").exit).toBe(0);
  expect([inTemp("rankc.md"), inTemp("calls")]).toEqual(["", ""]);
});

test("a change of the job that leaves the plan as it was fails, with annotations, SARIF, and a comment of the differences", () => {
  writeFileSync(at("small job/job.yaml"), readFileSync(at("small job/job.yaml"), "utf8").replace("tensor: 2", "tensor: 1"));
  git("commit", "-qam", "no tensor parallelism");
  const checked = runStep("check", { sarif: join(temp, "rankc.sarif") });
  expect(checked.exit).toBe(1);
  expect(checked.out).toMatch(/^::error file=small job\/plan\.txt,line=1,.*title=stale-plan%3A /m);
  expect(JSON.parse(inTemp("rankc.sarif"))).toMatchObject({ version: "2.1.0", runs: [{ results: [{ ruleId: "stale-plan" }] }] });
  expect(runStep("compare").exit).toBe(0);
  expect(inTemp("output")).toContain(`markdown=${join(temp, "rankc.md")}`);
  expect(inTemp("summary")).toMatch(/^### `tiny-dense`[\s\S]*`parallel\.tensor` \| `?2/);
  writeFileSync(join(temp, "known"), "");
  expect(runStep("comment").exit).toBe(0);
  expect(inTemp("calls")).toMatch(
    /^api --method POST repos\/owner\/repository\/issues\/7\/comments -F body=@.*\n<!-- rankc -->\n### `tiny-dense`/,
  );
  writeFileSync(join(temp, "known"), "42\n");
  expect(runStep("comment").exit).toBe(0);
  expect(inTemp("calls")).toContain("api --method PATCH repos/owner/repository/issues/comments/42 -F body=@");
});

test("without a job, the action says so", () => {
  expect(runStep("check", { jobs: "none/*.yaml" })).toMatchObject({ exit: 2, out: "::error::no file matches none/*.yaml\n" });
});

test("each step has a condition that GitHub can evaluate, and the install step packs this repository", () => {
  expect(action.runs.steps.map((step) => [step.id, step.if])).toEqual([
    ["install", "inputs.install == 'true'"],
    ["check", undefined],
    ["compare", "always() && (inputs.base != '' || github.event_name == 'pull_request')"],
    ["comment", "always() && inputs.comment == 'true' && github.event_name == 'pull_request'"],
  ]);
  // from the folder of the action to that of package.json
  expect(existsSync(join(root, ".github/actions/rankc/../../../package.json"))).toBe(true);
  expect(action.runs.steps[0]?.run).toContain('cd "$GITHUB_ACTION_PATH/../../.."');
});

test("the pre-commit hooks run on the files that they name", full, () => {
  const hooks = parse(readFileSync(join(root, ".pre-commit-hooks.yaml"), "utf8")) as { id: string; entry: string; files: string }[];
  const job = readFileSync(at("small job/job.yaml"), "utf8");
  writeFileSync(at("small job/job.yaml"), job.replace("world: 4", 'world: "4"'));
  const run = (id: string) => {
    const { entry, files } = hooks.find((hook) => hook.id === id)!;
    const names = git("ls-files")
      .split("\n")
      .filter((name) => new RegExp(files).test(name));
    expect(names).toEqual(["small job/job.yaml"]);
    const [command = "", ...args] = entry.split(" ");
    return spawnSync(join(bin, command), [...args, ...names], { cwd: repository, encoding: "utf8" });
  };
  expect(hooks.map(({ id }) => id)).toEqual(["rankc-check", "rankc-fix", "rankc-plans"]);
  expect(run("rankc-check").stderr).toContain("error[S012]");
  expect(run("rankc-fix").status).toBe(0);
  expect(readFileSync(at("small job/job.yaml"), "utf8")).toBe(job);
  const plans = run("rankc-plans");
  expect([plans.status, plans.stdout]).toEqual([1, expect.stringContaining("small job is stale: plan.txt")]);
});
