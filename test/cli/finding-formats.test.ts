/** Findings for programs: JSON with places and edits, SARIF as its published schema says, and workflow commands of GitHub. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Ajv } from "ajv";
import { expect, test } from "vitest";
import { renderFinding } from "../../src/frontend/diagnostic.ts";
import { badJob } from "../../src/frontend/explain.ts";
import { findingJson } from "../../src/frontend/findingJson.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { sarifLog } from "../../src/frontend/sarif.ts";
import { workflowCommands } from "../../src/frontend/workflowCommands.ts";
import { rules } from "../../src/rules/all.ts";
import { root } from "../support/checkout.ts";

const text = `name: formats
model: {layers: 2, hidden: 16, heads: 2, vocab: 256, seq: 8, moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}
parallel:
  world: 4
  tensor: 2
  expert: 4
train: {steps: 1, global_batch: 2, optimizer: {lr: 1.0e-3, momentum: 0.5}}
data: {path: corpus.txt}
`;
const file = "jobs/ü, a:b 100%.yaml";
const { findings } = readJob(text, file);
const texts = new Map([[file, text]]);

test("JSON has places with their ends, and a fix as an edit of the text", () => {
  const [p104, b223] = findings.map((finding) => findingJson(finding, texts));
  expect({ ...p104, why: "", rendered: "" }).toMatchInlineSnapshot(`
    {
      "code": "P104",
      "fix": "parallel.sequence: true (shard the sequence over the tensor ranks, or use tensor 1)",
      "found": "tensor 2 and expert 4 with sequence: false",
      "level": "error",
      "path": "parallel.sequence",
      "rendered": "",
      "spans": [
        {
          "column": 1,
          "end_column": 9,
          "end_line": 3,
          "file": "jobs/ü, a:b 100%.yaml",
          "is_primary": true,
          "label": "parallel.sequence is not written: false",
          "line": 3,
        },
        {
          "column": 11,
          "end_column": 12,
          "end_line": 6,
          "file": "jobs/ü, a:b 100%.yaml",
          "is_primary": false,
          "label": "parallel.expert",
          "line": 6,
        },
        {
          "column": 11,
          "end_column": 12,
          "end_line": 5,
          "file": "jobs/ü, a:b 100%.yaml",
          "is_primary": false,
          "label": "parallel.tensor",
          "line": 5,
        },
      ],
      "suggestion": {
        "edits": [
          {
            "column": 1,
            "end_column": 1,
            "end_line": 6,
            "file": "jobs/ü, a:b 100%.yaml",
            "line": 6,
            "text": "  sequence: true
    ",
          },
        ],
        "is_safe": true,
        "set": {
          "parallel.sequence": true,
        },
      },
      "title": "expert and tensor parallelism need sequence parallelism",
      "why": "",
    }
  `);
  expect(b223?.suggestion).toMatchInlineSnapshot(`
    {
      "edits": [
        {
          "column": 58,
          "end_column": 73,
          "end_line": 7,
          "file": "jobs/ü, a:b 100%.yaml",
          "line": 7,
          "text": "",
        },
      ],
      "is_safe": true,
      "left_out": [
        "train.optimizer.momentum",
      ],
      "set": {
        "train.optimizer.momentum": 0.9,
      },
    }
  `);
  expect(p104?.rendered).toContain("error[P104]");
});

test("findings fit a narrow terminal: every rule's finding has lines of at most its columns, and the words that it has at 100", () => {
  // numbers of lines and marks differ where a long line of the job is cut
  const notes = (rendered: string): string => rendered.slice(rendered.indexOf(" = ")).replaceAll(/\s+/g, " ");
  const all = rules.flatMap((rule) => readJob(badJob(rule.bad), "job.yaml").findings);
  expect(all.length).toBeGreaterThan(80);
  for (const finding of all) {
    const wide = renderFinding(finding, { color: false });
    for (const width of [60, 80]) {
      const narrow = renderFinding(finding, { color: false, width });
      for (const line of narrow.split("\n")) expect([...line].length <= width || !line.trim().includes(" "), line).toBe(true);
      expect(notes(narrow)).toBe(notes(wide));
      for (const { label } of finding.related ?? []) expect(narrow.replaceAll(/[\s|]+/g, " ")).toContain(label ?? "");
    }
  }
});

test("an edit applied to the lines of the file removes the finding", () => {
  for (const finding of findings) {
    const [edit] = findingJson(finding, texts).suggestion?.edits ?? [];
    const offset = (line: number, column: number): number =>
      text
        .split("\n")
        .slice(0, line - 1)
        .reduce((sum, row) => sum + row.length + 1, column - 1);
    const changed = text.slice(0, offset(edit!.line, edit!.column)) + edit!.text + text.slice(offset(edit!.end_line, edit!.end_column));
    expect(readJob(changed, file).findings.map((f) => f.code)).not.toContain(finding.code);
  }
});

// published with @microsoft/jest-sarif (MIT); draft 4 and draft 7 agree on the keywords that it uses
const { $schema: _, id: __, ...schema } = JSON.parse(readFileSync(join(root, "test/fixtures/sarif/sarif-2.1.0-rtm.5.json"), "utf8"));
const isSarif = new Ajv({ strict: false, validateFormats: false, unicodeRegExp: false }).compile(schema);

test("SARIF of every rule, of faults of the text and of --set options follows the schema", () => {
  const all = [
    ...findings,
    ...rules.flatMap(({ bad }) => readJob(badJob(bad), "job.yaml").findings),
    ...readJob("name: [a", "/absolute/job.yaml").findings,
    ...readJob(text, file, ["parallel.tensor=1", "parallel.sequence=true"]).findings,
  ];
  const log = sarifLog(all, texts);
  expect(isSarif(log), JSON.stringify(isSarif.errors?.slice(0, 3))).toBe(true);
  expect(isSarif({ ...log, version: "2.0.0" })).toBe(false);
  const [run] = (log as { runs: { results: { ruleId: string; ruleIndex: number }[]; tool: { driver: { rules: { id: string }[] } } }[] })
    .runs;
  expect(run?.results.length).toBe(all.length);
  for (const { ruleId, ruleIndex } of run?.results ?? []) expect(run?.tool.driver.rules[ruleIndex]?.id).toBe(ruleId);
  const [first] = run?.results ?? [];
  expect(first).toMatchObject({
    ruleId: "P104",
    locations: [
      {
        physicalLocation: {
          artifactLocation: { uri: "jobs/%C3%BC%2C%20a%3Ab%20100%25.yaml", uriBaseId: "%SRCROOT%" },
          region: { startLine: 3 },
        },
      },
    ],
    relatedLocations: [{ message: { text: "parallel.expert" } }, { message: { text: "parallel.tensor" } }],
    fixes: [{ artifactChanges: [{ replacements: [{ insertedContent: { text: "  sequence: true\n" } }] }] }],
  });
  expect(JSON.stringify(log)).toContain('"uri":"file:///absolute/job.yaml"');
});

test("a fingerprint stays when lines move, and differs between keys", () => {
  const prints = (of: string): string[] =>
    (sarifLog(readJob(of, file).findings, texts) as { runs: { results: { partialFingerprints: object }[] }[] }).runs.flatMap(
      ({ results }) => results.map((result) => JSON.stringify(result.partialFingerprints)),
    );
  expect(prints(`# one line more\n${text}`)).toEqual(prints(text));
  expect(new Set(prints(text)).size).toBe(findings.length);
});

test("a workflow command escapes what GitHub would read as its own signs", () => {
  const [first] = workflowCommands(findings);
  expect(first).toMatch(
    /^::error file=jobs\/ü%2C a%3Ab 100%25\.yaml,line=3,endLine=3,col=1,endColumn=9,title=P104%3A [^:]*::tensor 2 and expert 4 [^\n]*%0Afix: /,
  );
  const [inSet] = workflowCommands(readJob(text, file, ["parallel.sequence=maybe"]).findings);
  expect(inSet).toMatch(/^::error title=S012%3A .*%0Aat --set parallel\.sequence=maybe$/);
});
