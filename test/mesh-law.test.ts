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

type Parallel = Partial<Record<"world" | "tensor" | "pipeline" | "expert" | "expert_tensor" | "context", number>> & {
  sequence?: boolean;
  distributed_optimizer?: boolean;
};

/** Loss, auxiliary loss, every gradient and what goes by a rule of its own, of two steps; the second sees the first one's update. */
async function numbers(job: Job, pick?: (votes: readonly Choice[]) => Choice | undefined) {
  const { plan } = compile(job, pick ? { pick } : {});
  const run = await openRun(plan, { baseDir: fixture("") });
  const first = await run.step();
  const gradients = await run.gradients();
  const second = await run.step();
  const learnt = [...(await run.parameters())].filter(([name]) => !gradients.has(name));
  await run.close();
  return {
    losses: [first.loss, first.aux_loss, second.loss, second.aux_loss],
    norms: [first.grad_norm, second.grad_norm],
    tensors: new Map([...gradients, ...learnt]),
  };
}

function same(got: Awaited<ReturnType<typeof numbers>>, want: Awaited<ReturnType<typeof numbers>>): void {
  for (const [i, loss] of want.losses.entries())
    expect(Math.abs(got.losses[i]! - loss), `loss ${i}`).toBeLessThan(1e-4 * Math.max(1, Math.abs(loss)));
  for (const [i, norm] of want.norms.entries()) expect(Math.abs(got.norms[i]! / norm - 1), `norm ${i}`).toBeLessThan(1e-4);
  expect([...got.tensors.keys()].sort()).toEqual([...want.tensors.keys()].sort());
  for (const [name, t] of want.tensors) expect(distance(got.tensors.get(name)!.data, t.data), name).toBeLessThan(1e-4);
}

