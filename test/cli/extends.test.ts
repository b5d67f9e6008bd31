/** Jobs that build on others: `extends`, `-f` and `check --print`. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, posix } from "node:path";
import { afterAll, expect, test } from "vitest";
import { Trouble } from "../../schemas/trouble.ts";
import { readJobAt } from "../../src/cli/loadPlan.ts";
import { asWritten } from "../../src/cli/options.ts";
import { compile } from "../../src/compile.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { resolvedJob } from "../../src/frontend/resolvedJob.ts";
import { root } from "../support/checkout.ts";
import { rankc } from "../support/rankc.ts";

const base = `name: base
model:
  {layers: 2, hidden: 64, heads: 4, kv_heads: 2, vocab: 256, seq: 64, moe: {experts: 4, top_k: 2, ffn: 96, router: {aux_coeff: 0.01}}}
parallel: {world: 4, expert: 4}
train: {global_batch: 4, steps: 20, optimizer: {lr: 3.0e-3, betas: [0.9, 0.99]}}
data: {path: corpus.txt}
cluster: {device: cpu, nodes: 1}
`;

/** Reads job.yaml from a table of files. */
const read = (files: Readonly<Record<string, string>>, { overlays = [], sets = [] }: { overlays?: string[]; sets?: string[] } = {}) =>
  readQuickly(files["job.yaml"] ?? "", "job.yaml", sets, {
    overlays,
    resolve: (path, from) => posix.join(posix.dirname(from), path),
    read: (file) => {
      const text = files[file];
      if (text === undefined) throw new Trouble(`${file} does not exist`, "check the path");
      return text;
    },
  });
const output = (...args: Parameters<typeof read>) => read(...args).findings.map((f) => `${f.code} ${f.path}: ${f.found}`);

test("maps are merged key by key, lists and values are replaced; the order is base, job, overlays, --set", () => {
  const files = {
    "base.yaml": base,
    "job.yaml": "extends: base.yaml\nname: job\ntrain: {optimizer: {betas: [0.8, 0.9]}, steps: 30}\n",
    "a.yaml": "train: {steps: 40, seed: 1}\nname: a\n",
    "b.yaml": "train: {seed: 2}\n",
  };
  const { job, findings } = read(files, { overlays: ["a.yaml", "b.yaml"], sets: ["name=set"] });
  expect(findings).toEqual([]);
  expect(job).toMatchObject({
    name: "set",
    model: { layers: 2 },
    train: { steps: 40, seed: 2, optimizer: { lr: 3e-3, betas: [0.8, 0.9] } },
  });
  // the job is the one that a single file gives
  expect(read({ "job.yaml": base.replace("name: base", "name: job") }).job).toEqual(
    read({ "base.yaml": base, "job.yaml": "extends: base.yaml\nname: job\n" }).job,
  );
});

test("null removes the value of another file; where null is a value, it is that value", () => {
  const files = {
    "base.yaml": base,
    "job.yaml": "extends: base.yaml\nparallel: {world: 16}\ntrain: {global_batch: 16}\ncluster: {nodes: null}\n",
  };
  expect(read(files).job?.cluster.nodes).toBe(2);
  expect(read({ ...files, "job.yaml": "extends: base.yaml\nmodel: {moe: null}\nparallel: {expert: null}\n" }).job).toMatchObject({
    model: { moe: null },
    parallel: { expert: 1 },
  });
  // without a base there is nothing to remove
  expect(output({ "job.yaml": base.replace("nodes: 1", "nodes: null") })).toEqual(["S011 cluster.nodes: cluster.nodes is empty"]);
});

test("a finding names the file and line of the value; a value that is no map hides the keys below it", () => {
  const files = {
    "config/base.yaml": base,
    "config/middle.yaml": "extends: base.yaml\n# two more layers\nmodel: {layers: 4}\n",
    "job.yaml": "extends: config/middle.yaml\nparallel: {world: 6}\n",
    "o.yaml": "\n\nmodel: [1]\n",
  };
  const { source, findings } = read(files);
  expect(source.at("model.layers")).toMatchObject({ file: "config/middle.yaml", line: 3, col: 17 });
  expect(source.at("model.moe.top_k")).toMatchObject({ file: "config/base.yaml", line: 3 });
  expect(source.at("parallel.world")).toMatchObject({ file: "job.yaml", line: 2 });
  expect(source.at("train.seed")).toMatchObject({ file: "config/base.yaml", line: 5, col: 1 });
  const expert = findings.find(({ path }) => path === "parallel.expert");
  expect(expert).toMatchObject({ at: { file: "config/base.yaml", line: 4 } });
  expect(expert?.related).toContainEqual(expect.objectContaining({ file: "job.yaml", line: 2, label: "parallel.world" }));
  const [shape] = read(files, { overlays: ["o.yaml"] }).findings;
  expect(shape).toMatchObject({ code: "S012", found: "model is a list of 1", at: { file: "o.yaml", line: 3 } });
});

