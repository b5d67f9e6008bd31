/** Cubins are a part of the plan by their digests: what was changed, swapped or put there by others is not loaded. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, expect, test, vi } from "vitest";
import { cubinFile } from "../../runtime/cuda/kernels.ts";
import { readCubin } from "../../src/cli/inputFiles.ts";
import { makeCubins } from "../../src/codegen/cubins.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan, sealCubins } from "../../src/plan/seal.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-cubins-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
afterEach(() => vi.unstubAllEnvs());
mkdirSync(join(folder, "kernels"));

const job = jobOf({
  name: "small",
  model: { layers: 1, hidden: 16, ffn: 32, heads: 2, vocab: 256, seq: 8 },
  train: { global_batch: 2, steps: 3, precision: "bf16", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});
const { plan } = compile(job, { target: await loadTarget("cuda:sm_90a") });
const units = plan.kernels.map((k) => ({ kernel: k.id, text: `source of ${k.id}`, cubin: cubinFile(k, "sm_90a") }));
const [first, second] = units as [(typeof units)[0], (typeof units)[0]];

/** Stands for nvcc: the cubin is the source's bytes behind a mark. */
function standInNvcc(): void {
  const path = join(folder, "nvcc");
  writeFileSync(path, '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{ echo made; cat "$3"; } > "$2"\n', { mode: 0o755 });
  vi.stubEnv("RANKC_NVCC", path);
}

test("nvcc compiles only missing cubins; they are sealed with the plan and read back", async () => {
  standInNvcc();
  const known = (file: string) => (file === first.cubin ? Buffer.from("known") : undefined);
  const cubins = await makeCubins(units, { arch: "sm_90a", options: [], onProgress: () => {}, known });
  expect([...cubins.keys()]).toEqual(units.map((u) => u.cubin));
  expect(`${cubins.get(first.cubin)}`).toBe("known");
  expect(`${cubins.get(second.cubin)}`).toBe(`made\nsource of ${second.kernel}`);

  const whole = sealCubins(plan, new Map(units.map((u) => [u.kernel, { file: u.cubin, bytes: cubins.get(u.cubin)! }])));
  expect(whole.digests.kernels).not.toBe(plan.digests.kernels);
  const read = parsePlan(printPlan(whole), "plan.json");
  expect(read).toEqual(whole);
  // the same job: what nvcc made of it is no difference
  expect(diffPlans(whole, plan)).toMatchObject({ changes: false, sections: [] });

  const at = (file: string) => join(folder, "kernels", file);
  writeFileSync(at(first.cubin), cubins.get(first.cubin)!);
  writeFileSync(at("stray.cubin"), "stray");
  expect(`${readCubin(read, folder, first.cubin)}`).toBe("known");
  // one that is missing is compiled by the host; one that the plan was not sealed with is none
  expect(readCubin(read, folder, second.cubin)).toBeUndefined();
  expect(readCubin(read, folder, "stray.cubin")).toBeUndefined();
  expect(readCubin(plan, folder, first.cubin)).toBeUndefined();
  const changed = readFileSync(at(first.cubin));
  changed[0]! ^= 1;
  writeFileSync(at(first.cubin), changed);
  expect(() => readCubin(read, folder, first.cubin)).toThrow(`${at(first.cubin)} was changed since the plan was compiled`);
});

test.each([
  ["another kernel's", second.cubin],
  ["a path", "../x.cubin"],
  ["a source", `${first.kernel}.cu`],
])("a cubin may not be %s file", (_, file) => {
  const damaged = sealCubins(plan, new Map([[first.kernel, { file, bytes: Buffer.from("x") }]]));
  expect(() => parsePlan(printPlan(damaged), "plan.json")).toThrow(/its cubin is|cubin\/file must match pattern/);
});
