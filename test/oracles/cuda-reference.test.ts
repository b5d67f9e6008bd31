/** The numbers are those of Hugging Face transformers on this machine's GPU too: 20 losses, eager and as a graph. */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { firstGpu } from "../support/cudaDevice.ts";
import { fixture } from "../support/job.ts";
import { expectedOf, referenceJob, references } from "../support/referenceJobs.ts";

const gpu = firstGpu();
const none = typeof gpu === "string";

describe.skipIf(none)(`on a device${none ? ` (skipped: ${gpu})` : `: ${gpu.name}`}`, () => {
  // bf16 keeps 8 bits: 2^-9 relative per rounding
  const precisions = [
    ["fp32", 2e-4],
    ["bf16", 2e-2],
  ] as const;
  const cases = references.flatMap((name) => precisions.map(([precision, within]) => [name, precision, within] as const));
  test.each(cases)("%s in %s: 20 losses within %f", async (name, precision, within) => {
    if (none) return;
    const { plan, sources } = compile(referenceJob(name, {}, precision), { target: await loadTarget(`cuda:${gpu.arch}`) });
    const run = await openRun(plan, {
      ...{ backend: "cuda", source: (file) => sources.get(file)! },
      ...{ baseDir: fixture(""), initFrom: fixture(`hf/${name}/model.safetensors`) },
    });
    const far: number[] = [];
    for (const want of expectedOf(name).losses) far.push(Math.abs((await run.step()).loss - want));
    await run.close();
    expect(Math.max(...far)).toBeLessThan(within);
  });
});