const moe = { experts: 8, top_k: 2, ffn: 16, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
const shape = (over: object = {}) => ({ layers: 2, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16, ...over });
const text = (model: object, parallel: Parallel, train: object = {}) => ({
  name: "law",
  model,
  parallel,
  train: { micro_batch: 1, global_batch: 16, steps: 2, precision: "fp32", init_std: 0.2, optimizer: { lr: 1e-2 }, ...train },
  // where the text begins, sequences are one letter over and over: equals, among which rounding would choose
  data: { path: "corpus.txt", tokenizer: "bytes", order: "shuffled" },
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
  test("the dispatcher all_gather", async () => {
    const model = shape({ moe: { ...moe, dispatch: "all_gather" } });
    same(
      await numbers(jobOf(text(model, { world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true }))),
      await numbers(jobOf(text(shape({ moe }), { world: 1 }))),
    );
  });
});

// an expert has room for so many of the tokens of one rank, as in Megatron Core: it matters in how many pieces the sequence is cut
describe("with a capacity, where the sequence is cut as often", () => {
  const pieces: Readonly<Record<number, Parallel[]>> = {
    1: [{ world: 1 }, { world: 8, pipeline: 2, expert: 4, distributed_optimizer: true }, { world: 4, expert: 2, expert_tensor: 2 }],
    2: [
      { world: 2, context: 2 },
      { world: 8, tensor: 2, sequence: true, expert: 8, distributed_optimizer: true },
      { world: 16, context: 2, pipeline: 2, expert: 4, expert_tensor: 2 },
    ],
    4: [
      { world: 4, context: 4 },
      { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    ],
  };
  const capacities: readonly [object, string][] = [
    [{ factor: 0.75 }, "all_to_all"],
    [{ factor: 0.75 }, "all_gather"],
    [{ factor: 1, drop: "position" }, "all_to_all"],
    [{ factor: 1, pad: true }, "all_to_all"],
    [{ factor: 1.5, drop: "position", pad: true }, "all_gather"],
  ];
  test.each(capacities.map(([c, dispatch]) => [JSON.stringify(c), dispatch, c] as const))("%s, %s", async (_, dispatch, capacity) => {
    const router = { ...moe.router, score: "sigmoid", expert_bias: true, bias_rate: 0.05 };
    const model = shape({ moe: { ...moe, capacity, dispatch, router } });
    const train = { micro_batch: 2 };
    const losses = [];
    for (const meshes of Object.values(pieces)) {
      const [first, ...others] = meshes.map((mesh) => numbers(jobOf(text(model, mesh, train))));
      for (const other of others) same(await other, await first!);
      losses.push((await first!).losses[0]);
    }
    expect(new Set(losses).size).toBe(3);
  });
});

// its counts run over the microbatches of a step, so how many these are is part of it: of two meshes the same number
test("a loss on the counts of all data ranks, on as many microbatches", async () => {
  const model = shape({ moe: { ...moe, router: { balance: "global_aux_loss", aux_coeff: 0.05 } } });
  const meshes: Parallel[] = [
    { world: 4, expert: 4 },
    { world: 16, tensor: 2, sequence: true, context: 2, expert: 4, distributed_optimizer: true },
    { world: 16, pipeline: 2, tensor: 2, sequence: true, expert: 2, expert_tensor: 2 },
  ];
  const alone = await numbers(jobOf(text(model, { world: 1 }, { micro_batch: 4 })));
  expect(alone.losses[1]).toBeGreaterThan(0.1);
  for (const mesh of meshes) same(await numbers(jobOf(text(model, mesh))), alone);
});

test("the same plan on the same inputs gives the same bits", async () => {
  const job = jobOf(text(shape({ moe }), { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }));
  const [first, again] = [await numbers(job), await numbers(job)];
  expect(again.losses).toEqual(first.losses);
  expect(again.norms).toEqual(first.norms);
  for (const [name, t] of first.tensors) expect(again.tensors.get(name)!.data, name).toEqual(t.data);
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
      experts: fc.constantFrom(0, 4, 8),
      top_k: fc.constantFrom(2, 3),
      router: fc.oneof(
        { weight: 2, arbitrary: fc.constant(moe.router) },
        {
          weight: 4,
          arbitrary: fc.record({
            score: fc.constantFrom("softmax", "sigmoid", "sqrt_softplus"),
            normalize_top_k: fc.boolean(),
            scaling: fc.constantFrom(1, 2.5),
            groups: fc.constantFrom(1, 2),
            group_top_k: fc.constant(1),
            expert_bias: fc.boolean(),
            ...{ bias_rate: fc.constant(0.05), aux_coeff: fc.constant([0.05, 0.02]), z_coeff: fc.constant(0.01) },
            balance: fc.constantFrom(["aux_loss", "seq_aux_loss"], ["seq_aux_loss", "aux_loss"]),
          }),
        },
        fc.constantFrom(
          { balance: "sinkhorn", normalize_top_k: false, z_coeff: 0.01 },
          { balance: "quantile", quantile_ema: 0.5 },
          { type: "expert_choice", normalize_top_k: false, z_coeff: 0.01 },
          { force: "uniform", score: "sigmoid", aux_coeff: 0.05 },
        ),
      ),
      dispatch: fc.constantFrom("all_to_all", "all_gather"),
      shared: fc.constantFrom(null, null, { ffn: 24 }, { ffn: 24, gate: true }),
      latent: fc.constantFrom(null, null, 16),
      experts_in: fc.constantFrom("all", "all", { first_dense: 1 }, { every: 2 }),
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
    }),
    micro_batch: fc.constantFrom(1, 2),
  })
  .map(
    ({ model: { experts, top_k, router, dispatch, shared, latent, experts_in, ...m }, parallel: { data, ...parallel }, micro_batch }) => {
      const world = parallel.tensor * parallel.pipeline * parallel.context * data;
      const own = experts ? { moe: { ...moe, experts, top_k, dispatch, router, shared, latent, layers: experts_in } } : {};
      return { world, text: text(shape({ ...m, ...own }), { ...parallel, world }, { micro_batch }) };
    },
  )
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
  const router = {
    score: "sigmoid",
    expert_bias: true,
    bias_rate: 0.05,
    balance: ["seq_aux_loss", "global_aux_loss"],
    aux_coeff: [0.05, 0.05],
  };
  const models = {
    plain: shape({ moe }),
    rich: shape({ moe: { ...moe, router, capacity: { factor: 1, pad: true }, shared: { ffn: 24, gate: true }, latent: 16 } }),
    even: shape({ moe: { ...moe, router: { balance: "sinkhorn", normalize_top_k: false } } }),
    chosen: shape({ moe: { ...moe, router: { type: "expert_choice", normalize_top_k: false } } }),
  };
  const known = new Map<string, ReturnType<typeof numbers>>();
  const ruled = (model: object, parallel: Parallel) => {
    const key = JSON.stringify([model, parallel]);
    if (!known.has(key)) known.set(key, numbers(jobOf(text(model, parallel))));
    return known.get(key)!;
  };
  const meshes: Parallel[] = [
    { world: 4, tensor: 2, sequence: true, expert: 2 },
    { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    { world: 8, tensor: 2, sequence: true, expert: 2, expert_tensor: 2, distributed_optimizer: true },
    { world: 8, pipeline: 2, expert: 4 },
  ];
  await fc.assert(
    fc.asyncProperty(fc.integer(), fc.constantFrom(...meshes), fc.constantFrom(...Object.values(models)), async (seed, parallel, model) => {
      let s = seed;
      const pick = (votes: readonly Choice[]): Choice => {
        s = Math.imul(s, 1664525) + 1013904223;
        return votes[(s >>> 8) % (votes.length + 1)] ?? { by: "nothing" };
      };
      same(await numbers(jobOf(text(model, parallel)), pick), await ruled(model, parallel));
    }),
    {
      numRuns: Number(process.env.RANKC_RUNS ?? 20),
      // E cut by the same factors in another order: once two layouts under one name
      examples: [
        [77, meshes[1]!, models.plain],
        [1538828707, meshes[1]!, models.plain],
      ],
    },
  );
}, 240_000);
