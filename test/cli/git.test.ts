/** Golden plans in git: `compile --check`, `git-setup` and `git:REV:PATH`, on a repository. */
import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { root } from "../support/checkout.ts";
import { rankc, rankcProcess } from "../support/rankc.ts";

const repository = mkdtempSync(join(tmpdir(), "rankc-git-"));
afterAll(() => rmSync(repository, { recursive: true, force: true }));
const at = (...path: string[]): string => join(repository, ...path);
const git = (...args: string[]): string =>
  execFileSync("git", ["-c", "user.name=a", "-c", "user.email=a@example.org", ...args], {
    cwd: repository,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
  });

/** Runs the command line inside the repository. */
const inside = async (...args: string[]) => {
  const before = process.cwd();
  process.chdir(repository);
  try {
    // git-setup writes the command by which this process was started
    return await (args[0] === "git-setup" ? rankcProcess : rankc)(...args);
  } finally {
    process.chdir(before);
  }
};

beforeAll(async () => {
  git("init", "-q");
  cpSync(join(root, "plans/tiny-dense/job.yaml"), at("job.yaml"));
  expect((await inside("compile", "job.yaml", "-o", "plan")).exit).toBe(0);
  expect((await inside("git-setup")).out).toContain("now has the line");
  git("add", "-A");
  git("commit", "-qm", "a plan");
});

test("git-setup writes one line of .gitattributes and the driver of the clone, and changes nothing when it runs again", async () => {
  const again = await inside("git-setup");
  expect(again).toMatchObject({ exit: 0, err: "" });
  expect(readFileSync(at(".gitattributes"), "utf8")).toBe("plan.json diff=rankc linguist-generated\n");
  expect(git("config", "--get", "diff.rankc.command")).toContain("git-driver diff");
});

test("outside a repository, and where plans have another driver, git-setup reports it", async () => {
  writeFileSync(at(".gitattributes"), "plan.json diff=other\n");
  const other = await inside("git-setup");
  git("checkout", "-q", ".gitattributes");
  expect(other).toMatchObject({ exit: 2, out: "" });
  expect(other.err).toContain("has another driver for plans: plan.json diff=other");
});

test("--check is 0 for the plan of the job, 1 with the differences for another, 2 where there is none", async () => {
  expect(await inside("compile", "job.yaml", "-o", "plan", "--check")).toMatchObject({
    exit: 0,
    out: "plan is current: plan.json and plan.txt are those of the job\n",
  });
  const stale = await inside("compile", "job.yaml", "-o", "plan", "--check", "--set", "parallel.tensor=1");
  expect(stale.exit).toBe(1);
  expect(stale.out).toMatch(/parallel\.tensor {2}2 -> 1[\s\S]*plan is stale: plan\.json, plan\.txt; compile the job again/);
  const none = await inside("compile", "job.yaml", "-o", "nowhere", "--check");
  expect(none).toMatchObject({ exit: 2, out: "" });
  expect(none.err).toContain("no plan.json and no plan.txt to check");
  expect(git("status", "--porcelain")).toBe("");
});

test("a plan.txt alone, as in plans/, is checked too; a damaged plan.json is stale", async () => {
  cpSync(at("plan/plan.txt"), at("text/plan.txt"));
  expect((await inside("compile", "job.yaml", "-o", "text", "--check")).out).toContain("text is current: plan.txt");
  writeFileSync(at("text/plan.txt"), readFileSync(at("text/plan.txt"), "utf8").replace("rmsnorm", "layernorm"));
  const changed = await inside("compile", "job.yaml", "-o", "text", "--check");
  expect(changed).toMatchObject({ exit: 1 });
  expect(changed.out).toMatch(/plan\.txt differs from line \d+ on:\n {2}- .*layernorm.*\n {2}\+ .*rmsnorm/);
  const json = await inside("compile", "job.yaml", "-o", "text", "--check", "--format", "json");
  expect([json.exit, json.err]).toEqual([1, ""]);
  const stale = { code: "stale-plan", level: "error", spans: [{ file: "text/plan.txt", line: 1 }] };
  expect(JSON.parse(json.out)).toMatchObject({ format_version: "1.0", valid: true, changes: true, findings: [stale] });
  writeFileSync(at("text/plan.json"), "{}");
  expect((await inside("compile", "job.yaml", "-o", "text", "--check")).out).toContain("not a plan");
  rmSync(at("text"), { recursive: true });
});

test("git diff shows the differences as rankc does, git show compares texts, and diff reads revisions", async () => {
  writeFileSync(at("job.yaml"), readFileSync(at("job.yaml"), "utf8").replace("tensor: 2", "tensor: 1"));
  expect((await inside("compile", "job.yaml", "-o", "plan")).exit).toBe(0);
  const shown = git("diff", "--", "plan/plan.json");
  expect(shown).toMatch(/^diff rankc plan\/plan\.json\ntiny-dense[\s\S]*consequences, the gravest first/);
  expect(git("show", "--", "plan/plan.json")).toContain("+memory of a rank:");
  const revisions = await inside("diff", "git:HEAD:plan", "plan", "--only", "job");
  expect(revisions.exit).toBe(1);
  expect(revisions.out).toContain("parallel.tensor  2 -> 1");
  const jobs = await inside("diff", "git:HEAD:job.yaml", "git:HEAD:plan/plan.json", "--format", "json");
  expect(jobs.exit).toBe(0);
  expect(JSON.parse(jobs.out)).toMatchObject({ format_version: "1.1", changes: false });
  const missing = await inside("diff", "git:nowhere:plan", "plan");
  expect(missing).toMatchObject({ exit: 2, out: "" });
  expect(missing.err).toMatch(/git cat-file failed: .*nowhere/);
});

test("--set with one job compares it with its changed self", async () => {
  const changed = await inside("diff", "job.yaml", "--set", "train.seed=7", "--format", "json");
  expect(changed.exit).toBe(1);
  expect(JSON.parse(changed.out)).toMatchObject({ job: [{ path: "train.seed", new: 7 }] });
  expect((await inside("diff", "job.yaml", "--set-a", "train.seed=7", "--set-b", "train.seed=7")).out).toBe("the plans are the same\n");
  expect((await inside("diff", "job.yaml")).err).toContain("needs a second plan or job");
  expect((await inside("diff", "plan", "--set", "train.seed=7")).err).toContain("--set needs a job");
});
