import { spawn } from "node:child_process";
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { metricsLine, progressLine } from "../../src/cli/progress.ts";
import { builtCli, rankc, rankcProcess } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-cli-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const place = (name: string, text: string): string => {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
};

const job = place(
  "job.yaml",
  `name: small
model: {layers: 2, hidden: 16, ffn: 32, heads: 2, vocab: 256, seq: 8}
parallel: {world: 2, tensor: 2, sequence: true}
train: {global_batch: 2, steps: 3, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`,
);
place("corpus.txt", "It was the best of times, it was the worst of times. ".repeat(40));
const bad = place("bad.yaml", readFileSync(job, "utf8").replace("sequence: true", "sequense: true").replace("heads: 2", "heads: two"));

describe.concurrent("the command line", () => {
  test("check prints all findings and exits with 1", async () => {
    const { exit, out, err } = await rankc("check", bad);
    expect(exit).toBe(1);
    expect(out).toBe("");
    expect(err).toContain("sequense");
    expect(err).toContain("heads");
    expect(err).toMatch(/2 errors/);
  });

  test("check --strict exits with 1 for a warning that the job does not allow", async () => {
    const idle = place(
      "idle.yaml",
      readFileSync(job, "utf8").replace("tensor: 2, sequence: true", "pipeline: 2").replace("global_batch: 2", "global_batch: 1"),
    );
    expect((await rankc("check", idle)).exit).toBe(0);
    const strict = await rankc("check", idle, "--strict");
    expect([strict.exit, strict.out]).toEqual([1, expect.stringContaining("1 warning, which --strict counts as errors")]);
    const allowed = ["--set", "allow=[{code: P108, reason: a test}]"];
    expect((await rankc("check", idle, ...allowed, "--strict")).exit).toBe(0);
    const json = await rankc("check", idle, "--strict", "--format", "json");
    expect([json.exit, JSON.parse(json.out).valid]).toEqual([1, false]);
  });

  test("check as JSON puts the findings on stdout", async () => {
    const { exit, out, err } = await rankc("check", bad, "--format", "json");
    expect(exit).toBe(1);
    expect(err).toBe("");
    expect(JSON.parse(out)).toMatchObject({ valid: false, findings: [{ level: "error" }, { level: "error" }] });
  });

  test("compile writes a complete plan with reproducible bytes, and nothing for an invalid job", async () => {
    const [one, two, none] = [join(folder, "one"), join(folder, "sub", "two"), join(folder, "none")];
    const printed = await Promise.all([
      rankc("compile", job, "-o", one),
      rankc("compile", job, "-o", two, "--format", "json"),
      rankc("compile", bad, "-o", none),
    ]);
    expect(printed.map((s) => s.exit)).toEqual([0, 0, 1]);
    expect(printed[0]!.out).toContain("2 ranks, 1 role");
    expect(JSON.parse(printed[1]!.out)).toMatchObject({ out: two, findings: [], more: {} });
    expect(readdirSync(one).sort()).toEqual(["data_dir.txt", "plan.json", "plan.txt"]);
    expect(readFileSync(join(two, "plan.json"), "utf8")).toBe(readFileSync(join(one, "plan.json"), "utf8"));
    expect(existsSync(none)).toBe(false);

    const [same, differ, inspected] = await Promise.all([
      rankc("diff", one, job),
      rankc("diff", one, job, "--set", "train.optimizer.lr=0.01", "--format", "json"),
      rankc("inspect", one, "--rank", "1"),
    ]);
    expect(same).toMatchObject({ exit: 0, out: "the plans are the same\n" });
    expect(differ.exit).toBe(1);
    expect(JSON.parse(differ.out)).toMatchObject({ changes: true, job: [{ path: "train.optimizer.lr", old: 0.001, new: 0.01 }] });
    expect(inspected.out).toContain("rank 1: stage 0, node 0");

    const plan = readFileSync(join(one, "plan.json"), "utf8");
    writeFileSync(join(one, "plan.json"), plan.replace('"vocab":256', '"vocab":257'));
    const refused = await rankc("run", one);
    expect(refused).toMatchObject({ exit: 2, out: "" });
    expect(refused.err).toContain('section "job" was changed');
    expect(refused.err).not.toMatch(/^\s+at /m);
  });

  test("run trains and writes one line of metrics per step", async () => {
    const metrics = join(folder, "metrics.jsonl");
    const { exit, out, err } = await rankcProcess(
      "run",
      job,
      "--steps",
      "2",
      "--metrics",
      metrics,
      "--dump-grads",
      join(folder, "grads.safetensors"),
    );
    expect(err).toMatch(/step 1\/2 {2}loss 5\.\d+/);
    expect(exit).toBe(0);
    expect(out).toContain("2 steps");
    const lines = readFileSync(metrics, "utf8")
      .trimEnd()
      .split("\n")
      .map((line) => JSON.parse(line));
    const keys = ["step", "loss", "grad_norm", "lr", "tokens", "seconds", "data_wait_seconds"];
    expect(lines.map((line) => Object.keys(line))).toEqual([[...keys, "startup_seconds"], keys]);
    // the parts add up to the time from the begin of the process to the end of step 1, as the line on stderr says
    const { startup_seconds: parts } = lines[0];
    expect(Object.keys(parts)).toEqual(["plan", "device", "kernels", "weights", "first_step"]);
    expect(parts.first_step).toBeGreaterThanOrEqual(lines[0].seconds);
    const total = (Object.values(parts) as number[]).reduce((a, b) => a + b, 0);
    expect(err).toContain(`the first step was done after ${total.toFixed(1)} s: plan ${parts.plan.toFixed(1)}, device `);
    expect(lines.map((line) => line.step)).toEqual([1, 2]);
    expect(existsSync(join(folder, "grads.safetensors"))).toBe(true);
  });

  test.each([
    [["chek", job], /^rankc: there is no command chek\n {2}fix: did you mean check\?\n$/],
    [["run", job, "--backend", "cdua"], /^rankc: --backend is "cdua"\n {2}fix: did you mean cuda\? the choices are cpu, webgpu, cuda\n$/],
    [["check", job, "--sett", "a=1"], /^rankc: there is no option --sett here\n {2}fix: did you mean --set\?\n$/],
    [["check"], /^rankc: the argument <job> is missing\n/],
    [["compile", job, job], /^rankc: compile takes 1 argument, and 2 are given\n/],
    [["compile", job], /compile needs -o DIR/],
    [["run", job, "--steps", "0"], /at least 1/],
    [["inspect", job, "--rank", "2"], /there is no rank 2/],
    [["check", join(folder, "nowhere.yaml")], /does not exist/],
    [["check", folder], /directory/],
    [["explain", "P10"], /did you mean P101/],
    [["compile", job, "-o", join(folder, "corpus.txt")], /is a file, not a directory/],
    [["pack", folder, "-o", join(folder, "a.tar.zst")], /pack writes .tar.xz, and .*a.tar.zst ends with .zst/],
  ] as const)("a user error is one message and exit code 2: %j", async (args, message) => {
    const { exit, out, err } = await rankc(...args);
    expect(err).toMatch(message);
    expect(err).not.toMatch(/^\s+at /m);
    expect(out).toBe("");
    expect(exit).toBe(2);
  });

  test("a plan remembers the folder of its job; --data-dir overrides it, and a moved plan looks beside itself", async () => {
    const plan = join(folder, "far/away/plan");
    expect((await rankc("compile", job, "-o", plan)).exit).toBe(0);
    expect((await rankc("run", plan, "--steps", "1")).err).toContain("step 1/1");
    // the folder has other jobs too, and only one is that of the plan
    expect((await rankc("inspect", plan, "--why", "embed")).out).toMatch(/^key +\S*job\.yaml:4: train: /m);
    expect((await rankc("run", plan, "--steps", "1", "--data-dir", join(folder, "far"))).err).toContain(join(folder, "far"));
    const moved = mkdtempSync(join(tmpdir(), "rankc-moved-"));
    cpSync(plan, join(moved, "a/b/plan"), { recursive: true });
    const { exit, err } = await rankc("run", join(moved, "a/b/plan"), "--steps", "1");
    expect([exit, err]).toEqual([2, expect.stringContaining(moved)]);
    rmSync(moved, { recursive: true });
  });

  test("a plan in place of a job is one message", async () => {
    const plan = join(folder, "instead");
    expect((await rankc("compile", job, "-o", plan)).exit).toBe(0);
    for (const path of [plan, join(plan, "plan.json"), join(plan, "plan.txt")])
      for (const command of ["check", "compile"]) {
        const { exit, err } = await rankc(command, path, ...(command === "compile" ? ["--emit", "model"] : []));
        expect([exit, err.split("\n").length], err).toEqual([2, 3]);
        expect(err).toMatch(/^rankc: .*plan.*, not a job\n {2}fix: name the job's YAML file; rankc inspect, diff, run/);
      }
  });

  test("examples: every job of the copy is valid, and its schema is there; a changed file is not overwritten unasked", async () => {
    const tour = join(folder, "tour");
    expect(await rankc("examples", tour)).toMatchObject({ exit: 0, out: expect.stringContaining("plans/tiny-mixtral/job.yaml") });
    const text = join(tour, "plans/tiny-dense/job.yaml");
    const [schema = ""] = /\$schema=(.*)/.exec(readFileSync(text, "utf8"))?.slice(1) ?? [];
    expect(existsSync(join(tour, "plans/tiny-dense", schema))).toBe(true);
    expect((await rankc("run", text, "--steps", "1")).exit).toBe(0);
    expect((await rankc("examples", tour)).out).toContain("0 files written");
    writeFileSync(text, "mine");
    expect(await rankc("examples", tour)).toMatchObject({ exit: 2, err: expect.stringContaining("differs from the example") });
    expect(readFileSync(text, "utf8")).toBe("mine");
  });

  test("an interrupted run finishes its step and reports the completed steps", async () => {
    const child = spawn(process.execPath, [builtCli(), "run", job, "--steps", "100000"]);
    let err = "";
    child.stderr.on("data", (chunk) => {
      const first = !err.includes("step ");
      err += chunk;
      // once: a second interrupt ends it on the spot
      if (first && err.includes("step ")) child.kill("SIGINT");
    });
    const exit = await new Promise((resolve) => child.on("close", resolve));
    expect(err).toMatch(/interrupted: \d+ of 100000 steps were done/);
    expect(exit).toBe(130);
  });

  test("a command alone and among all others has the same help; each that the help lists is a name of the table", async () => {
    const { out: all } = await rankc("--help");
    const names = [...all.slice(all.indexOf("Commands:")).matchAll(/^ {2}([a-z][a-z-]*)/gm)].map(([, name = ""]) => name);
    expect(names.length).toBeGreaterThan(20);
    // "rankc help NAME" registers every command
    for (const name of names.filter((name) => name !== "help"))
      expect((await rankc(name, "--help")).out, name).toBe((await rankc("help", name)).out);
    expect((await rankc("git-driver")).err).toContain("the argument <what> is missing");
  });

  test("diff says of which job a finding is, and that of both once; a job beside a plan has the target of that plan", async () => {
    const moe = place(
      "moe.yaml",
      readFileSync(job, "utf8")
        .replace("seq: 8}", "seq: 8, moe: {experts: 8, top_k: 2, ffn: 16}}")
        .replace("world: 2", "world: 8")
        .replace("global_batch: 2", "global_batch: 8"),
    );
    const narrow = ["--set-b", "parallel.expert_tensor=4"];
    const { err, exit } = await rankc("diff", moe, moe, "--set", "parallel.expert_tensor=2", ...narrow, "--stat");
    expect(exit).toBe(1);
    const headsOf = (text: string) =>
      text.split("\n").flatMap((line) => /^(both jobs|.*moe\.yaml.*):$|^warning\[(\w+)\]/.exec(line)?.[0] ?? []);
    const first = `${moe} --set parallel.expert_tensor=2`;
    const sharded = "warning[E408]";
    expect(headsOf(err)).toEqual([
      ...["both jobs:", "warning[E404]"],
      ...[`${first}:`, sharded],
      ...[`${first} --set parallel.expert_tensor=4:`, sharded],
    ]);
    const both = await rankc("diff", moe, moe, "--set", "parallel.expert_tensor=2", "--set-b", "train.seed=7", "--stat");
    expect(headsOf(both.err)).toEqual(["both jobs:", sharded, "warning[E404]"]);
    const wrong = await rankc("diff", moe, "--set", "parallel.expert_tensr=2");
    expect(wrong).toMatchObject({ exit: 2 });
    expect(wrong.err).toContain(`${moe} --set parallel.expert_tensr=2:\nerror[S010]`);
    expect(wrong.err).toContain("diff needs valid jobs");
    const plan = join(folder, "gpu-plan");
    await rankc("compile", moe, "--target", "webgpu", "-o", plan);
    expect(await rankc("diff", moe, plan)).toMatchObject({ exit: 0, out: "the plans are the same\n" });
  });

  test("help shows examples and exits with 0", async () => {
    const { exit, out } = await rankc("compile", "--help");
    expect(exit).toBe(0);
    expect(out).toContain("$ rankc compile job.yaml -o plan/");
  });
});

test("a step is one line, and its record has the documented keys", () => {
  const report = { step: 3, loss: 5.25, aux_loss: 0.1, grad_norm: 1.5, lr: 1e-4, tokens: 2048, seconds: 0.5, data_wait_seconds: 0 };
  expect(progressLine(report, 100, 0.5)).toBe("step   3/100  loss 5.2500  grad norm 1.500  lr 1.00e-4  4,096 tokens/s  49 s left");
  const scaled = { ...report, loss_scale: 65536, skipped: false };
  expect(progressLine(scaled, 100, 0.5)).toContain("  lr 1.00e-4  loss scale 2^16  4,096 tokens/s");
  expect(progressLine({ ...scaled, grad_norm: Infinity, loss_scale: 1000, skipped: true }, 100, 0.5)).toContain(
    "loss scale 1000, too large: skipped",
  );
  expect(metricsLine({ ...scaled, grad_norm: Infinity, skipped: true })).toMatch(
    /"grad_norm":null,.*"loss_scale":65536,"skipped":true\}\n$/,
  );
  expect(metricsLine(report)).toBe(
    '{"step":3,"loss":5.25,"grad_norm":1.5,"lr":0.0001,"tokens":2048,"seconds":0.5,"data_wait_seconds":0}\n',
  );
});
