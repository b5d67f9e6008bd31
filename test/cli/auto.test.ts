/** Keys that a job leaves as `auto`: the search chooses their values, the plan has them, and all other keys stay. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { jobSchema } from "../../schemas/jobSchema.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { chooseAuto } from "../../src/search/chooseAuto.ts";
import { readJobAuto } from "../../src/search/readJobAuto.ts";
import { search } from "../../src/search/search.ts";
import { jobOf } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";

let folder = "";
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "rankc-auto-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

const text = `name: left open
model: {layers: 3, hidden: 256, ffn: 512, heads: 4, vocab: 512, seq: 128}
parallel: {world: 2, virtual_pipeline: 1, pipeline: auto}
train: {global_batch: 8, micro_batch: auto, steps: 10, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
cluster: {device: h100-80gb}
`;

test("compile and check choose the same values as a search in which all other keys are given, say so, and the plan has them", async () => {
  const path = join(folder, "job.yaml");
  writeFileSync(path, text);
  const job = jobOf({
    ...{ name: "left open", model: { layers: 3, hidden: 256, ffn: 512, heads: 4, vocab: 512, seq: 128 }, parallel: { world: 2 } },
    ...{ train: { global_batch: 8, steps: 10, optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" }, cluster: { device: "h100-80gb" } },
  });
  const fixed = { tensor: 1, virtual_pipeline: 1, context: 1, expert: 1, expert_tensor: 1, recompute: "job" } as const;
  const [winner] = search(job, { profile: packageProfile("h100-80gb")!, fixed, given: { distributed_optimizer: true } }).best;
  const out = join(folder, "plan");
  const compiled = await rankc("compile", path, "-o", out);
  expect(compiled.err).toContain(`auto: parallel.pipeline=${winner?.choice.pipeline} train.micro_batch=${winner?.choice.micro_batch}`);
  const { parallel, train } = JSON.parse(readFileSync(join(out, "plan.json"), "utf8")).job;
  expect([parallel.pipeline, train.micro_batch]).toEqual([winner?.choice.pipeline, winner?.choice.micro_batch]);
  expect(parallel.distributed_optimizer).toBe(false);
  const printed = (await rankc("check", path, "--print", "--format", "json")).out;
  const { resolved } = JSON.parse(printed);
  expect(resolved.job.train.micro_batch).toBe(winner?.choice.micro_batch);
  expect(resolved.origins["train.micro_batch"]).toBe(`auto, ${path}:4`);
  expect(resolved.origins["parallel.virtual_pipeline"]).toBe(`${path}:3`);
});

test("three layers on two stages get a layout, and tensor ranks sequence parallelism, unless the file writes them", () => {
  const model = { layers: 3, hidden: 256, ffn: 512, heads: 4, vocab: 512, seq: 128 };
  const given = {
    train: { global_batch: 8, steps: 1, optimizer: { lr: 1e-3 } },
    data: { path: "c.txt" },
    cluster: { device: "h100-80gb" },
  };
  const profile = packageProfile("h100-80gb");
  const job = jobOf({ name: "uneven", model, parallel: { world: 2 }, ...given });
  // every other choice breaks a rule: one microbatch of all sequences for each of two stages is the only one with data ranks of one
  const two = { ...job, parallel: { ...job.parallel, pipeline: 2, data: 1 } };
  const chosen = chooseAuto({ job: two, keys: ["virtual_pipeline"], writes: { sequence: false, layout: false } }, { profile });
  expect("values" in chosen && chosen.values).toMatchObject({
    "parallel.virtual_pipeline": 1,
    "parallel.layout": expect.stringContaining("E"),
  });
  const kept = chooseAuto({ job: two, keys: ["virtual_pipeline"], writes: { sequence: false, layout: true } }, { profile });
  expect(kept).toMatchObject({ found: expect.stringMatching(/choices is valid|valid/) });
});

test("where no value can be chosen the finding stands at auto, and says why", async () => {
  const path = join(folder, "cpu.yaml");
  writeFileSync(path, text.replace("h100-80gb", "cpu"));
  const { err, exit } = await rankc("check", path);
  expect(exit).toBe(1);
  expect(err).toContain("error[S009]: auto cannot be resolved");
  expect(err).toContain("cpu.yaml:3:53");
  expect(err).toContain("no step can be estimated on cpu");
  // without a search
  expect(readJob(text, "job.yaml").findings.map(({ code }) => code)).toEqual(["S009"]);
});

test("an editor finds nothing wrong with auto, but other faults", () => {
  expect(readQuickly(text, "job.yaml", []).findings).toEqual([]);
  expect(readQuickly(text.replace("heads", "haeds"), "job.yaml", []).findings.map(({ code }) => code)).toContain("S010");
  expect(readQuickly(text.replace("world: 2", "world: auto"), "job.yaml", []).findings.map(({ code }) => code)).toEqual(["S012"]);
  const { properties } = jobSchema() as { properties: Record<string, { properties: Record<string, { anyOf?: { const?: string }[] }> }> };
  expect(properties.parallel?.properties.tensor?.anyOf?.[1]?.const).toBe("auto");
  expect(properties.parallel?.properties.world?.anyOf).toBeUndefined();
});

test("the library chooses the values that the commands choose, and readJob names the function that does", async () => {
  const { job, auto, findings } = await readJobAuto(text, "job.yaml");
  expect(findings.filter(({ level }) => level === "error")).toEqual([]);
  const path = join(folder, "library.yaml");
  writeFileSync(path, text);
  const printed = JSON.parse((await rankc("check", path, "--print", "--format", "json")).out);
  expect(job?.parallel).toMatchObject(printed.resolved.job.parallel);
  expect(auto?.values["train.micro_batch"]).toBe(job?.train.micro_batch);
  expect(readJob(text, "job.yaml").findings[0]?.fix).toContain("readJobAuto");
  // a job without auto is read as ever
  const closed = text.replaceAll("auto", "1");
  expect((await readJobAuto(closed, "job.yaml")).job).toEqual(readJob(closed, "job.yaml").job);
  const refused = await readJobAuto(text.replace("h100-80gb", "cpu"), "job.yaml");
  expect(refused.job).toBeUndefined();
  expect(refused.findings.map(({ code }) => code)).toEqual(["S009"]);
});
