/** The central law: a job's loss and gradients do not depend on its mesh, nor on the choices `shard` makes. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { openRun } from "../runtime/run.ts";
import type { Job } from "../schemas/job.ts";
import { compile } from "../src/compile.ts";
import { readJob } from "../src/readJob.ts";
import type { Choice } from "../src/shard.ts";
import { distance, fixture, jobOf } from "./support.ts";

type Parallel = Partial<Job["parallel"]>;

/** Loss, auxiliary loss and every gradient of two steps; the second sees the first one's update. */
async function numbers(job: Job, pick?: (votes: readonly Choice[]) => Choice | undefined) {
  const { plan } = compile(job, pick ? { pick } : {});
  const run = await openRun(plan, { baseDir: fixture("") });
  const first = await run.step();
  const gradients = await run.gradients();
  const second = await run.step();
  await run.close();
  return { losses: [first.loss, first.aux_loss, second.loss, second.aux_loss], norms: [first.grad_norm, second.grad_norm], gradients };
}

function same(got: Awaited<ReturnType<typeof numbers>>, want: Awaited<ReturnType<typeof numbers>>): void {
  for (const [i, loss] of want.losses.entries())
    expect(Math.abs(got.losses[i]! - loss), `loss ${i}`).toBeLessThan(1e-4 * Math.max(1, Math.abs(loss)));
  for (const [i, norm] of want.norms.entries()) expect(Math.abs(got.norms[i]! / norm - 1), `norm ${i}`).toBeLessThan(1e-4);
  expect([...got.gradients.keys()].sort()).toEqual([...want.gradients.keys()].sort());
  for (const [name, g] of want.gradients) expect(distance(got.gradients.get(name)!.data, g.data), name).toBeLessThan(1e-4);
}