test("all faults of all files are reported, each in its file", () => {
  const { findings } = read(
    { "job.yaml": "extends: b.yaml\nname: [\n", "b.yaml": "a: 1\na: 2\n", "o.yaml": "- 1\n" },
    { overlays: ["o.yaml"] },
  );
  expect(findings.map(({ code, at }) => [code, at && "file" in at && at.file])).toEqual([
    ["S001", "job.yaml"],
    ["S005", "o.yaml"],
  ]);
  expect(output({ "job.yaml": "extends: b.yaml\n", "b.yaml": "a: 1\na: 2\n" })).toEqual(["S002 : the key occurs twice in one map"]);
});

test("a base that is missing, a circle, an endless chain and a value that is no path are findings at extends", () => {
  expect(output({ "job.yaml": "extends: a/b.yaml\n" })).toEqual(["S007 extends: a/b.yaml does not exist"]);
  expect(output({ "job.yaml": "extends: ./job.yaml\n" })).toEqual(["S008 extends: job.yaml extends job.yaml"]);
  const circle = { "job.yaml": "extends: d/a.yaml\n", "d/a.yaml": "extends: b.yaml\n", "d/b.yaml": "extends: ../d/a.yaml\n" };
  expect(output(circle)).toEqual(["S008 extends: d/a.yaml extends d/b.yaml extends d/a.yaml"]);
  expect(read(circle).findings[0]?.at).toMatchObject({ file: "d/b.yaml", line: 1, col: 10 });
  const chain = Object.fromEntries(Array.from({ length: 40 }, (_, i) => [`${i}.yaml`, `extends: ${i + 1}.yaml\n`]));
  expect(output({ ...chain, "job.yaml": "extends: 0.yaml\n" })).toEqual(["S007 extends: a chain of more than 32 files"]);
  for (const [value, found] of [
    ["[a.yaml, b.yaml]", "a list of 2"],
    ["{a: 1}", "a map"],
    ["", "empty"],
    ['" "', "empty"],
    ["7", "7"],
  ])
    expect(output({ "job.yaml": `extends: ${value}\n` })).toEqual([`S007 extends: extends is ${found}`]);
  // a text alone has no files beside it
  expect(readQuickly("extends: base.yaml\n", "job.yaml", []).findings).toEqual([expect.objectContaining({ code: "S007" })]);
  expect(output({ "job.yaml": base }, { sets: ["extends=x.yaml"] })).toEqual([expect.stringMatching(/^S006 .*before --set/)]);
});

test("a key named __proto__ stays a key", () => {
  expect(output({ "base.yaml": base, "job.yaml": "extends: base.yaml\n__proto__: {a: 1}\n" })).toEqual([
    expect.stringMatching(/^S010 __proto__/),
  ]);
});

