import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { expect, test } from "vitest";
import { generated } from "../../schemas/generate.ts";
import { Job } from "../../schemas/job.ts";
import { readJobFile } from "../../src/cli/inputFiles.ts";
import { renderFindings } from "../../src/frontend/diagnostic.ts";
import { readSource } from "../../src/frontend/jobFiles.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";

import { opNamesText } from "../../src/ops/generateNames.ts";
import { smallest } from "../../src/rules/index.ts";

const root = new URL("../..", import.meta.url).pathname;
const say = (text: string, sets: readonly string[] = []) =>
  readJob(text, "job.yaml", sets).findings.map((f) => `${f.code} ${f.path}: ${f.found}. ${f.fix}`);

test("every key and value finds its place", () => {
  const { source } = readSource("model:\n  hidden: 64\n  moe: {top_k: 2}\ntrain:\n  optimizer: {betas: [0.9, 0.95]}\n", "f");
  expect(source.at("model.hidden")).toEqual({ file: "f", line: 2, col: 11, endCol: 13, lineText: "  hidden: 64" });
  expect(source.at("model.hidden", "key")).toMatchObject({ line: 2, col: 3, endCol: 9 });
  expect(source.at("model.moe.top_k")).toMatchObject({ line: 3, col: 16, endCol: 17 });
  expect(source.at("train.optimizer.betas.1")).toMatchObject({ line: 5, col: 28, endCol: 32 });
  expect(source.at("model.moe.router.score")).toMatchObject({ line: 3, col: 3, endCol: 6 }); // the deepest ancestor that is written
  expect(source.at("cluster.nodes")).toMatchObject({ line: 1, col: 1 });
});

test("CRLF line ends, a byte order mark and anchors do not move places", () => {
  const { source } = readSource("\ufeffa: &x\r\n  b: 1\r\nc: *x\r\n", "f");
  expect(source.at("a.b")).toMatchObject({ line: 2, col: 6, lineText: "  b: 1" });
  expect(source.at("c.b")).toMatchObject({ line: 2, col: 6 });
});

test("faults of a text have plain messages", () => {
  expect(say("name: [a\nmodel: {}\n")[0]).toMatch(/^S001 /);
  expect(say("\tname: a\n")[0]).toMatch(/^S001 .*indent with spaces/);
  expect(say("name: a\nname: b\n")).toEqual([expect.stringMatching(/^S002 .*keep one of them/)]);
  expect(say("name: *a\n")).toEqual([expect.stringMatching(/^S003 /)]);
  expect(say("name: a\n---\nname: b\n")).toEqual([expect.stringMatching(/^S004 /)]);
  for (const text of ["", "# nothing\n", "- a\n", "42\n"]) expect(say(text)).toEqual([expect.stringMatching(/^S005 /)]);
  expect(say(`a: ${"[".repeat(100_000)}`)[0]).toMatch(/^S001 .*nest/);
});

test("an alias bomb is refused at once", () => {
  const level = (n: number) => `k${n}: &k${n} [${Array.from({ length: 10 }, () => `*k${n - 1}`).join(", ")}]\n`;
  const bomb = `k0: &k0 [lol]\n${Array.from({ length: 9 }, (_, i) => level(i + 1)).join("")}`;
  // against exponential time: it takes milliseconds of processor time
  const before = process.cpuUsage();
  expect(say(bomb)).toEqual([expect.stringMatching(/^S003 /)]);
  const { user, system } = process.cpuUsage(before);
  expect((user + system) / 1e6).toBeLessThan(1);
});

