/** model.vocab_multiple: rows of the embedding and the head that no id has change no loss and learn nothing. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { distance, fixture, jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-padded-vocab-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const IDS = 257;
const planOf = (vocab_multiple: number, parallel: object = {}, tie_embeddings = false) =>
  compile(
    jobOf({
      name: "padded",
      model: { layers: 1, hidden: 16, heads: 4, vocab: IDS, vocab_multiple, seq: 16, tie_embeddings, mtp: { layers: 1 } },
      parallel,
      train: { global_batch: 4, steps: 4, precision: "fp32", optimizer: { lr: 1e-2 } },
      data: { path: "corpus.txt" },
    }),
  ).plan;
const baseDir = fixture("");

test.each([
  { multiple: 24, parallel: {}, tie: false },
  { multiple: 24, parallel: {}, tie: true },
  // the second shard has one id, the third and the fourth none
  { multiple: 1024, parallel: { world: 4, tensor: 4 }, tie: false },
])("a multiple of $multiple, $parallel, tied: $tie", async ({ multiple, parallel, tie }) => {
  const plainPlan = planOf(1, {}, tie);
  const plain = await openRun(plainPlan, { baseDir });
  const weights = join(folder, `${multiple}-${tie}.safetensors`);
  writeSafetensors(weights, toHuggingFace(plainPlan.job.model, await plain.parameters()));

  const plan = planOf(multiple, parallel, tie);
  const padded = await openRun(plan, { baseDir, initFrom: weights });
  for (let step = 0; step < 3; step++) {
    const [want, got] = [await plain.step(), await padded.step()];
    expect(Math.abs(got.loss - want.loss)).toBeLessThan(1e-5);
    expect(Math.abs(got.grad_norm - want.grad_norm)).toBeLessThan(1e-4);
  }
  const [want, got] = [await plain.parameters(), await padded.parameters()];
  const rows = Math.ceil(IDS / multiple) * multiple;
  const embed = got.get("embed");
  expect(embed?.shape).toEqual([rows, 16]);
  expect(embed?.data.subarray(IDS * 16).every((x) => x === 0)).toBe(true);
  const trained = join(folder, `${multiple}-${tie}-trained.safetensors`);
  writeSafetensors(trained, toHuggingFace(plan.job.model, got));
  const read = checkpointFor(plainPlan.job.model, trained);
  for (const [name, { shape, data }] of want) expect(distance(read.read(name, shape), data), name).toBeLessThan(1e-5);
  read.close();
  await Promise.all([plain.close(), padded.close()]);
});