test.each(readdirSync(join(root, "plans")))("what --print prints of plans/%s is the same job, with and without defaults", (name) => {
  const text = readFileSync(join(root, "plans", name, "job.yaml"), "utf8");
  const { job, source } = readQuickly(text, "job.yaml", []);
  for (const complete of [undefined, job]) {
    const printed = resolvedJob(source, complete).text();
    expect(readQuickly(printed, "printed.yaml", []).job).toEqual(job);
    expect(printed).toMatch(/^name: .* {2}# job\.yaml:\d+$/m);
  }
});

test("--print aligns the origins: files, --set and defaults", () => {
  const files = { "base.yaml": base, "job.yaml": 'extends: base.yaml\nname: "a # b"\nallow: [C504]\n' };
  const { source, job } = read(files, { sets: ["train.steps=5"] });
  expect(resolvedJob(source).text()).toMatchInlineSnapshot(`
    "name: "a # b"           # job.yaml:2
    model:
      layers: 2             # base.yaml:3
      hidden: 64            # base.yaml:3
      heads: 4              # base.yaml:3
      kv_heads: 2           # base.yaml:3
      vocab: 256            # base.yaml:3
      seq: 64               # base.yaml:3
      moe:
        experts: 4          # base.yaml:3
        top_k: 2            # base.yaml:3
        ffn: 96             # base.yaml:3
        router:
          aux_coeff: 0.01   # base.yaml:3
    parallel:
      world: 4              # base.yaml:4
      expert: 4             # base.yaml:4
    train:
      global_batch: 4       # base.yaml:5
      steps: 5              # --set train.steps=5
      optimizer:
        lr: 0.003           # base.yaml:5
        betas: [0.9, 0.99]  # base.yaml:5
    data:
      path: corpus.txt      # base.yaml:6
    cluster:
      device: cpu           # base.yaml:7
      nodes: 1              # base.yaml:7
    allow: [C504]           # job.yaml:3
    "
  `);
  expect(resolvedJob(source, job).origins["train.seed"]).toBe("default");
});

const folder = mkdtempSync(join(tmpdir(), "rankc-extends-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const write = (path: string, text: string): void => {
  mkdirSync(join(folder, path, ".."), { recursive: true });
  writeFileSync(join(folder, path), text);
};
const at = (path: string): string => join(folder, path);

/** Runs with the folder as the current one. */
async function within<T>(act: () => Promise<T>): Promise<T> {
  const before = process.cwd();
  process.chdir(folder);
  try {
    return await act();
  } finally {
    process.chdir(before);
  }
}

test("a job of a revision extends the file of that revision, and its plan is that of the job in one file", async () => {
  write("git/bases/base.yaml", base);
  write("git/jobs/job.yaml", "extends: ../bases/base.yaml\nname: job\n");
  const git = (...args: string[]) =>
    execFileSync("git", ["-c", "user.name=a", "-c", "user.email=a@example.org", ...args], { cwd: at("git") });
  git("init", "-q");
  git("add", "-A");
  git("commit", "-qm", "jobs");
  write("git/bases/base.yaml", base.replace("layers: 2", "layers: 4"));
  const layers = async (path: string) => (await within(() => readJobAt(path, asWritten))).job?.model.layers;
  expect(await layers("git/jobs/job.yaml")).toBe(4);
  await within(async () => {
    process.chdir("git/jobs");
    expect((await readJobAt("git:HEAD:job.yaml", asWritten)).job?.model.layers).toBe(2);
    const overlaid = await readJobAt("job.yaml", { set: [], overlay: ["git:HEAD:../bases/base.yaml"] });
    expect(overlaid.job).toMatchObject({ name: "base", model: { layers: 2 } });
  });
  const { job } = await within(() => readJobAt("git/jobs/job.yaml", asWritten));
  const flat = read({ "job.yaml": base.replace("layers: 2", "layers: 4").replace("name: base", "name: job") }).job;
  if (!job || !flat) throw new Error("a job is invalid");
  expect(compile(job).plan.digests).toEqual(compile(flat).plan.digests);
});

test("the command line prints the resolved job, and states what is wrong with an overlay or a base", async () => {
  write("bäse ☃.yaml", base);
  write("job.yaml", 'extends: "bäse ☃.yaml"\n');
  write("folder/x", "");
  write("folder.yaml", "extends: folder\n");
  write("bytes.yaml", "extends: bytes.bin\n");
  writeFileSync(at("bytes.bin"), new Uint8Array([0xff, 0xfe, 0]));
  write("list.yaml", "model: [1, 2]\n");
  await within(async () => {
    const printed = await rankc("check", "job.yaml", "-f", "git-less.yaml");
    expect(printed).toMatchObject({ exit: 2, out: "" });
    expect(printed.err).toContain("git-less.yaml does not exist");
    const fine = await rankc("check", "job.yaml", "--print", "--set", "train.steps=3");
    expect(fine.exit).toBe(0);
    expect(fine.out).toMatch(/^name: base +# bäse ☃\.yaml:1\n[\s\S]*steps: 3 +# --set train\.steps=3\n/);
    const json = JSON.parse((await rankc("check", "job.yaml", "--print", "--defaults", "--format", "json")).out);
    expect(json.resolved).toMatchObject({ job: { train: { seed: 1234 } }, origins: { name: "bäse ☃.yaml:1", "train.seed": "default" } });
    const list = await rankc("check", "job.yaml", "-f", "list.yaml");
    expect(list.exit).toBe(1);
    expect(list.err).toMatch(/list\.yaml:1:1\n[\s\S]*model is a list of 2/);
    expect((await rankc("check", "job.yaml", "--defaults")).err).toContain("--defaults needs --print");
  });
  const found = async (path: string) => (await within(() => readJobAt(path, asWritten))).findings.map((f) => `${f.code} ${f.found}`);
  expect(await found("folder.yaml")).toEqual(["S007 folder is a directory, not a job"]);
  expect(await found("bytes.yaml")).toEqual(["S007 bytes.bin is not text: its bytes are not UTF-8"]);
});