const moe = { experts: 8, top_k: 2, ffn: 16, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
const latent = { kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 };
const llama3 = { type: "llama3", factor: 4, original_seq: 8 };
const yarn = { type: "yarn", factor: 4, original_seq: 8, beta_fast: 4, mscale: 1, mscale_all_dim: 0.8 };
const shape = (over: object = {}) => ({ layers: 2, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16, ...over });
const text = (model: object, parallel: Parallel, train: object = {}) => ({
  name: "law",
  model,
  parallel,
  train: { micro_batch: 1, global_batch: 16, steps: 2, precision: "fp32", init_std: 0.2, optimizer: { lr: 1e-2 }, ...train },
  data: { path: "corpus.txt", tokenizer: "bytes" },
});

describe("on named meshes", () => {
  const dense: Parallel[] = [
    { world: 2, tensor: 2 },
    { world: 4, tensor: 4, sequence: true },
    { world: 4, context: 4 },
    { world: 8, tensor: 2, pipeline: 2, distributed_optimizer: true },
  ];
  test.each(dense.map((p) => [JSON.stringify(p), p] as const))("dense %s", async (_, parallel) => {
    same(await numbers(jobOf(text(shape(), parallel))), await numbers(jobOf(text(shape(), { world: 1 }))));
  });
  test("dense, tied embeddings, q/k norm per head, no sequence parallelism", async () => {
    const model = shape({ tie_embeddings: true, qk_norm: "head" });
    same(
      await numbers(jobOf(text(model, { world: 4, tensor: 2, distributed_optimizer: true }))),
      await numbers(jobOf(text(model, { world: 1 }))),
    );
  });
  test("tied embeddings on the first and the last stage", async () => {
    const model = shape({ tie_embeddings: true });
    const train = { global_batch: 8 };
    same(
      await numbers(jobOf(text(model, { world: 8, tensor: 2, pipeline: 2, distributed_optimizer: true }, train))),
      await numbers(jobOf(text(model, { world: 1 }, train))),
    );
  });
  const schedules: [Parallel, object?][] = [
    [{ world: 2, pipeline: 2, virtual_pipeline: 2 }],
    [{ world: 4, pipeline: 4, schedule: "zero_bubble" }],
    [{ world: 8, pipeline: 2, virtual_pipeline: 2, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true }],
    [
      {
        world: 8,
        pipeline: 2,
        schedule: "zero_bubble",
        order: "tp-cp-ep-pp-dp",
        tensor: 2,
        sequence: true,
        expert: 2,
        distributed_optimizer: true,
      },
    ],
    [{ world: 8, distributed_optimizer: true, optimizer_instances: 2, expert: 2 }],
    [{ world: 3, pipeline: 3, layout: "E|tttt|L" }],
    [{ world: 2, pipeline: 2, layout: "Ett|t|t|L" }],
    [{ world: 2, pipeline: 2, virtual_pipeline: 2 }, { tie_embeddings: true }],
    [{ world: 4, pipeline: 4, layout: "Ett|t|t|L", schedule: "zero_bubble" }, { tie_embeddings: true }],
  ];
  test.each(schedules.map((c) => [JSON.stringify(c), ...c] as const))(
    "stages, their order and that of ranks: %s",
    async (_, parallel, over = {}) => {
      const model = shape({ layers: 4, moe, ...over });
      same(await numbers(jobOf(text(model, parallel))), await numbers(jobOf(text(model, { world: 1 }))));
    },
  );
  const attentions = {
    "biases, positions in neighbours": { qkv_bias: true, out_bias: true, rope: { interleaved: true } },
    "latent attention": { mla: latent, kv_heads: 8, head_dim: 10, rope: { scaling: yarn } },
    "latent attention, queries too": { mla: { ...latent, q_rank: 10 }, kv_heads: 8, head_dim: 10, out_bias: true },
  };
  test.each(Object.entries(attentions))("%s", async (_, model) => {
    const alone = await numbers(jobOf(text(shape(model), { world: 1 })));
    for (const parallel of [
      { world: 2, tensor: 2 },
      { world: 8, tensor: 4, sequence: true, context: 2, distributed_optimizer: true },
    ])
      same(await numbers(jobOf(text(shape(model), parallel))), alone);
  });
  test("the dispatcher all_gather", async () => {
    const model = shape({ moe: { ...moe, dispatch: "all_gather" } });
    same(
      await numbers(jobOf(text(model, { world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true }))),
      await numbers(jobOf(text(shape({ moe }), { world: 1 }))),
    );
  });
});

test("the same plan on the same inputs gives the same bits", async () => {
  const job = jobOf(text(shape({ moe }), { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }));
  const [first, again] = [await numbers(job), await numbers(job)];
  expect(again.losses).toEqual(first.losses);
  expect(again.norms).toEqual(first.norms);
  for (const [name, g] of first.gradients) expect(again.gradients.get(name)!.data, name).toEqual(g.data);
});

test("bf16 on any of these meshes follows fp32", async () => {
  const alone = await numbers(jobOf(text(shape({ moe }), { world: 1 })));
  for (const parallel of [{ world: 1 }, { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }]) {
    const got = await numbers(jobOf(text(shape({ moe }), parallel, { precision: "bf16" })));
    // bf16 keeps 8 bits: 2^-9 relative per rounding; a few dozen roundings on the way to the loss
    for (const [i, loss] of alone.losses.entries()) expect(Math.abs(got.losses[i]! - loss), `loss ${i}`).toBeLessThan(2e-2);
    expect(got.losses[0]).not.toBe(alone.losses[0]);
  }
});

const power = (max: number) => fc.integer({ min: 0, max }).map((n) => 2 ** n);
const anyJob = fc
  .record({
    model: fc.record({
      layers: fc.constantFrom(2, 4),
      kv_heads: fc.constantFrom(4, 8),
      qk_norm: fc.constantFrom("none", "head", "full"),
      tie_embeddings: fc.boolean(),
      qkv_bias: fc.boolean(),
      out_bias: fc.boolean(),
      rope: fc.constantFrom({}, { interleaved: true }, { scaling: llama3 }, { interleaved: true, scaling: yarn }),
      mla: fc.option(fc.constantFrom(latent, { ...latent, q_rank: 10 }), { freq: 2 }),
      experts: fc.constantFrom(0, 4, 8),
      top_k: fc.constantFrom(2, 3),
      normalize_top_k: fc.boolean(),
      dispatch: fc.constantFrom("all_to_all", "all_gather"),
    }),
    parallel: fc.record({
      tensor: power(2),
      pipeline: power(1),
      context: power(2),
      data: power(3),
      expert: power(3),
      expert_tensor: power(2),
      sequence: fc.boolean(),
      distributed_optimizer: fc.boolean(),
      virtual_pipeline: power(1),
      schedule: fc.constantFrom("1f1b", "zero_bubble"),
      order: fc.constantFrom("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"),
      optimizer_instances: power(1),
    }),
    micro_batch: fc.constantFrom(1, 2),
  })
  .map(({ model: { experts, top_k, normalize_top_k, dispatch, mla, ...m }, parallel: { data, ...drawn }, micro_batch }) => {
    // what asks for stages, or for a shared state, is drawn where there is one
    const { pipeline, distributed_optimizer, virtual_pipeline, schedule, optimizer_instances, ...rest } = drawn;
    const own = pipeline > 1 ? (schedule === "1f1b" ? { virtual_pipeline } : { schedule }) : {};
    const parallel = { ...rest, pipeline, distributed_optimizer, ...own, ...(distributed_optimizer ? { optimizer_instances } : {}) };
    const world = parallel.tensor * parallel.pipeline * parallel.context * data;
    const mixed = experts ? { moe: { ...moe, experts, top_k, dispatch, router: { ...moe.router, normalize_top_k } } } : {};
    // heads of a latent have keys and values, and norms, of their own
    const heads = mla ? { mla, kv_heads: 8, head_dim: undefined, qk_norm: "none", qkv_bias: false } : {};
    return { world, text: text(shape({ ...m, ...mixed, ...heads }), { ...parallel, world } as Parallel, { micro_batch }) };
  })
  .filter(({ world }) => world <= 16)
  .map(({ text: value }) => ({ value, job: readJob(stringify(value), "law.yaml").job }))
  .filter(({ job }) => job !== undefined);

test("on any legal mesh of up to 16 ranks, any small model", async () => {
  const whole = new Map<string, ReturnType<typeof numbers>>();
  await fc.assert(
    fc.asyncProperty(anyJob, async ({ value, job }) => {
      const alone = { ...value, parallel: { world: 1 } };
      const key = JSON.stringify(alone);
      if (!whole.has(key)) whole.set(key, numbers(jobOf(alone)));
      same(await numbers(job!), await whole.get(key)!);
    }),
    { numRuns: Number(process.env.RANKC_RUNS ?? 40) },
  );
}, 240_000);

test("any choice of dims gives the same numbers: the rules decide cost, not truth", async () => {
  const model = shape({ moe });
  const want = await numbers(jobOf(text(model, { world: 1 })));
  const meshes: Parallel[] = [
    { world: 4, tensor: 2, sequence: true, expert: 2 },
    { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    { world: 8, tensor: 2, sequence: true, expert: 2, expert_tensor: 2, distributed_optimizer: true },
    { world: 8, pipeline: 2, expert: 4 },
  ];
  await fc.assert(
    fc.asyncProperty(fc.integer(), fc.constantFrom(...meshes), async (seed, parallel) => {
      let s = seed;
      const pick = (votes: readonly Choice[]): Choice => {
        s = Math.imul(s, 1664525) + 1013904223;
        return votes[(s >>> 8) % (votes.length + 1)] ?? { by: "nothing" };
      };
      same(await numbers(jobOf(text(model, parallel)), pick), want);
    }),
    {
      numRuns: Number(process.env.RANKC_RUNS ?? 20),
      // E cut by the same factors in another order: once two layouts under one name
      examples: [
        [77, meshes[1]!],
        [1538828707, meshes[1]!],
      ],
    },
  );
}, 240_000);
