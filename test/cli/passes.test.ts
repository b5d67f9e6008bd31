/** What the compiler shows of its passes: --emit for each by its name, and RANKC_DEBUG. */
import { beforeAll, expect, test } from "vitest";
import { type Compiled, compile } from "../../src/compile.ts";
import { stages, stageTexts } from "../../src/passes/passNames.ts";
import { jobOf } from "../support/job.ts";
import { rankc, rankcWith } from "../support/rankc.ts";

const job = "plans/tiny-interleaved/job.yaml";
/** A line of each text form for a job with two stages of two chunks. */
const lines = {
  job: '  "name": "a",',
  mesh: "  pp       2  [0,1]\n",
  pipeline: "stage 0, chunk 1: layer 2\n",
  model: /^fwd loss = /m,
  graph: /^bwd layers\.0\.attn\.wq\./m,
  sharded: /layers\.0\.wq/,
  schedule: /F0\.1/,
  program: /^stage 1$/m,
  kernels: /gemm/,
  memory: /peak/,
  plan: /^a: plan [0-9a-f]{16}/,
} as const satisfies Record<keyof typeof stageTexts, string | RegExp>;

let compiled: Compiled;
beforeAll(() => {
  const model = { layers: 4, hidden: 64, heads: 4, vocab: 256, seq: 64 };
  const parallel = { world: 2, pipeline: 2, virtual_pipeline: 2 };
  const train = { steps: 1, global_batch: 4, precision: "fp32", optimizer: { lr: 1e-3 } };
  compiled = compile(jobOf({ name: "a", model, parallel, train, data: { path: "a.txt" } }));
});

test.each(Object.entries(lines))("--emit %s", (stage, line) => {
  const text = compiled.emit(stages.find((name) => name === stage) ?? "job");
  expect(text).toMatch(line);
  expect(text).toMatch(/\n$/);
});

test("the model is the forward part of the graph", () => {
  const [model, graph] = [compiled.emit("model"), compiled.emit("graph")];
  expect(model).not.toMatch(/^bwd/m);
  for (const line of model.trimEnd().split("\n")) expect(graph).toContain(line);
});

test("--help lists each pass by its name", async () => {
  const { out } = await rankc("compile", "--help");
  for (const stage of stages) expect(out.replace(/\s+/g, " ")).toContain(`${stage} (${stageTexts[stage]})`);
});

test("RANKC_DEBUG 1 prints the time of each pass, 2 also what each changed, and neither changes the data", async () => {
  const at = (level: string) => rankcWith({ RANKC_DEBUG: level }, "compile", job, "--emit", "pipeline");
  const [off, times, changes] = [await at("0"), await at("1"), await at("2")];
  expect([times.out, changes.out]).toEqual([off.out, off.out]);
  expect(off.err).toBe("");
  const passes = ["mesh", "pipeline", "model", "graph", "sharded", "schedule", "program", "verify", "kernels", "memory", "plan"];
  const timed = times.err.trimEnd().split("\n");
  expect(timed.map((line) => /^pass (\w+) +[\d.]+ ms$/.exec(line)?.[1])).toEqual(passes);
  const changed = new Map(
    changes.err
      .trimEnd()
      .split("\n")
      .map((line) => [/^pass (\w+)/.exec(line)?.[1], line]),
  );
  expect([...changed.keys()]).toEqual(passes);
  expect(changed.get("sharded")).toMatch(/ops \d+ → \d+ {2}collectives 0 → \d+$/);
  expect(changed.get("program")).toMatch(/transfers 0 → \d+ {2}buffers 0 → \d+$/);
});