test("an unknown key is answered with the key that was meant", () => {
  const fix = (set: string) => readJob(smallest, "j", [set]).findings.map((f) => `${f.code} ${f.fix}`);
  expect(fix("model.hiden=3")).toEqual(["S010 did you mean model.hidden?"]);
  expect(fix("model.tensor=1")).toEqual(["S010 did you mean parallel.tensor?"]);
  expect(fix("parallel.tp=1")).toEqual(["S010 did you mean parallel.tensor?"]);
  expect(fix("num_layers=2")).toEqual(["S010 did you mean model.layers?"]);
  expect(fix("model.rope.qqqqqq=2")).toEqual(["S010 leave it out; the keys here are theta, fraction, interleaved, scaling"]);
  expect(fix("__proto__.a=2")).toEqual([expect.stringMatching(/^S010 /)]);
  expect(({} as Record<string, unknown>).a).toBeUndefined();
});

test("a key that takes a number or a word: a text near the word is a choice, another is of the wrong type, a quoted number is a number", () => {
  const of = (value: string): string[] => say(smallest, [`parallel.tensor=${value}`]);
  expect(of("aut")).toEqual([expect.stringMatching(/^S013 .*did you mean auto\?/)]);
  expect(of("abc")).toEqual([expect.stringMatching(/^S012 .*write a whole number of at least 1 or auto$/)]);
  expect(of('"1"')).toEqual([expect.stringMatching(/^S012 .*write the number 1, without quotes or separators$/)]);
});

test("a misspelt key is one finding, and rules still apply in the same run", () => {
  const text = smallest.replace("hidden: 16", "hiden: 16").replace("{world: 1}", '{world: "6", tp: 4}');
  expect(readJob(text, "j").findings.map((f) => `${f.code} ${f.path}`)).toEqual([
    "S010 model.hiden",
    "S012 parallel.world",
    "S010 parallel.tp",
    "P101 parallel.world",
  ]);
});

test("values of the wrong type are reported with the expected type", () => {
  const text = `name: 3
model: {layers: "32", hidden: 8.5, heads: 0, qk_norm: heads, vocab: [1], activation: relu, moe: {experts: 2, top_k: 1, rows_bound: wors}}
train: {steps: 1, optimizer: {lr: 1_000, betas: [1]}}
data: {path: x, order: true}
cluster: 3
parallel:
`;
  expect(say(text)).toMatchInlineSnapshot(`
    [
      "S012 name: name is 3. write some text",
      "S012 model.layers: model.layers is the text "32". write the number 32, without quotes or separators",
      "S012 model.hidden: model.hidden is 8.5. write a whole number of at least 1",
      "S014 model.heads: model.heads is 0. write a whole number of at least 1",
      "S012 model.vocab: model.vocab is a list of 1. write a whole number of at least 1",
      "S011 model.seq: model.seq is not written. write model.seq: a whole number of at least 1",
      "S013 model.activation: model.activation is the text "relu". did you mean gelu? The choices are swiglu, geglu, quick_geglu, gelu, gelu_tanh or squared_relu",
      "S013 model.qk_norm: model.qk_norm is the text "heads". did you mean head? The choices are none, head or full",
      "S013 model.moe.rows_bound: model.moe.rows_bound is the text "wors". did you mean worst? The choices are worst or a number of at least 1",
      "S012 parallel: parallel is empty. leave it out, or write a section with the keys world, tensor, sequence, pipeline, virtual_pipeline, layout, schedule, expert, expert_tensor, context, context_method, data, distributed_optimizer, optimizer_instances, gradient_bucket, parameter_bucket, parameter_gather, expert_overlap, tensor_overlap, communication_sms, order",
      "S012 train.optimizer.lr: train.optimizer.lr is the text "1_000". write the number 1000, without quotes or separators",
      "S012 train.optimizer.betas: train.optimizer.betas is a list of 1. write a list of 2 numbers",
      "S013 data.order: data.order is true. write sequential or shuffled",
      "S012 cluster: cluster is 3. write a section with the keys nodes, gpus_per_node, device",
    ]
  `);
});

