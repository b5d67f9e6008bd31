/** `check --fix`: the safe fixes of a job in its own text, whose comments, order and layout stay. */
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { applyPatch } from "diff";
import fc from "fast-check";
import { afterAll, expect, test } from "vitest";
import { parse, stringify } from "yaml";
import { badJob } from "../../src/frontend/explain.ts";
import { fixJob } from "../../src/frontend/fixJob.ts";
import { changedText, editBetween } from "../../src/frontend/keyEdits.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { keysAt } from "../../src/frontend/shapeFaults.ts";
import { rules } from "../../src/rules/all.ts";
import { smallest } from "../../src/rules/index.ts";
import { rankc } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-fix-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const fix = (text: string, sets: readonly string[] = []) =>
  fixJob(text, {
    job: async (of) => readJob(of, "job.yaml", sets),
    file: async (of) => readJob(of, "job.yaml"),
  });
const comments = (text: string): string[] => (text.match(/# note \d+/g) ?? []).sort();

test("everything but the fixed keys stays: comments and their columns, order, quotes, blank lines", async () => {
  const { text, applied, read } = await fix(`# yaml-language-server: $schema=schemas/job.schema.json
name: first   # a name
model:
  layers: "2"            # two of them
  hiden: 64              # width
  heads: 4
  vocab: 256               # ids of the byte tokenizer
  seq: 64
  moe: {experts: 4, top_k: 2, ffn: 96, router: {aux_coeff: 0.01}}
parallel: # ranks
    world: 4
    tensor: 2  # two

    expert: 4
# training
train: {global_batch: 4, steps: 20, precision: 'FP32', optimizer: {lr: 3.0e-3, momentum: 0.5}}

data: {path: corpus.txt}
cp: 1    # the last line`);
  expect(text).toMatchInlineSnapshot(`
    "# yaml-language-server: $schema=schemas/job.schema.json
    name: first   # a name
    model:
      layers: 2              # two of them
      hidden: 64             # width
      heads: 4
      vocab: 256               # ids of the byte tokenizer
      seq: 64
      moe: {experts: 4, top_k: 2, ffn: 96, router: {aux_coeff: 0.01}}
    parallel: # ranks
        world: 4
        tensor: 2  # two
        sequence: true

        expert: 4
        context: 1    # the last line
    # training
    train: {global_batch: 4, steps: 20, precision: 'fp32', optimizer: {lr: 3.0e-3}}

    data: {path: corpus.txt}"
  `);
  expect(applied.map(({ finding }) => finding.code)).toEqual(["S012", "S010", "S013", "S010", "P104", "B223"]);
  expect(read.findings).toEqual([]);
});

const safe = rules.filter(({ bad }) => readJob(badJob(bad), "job.yaml").findings[0]?.isSafe);
test.each(safe.map((rule) => [rule.code, rule] as const))("%s is fixed in any layout", async (code, { bad }) => {
  const value: unknown = parse(badJob(bad));
  const block = stringify(value);
  const layouts = [
    block,
    block.replaceAll("\n", "\r\n"),
    block.replace(/\n$/, ""),
    stringify(value, { indent: 4 }),
    stringify(value, { collectionStyle: "flow" }),
    stringify(value, { collectionStyle: "flow", lineWidth: 20 }),
    // a comment beside every key
    block
      .split("\n")
      .map((line, i) => (line === "" ? line : `${line}   # note ${i}`))
      .join("\n"),
  ];
  for (const layout of layouts) {
    const { text, read, left } = await fix(layout);
    expect(read.findings.map((f) => f.code)).not.toContain(code);
    expect(left).toEqual([]);
    expect(comments(text)).toEqual(comments(layout));
    expect(text.includes("\r\n")).toBe(layout.includes("\r\n"));
    expect(/[^\r]\n/.test(text) && text.includes("\r\n")).toBe(false);
    // a second run finds nothing to do
    expect((await fix(text)).text).toBe(text);
  }
});

test("a job in JSON stays JSON", async () => {
  const moe = { experts: 4, top_k: 2, router: { aux_coeff: 0.01 } };
  const job = { ...(parse(smallest) as object), parallel: { world: 4, tensor: 2, expert: 4 } };
  const text = JSON.stringify({ ...job, model: { layers: "2", hidden: 16, heads: 4, vocab: 768, seq: 48, moe } }, null, 2);
  const fixed = await fix(text.replace('"steps"', '"global_batch": 2, "steps"'));
  expect(fixed.applied.map(({ finding }) => finding.code)).toEqual(["S012", "P104"]);
  expect(JSON.parse(fixed.text)).toMatchObject({ model: { layers: 2 }, parallel: { tensor: 2, sequence: true, expert: 4 } });
});

test("the rules with a safe fix: none of them changes what an author has to decide", () => {
  expect(safe.map(({ code }) => code).join(" ")).toMatchInlineSnapshot(
    `"P104 P105 P110 B223 B235 B240 B239 B224 B232 M330 M333 E410 E444 E445"`,
  );
});

const head =
  "name: a\nmodel: {layers: 2, hidden: 16, heads: 2, vocab: 256, seq: 8}\ntrain: {steps: 2, global_batch: 2, optimizer: {lr: 1.0e-3}}\ndata: {path: x}\n";
test.each([
  ["a guess", "model: {activation: relu}", "S013"],
  ["a key whose right name is written, too", "parallel: {tensor: 1, tp: 2}", "S010"],
  ["a value that an alias shares", "parallel: {world: 2, sequence: &s true, distributed_optimizer: *s}", "P105"],
  ["a fix that leaves another finding", "parallel: {world: 2, tensor: 2}\nfp16: true", "S010"],
  ["two keys that disagree", "parallel: {world: 8, tensor: 2, data: 3}", "P101"],
])("%s is not fixed", async (_, more, code) => {
  const before = `${head.replace(/^model.*\n/m, more.startsWith("model") ? "" : "$&")}${more}\n`;
  const { text, applied, read } = await fix(before);
  expect([text, applied]).toEqual([before, []]);
  expect(read.findings.map((f) => f.code)).toContain(code);
});

test("a fix of a key of --set is named, and the file stays; a fix that only the options need does not enter the file", async () => {
  const given = await fix(head, ["parallel.sequence=true"]);
  expect(given.text).toBe(head);
  expect(given.left.map(({ change, why }) => `${change}; ${why}`)).toEqual([
    "parallel.sequence left out; --set parallel.sequence=true is not written in the file",
  ]);
  const job = `${head.replace("seq: 8", "seq: 8, moe: {experts: 2, top_k: 1, router: {aux_coeff: 0.01}}")}parallel: {world: 2}\n`;
  const needed = await fix(job, ["parallel.tensor=2"]);
  expect(needed.text).toBe(job);
  expect(needed.left.map(({ why }) => why)).toEqual([expect.stringContaining("it would cause P105")]);
});

test("a key of the file that a job extends stays, and is named", async () => {
  const base = `${head}parallel: {sequence: true}\n`;
  const files = { overlays: [], resolve: (path: string) => path, read: () => base };
  const job = async (text: string) => readQuickly(text, "job.yaml", [], files);
  const { text, applied, left } = await fixJob("extends: base.yaml\ntrain: {optimizer: {momentum: 0.5}}\n", { job, file: job });
  expect(text).toBe("extends: base.yaml\ntrain: {optimizer: {}}\n");
  expect(applied.map(({ finding }) => finding.code)).toEqual(["B223"]);
  expect(left.map(({ finding, why }) => `${finding.code}: ${why}`)).toEqual(["P105: the key stands in base.yaml"]);
});

const broken = `${head}parallel:\n  sequence: true\n  world: "1"   # Größe 🎉\n`;
test("--dry-run prints a diff that patch reads and writes nothing; --fix writes the same and keeps the mode of the file", async () => {
  const path = join(folder, "job.yaml");
  writeFileSync(path, broken, { mode: 0o640 });
  const dry = await rankc("check", "--fix", "--dry-run", path);
  expect([dry.exit, readFileSync(path, "utf8")]).toEqual([1, broken]);
  expect(dry.err).toContain("would fix S012: parallel.world: 1");
  const said = await rankc("check", "--fix", path);
  expect(said).toMatchObject({ exit: 0, err: "" });
  expect(said.out).toContain("fixed P105: parallel.sequence left out");
  const after = readFileSync(path, "utf8");
  expect(after).toBe(`${head}parallel:\n  world: 1     # Größe 🎉\n`);
  expect(applyPatch(broken, dry.out)).toBe(after);
  expect(statSync(path).mode & 0o777).toBe(0o640);
});

test("a read-only file is not replaced, and no other file of the command either", async () => {
  const [one, two] = [join(folder, "one.yaml"), join(folder, "two.yaml")];
  for (const path of [one, two]) writeFileSync(path, broken);
  chmodSync(two, 0o444);
  const { exit, err } = await rankc("check", "--fix", one, two);
  expect([exit, err]).toEqual([2, `rankc: ${two} is read-only\n  fix: allow to write it: chmod u+w\n`]);
  expect([one, two].map((path) => readFileSync(path, "utf8"))).toEqual([broken, broken]);
});

test("a change of random keys gives exactly the changed values, or no text", () => {
  const job: unknown = parse(`${smallest}cluster: {device: cpu}\nallow: [{code: P108, reason: "a: b # no comment"}]\n`);
  const keys = [
    "model.layers",
    "model.moe.router.score",
    "parallel.tensor",
    "train.optimizer.betas",
    "train.init.std",
    "data.path",
    "seed",
    "name",
  ];
  const value = fc.oneof(
    fc.integer(),
    // JSON, in which the values are given, has no negative zero
    fc.double({ noNaN: true, noDefaultInfinity: true }).map((x) => x + 0),
    fc.boolean(),
    fc.string(),
    fc.constant(null),
    fc.array(fc.nat(), { maxLength: 3 }),
  );
  const layout = fc.record({
    indent: fc.constantFrom(1, 2, 4),
    collectionStyle: fc.constantFrom("any", "flow", "block"),
    lineWidth: fc.constantFrom(0, 30),
  });
  fc.assert(
    fc.property(layout, fc.dictionary(fc.constantFrom(...keys), value, { minKeys: 1, maxKeys: 3 }), (options, set) => {
      const text = stringify(job, options as { indent: number; collectionStyle: "any" | "flow" | "block"; lineWidth: number });
      const changed = changedText(text, { set: { ...set } }, keysAt);
      expect(changed).toBeDefined();
      expect(parse(changed ?? "")).toEqual(
        readJob(
          text,
          "f",
          Object.entries(set).map(([path, to]) => `${path}=${JSON.stringify(to)}`),
        ).source.value,
      );
      const { from, to, text: by } = editBetween(text, changed ?? "");
      expect(text.slice(0, from) + by + text.slice(to)).toBe(changed);
    }),
    { numRuns: 100 },
  );
});