test("--set is checked as if it were written, and is named as the place", () => {
  const { findings } = readJob(smallest, "job.yaml", ["parallel.world=6", "parallel.tensor=4"]);
  expect(renderFindings(findings, { color: false })).toMatchInlineSnapshot(`
    "error[P101]: world is not the product of tensor, pipeline, context and data
     --> --set parallel.world=6
     ::: --set parallel.tensor=4
      = found: world 6 is not a multiple of tensor 4 x pipeline 1 x context 1 = 4
      = why:   Every rank has one coordinate on each axis of the dense grid, so the product of the
               degrees is the number of ranks.
      = fix:   parallel.world: 4 (change world or a degree so that the product divides world)

    1 error
    "
  `);
  expect(readJob(smallest, "j", ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.router.aux_coeff=0.1"]).job?.model.moe?.ffn).toBe(
    48,
  );
  expect(readJob(smallest, "j", ["train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas.0=0.7"]).job?.train.optimizer.betas).toEqual([
    0.7, 0.9,
  ]);
  for (const set of ["model.layers", "=3", "model.layers.x=3", "model.layers=[", "a..b=1"])
    expect(readJob(smallest, "j", [set]).findings.map((f) => f.code)).toEqual(["S006"]);
});

test("no text makes the reader throw", () => {
  const piece = fc.oneof(
    fc.string(),
    fc.constantFrom("name: a\n", "model:", "{", "}", "[", "]", "&a ", "*a", ": ", "- ", "\n", "  ", "!!int ", "|\n", "'", '"', "%"),
  );
  fc.assert(
    fc.property(fc.array(piece, { maxLength: 30 }), fc.array(fc.string(), { maxLength: 2 }), (parts, sets) => {
      const { findings, job } = readJob(parts.join(""), "f", sets);
      expect(job === undefined).toBe(findings.some((f) => f.level === "error"));
      renderFindings(findings, { color: true });
    }),
    { numRuns: 300 },
  );
});

test("no escape sequence of a file reaches the terminal, and long lines are shortened around the caret", () => {
  const { findings } = readJob(`name: a\n"bad\\e[31m": ${"x".repeat(5000)}\n`, "f");
  const text = renderFindings(findings, { color: false });
  expect(text).not.toContain("\u001b");
  expect(Math.max(...text.split("\n").map((l) => l.length))).toBeLessThan(130);
});

test("a file that is not a job is a user error of one line", () => {
  const dir = mkdtempSync(join(tmpdir(), "rankc-"));
  const file = (name: string, content: string | Uint8Array) => {
    writeFileSync(join(dir, name), content);
    return join(dir, name);
  };
  try {
    expect(() => readJobFile(join(dir, "none.yaml"))).toThrow("does not exist");
    expect(() => readJobFile(dir)).toThrow("is a directory");
    expect(() => readJobFile("/dev/zero")).toThrow("is not a file");
    expect(() => readJobFile(file("big", "x".repeat(2 ** 20 + 1)))).toThrow("1 MiB");
    expect(() => readJobFile(file("bytes", new Uint8Array([0xff, 0xfe, 1])))).toThrow("not UTF-8");
    expect(() => readJobFile(file("zero", "a\0b"))).toThrow("zero bytes");
    expect(readJobFile(file("good", smallest))).toBe(smallest);
  } finally {
    rmSync(dir, { recursive: true });
  }
});

// Megatron's default cuts experts over the tensor ranks: groups of 16 ranks, on two nodes
test.each([
  ["mixtral-8x7b-16gpu", ["C504"]],
  ["tiny-mixtral", []],
  ["tiny-dense", []],
])("plans/%s is a valid job with the findings %j", (name, codes) => {
  const { job, findings } = readJob(readFileSync(join(root, "plans", name, "job.yaml"), "utf8"), "job.yaml");
  expect(findings.map((f) => f.code)).toEqual(codes);
  expect(Job.parse(job)).toEqual(job); // nothing optional is left
});

test("the committed names of ops and JSON Schemas are up to date: npm run schemas writes them", () => {
  expect(readFileSync(join(root, "schemas/opNames.ts"), "utf8")).toBe(opNamesText());
  for (const [file, content] of Object.entries(generated()))
    expect(readFileSync(join(root, "schemas", file), "utf8") === content, file).toBe(true);
});
