/** The central law: a job's loss and gradients do not depend on its mesh, nor on the choices `shard` makes. */
import fc from "fast-check";
import { afterAll, describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { buildMesh, hasSeparateGrids } from "../../src/passes/mesh.ts";
import type { Choice } from "../../src/passes/sharding/dimChoice.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { byPosition, distance, fixture, jobOf, parallelOf, sameNumbers } from "../support/job.ts";
import { labelsBeside } from "../support/labels.ts";
import { routerChoices } from "../support/routerChoices.ts";
import { byTier, draws, full, isFull } from "../support/tiers.ts";

type Parallel = Partial<Job["parallel"]>;

/** Returns the losses, gradients and parameters with a rule of their own of two steps; the second step has the update of the first. */
async function numbers(job: Job, pick?: (votes: readonly Choice[]) => Choice | undefined) {
  // a file has the operands of an instruction in another order
  const plan = parsePlan(printPlan(compile(job, pick ? { pick } : {}).plan), "plan.json");
  const routers = routerChoices(plan);
  const run = await openRun(plan, { baseDir: fixture(""), watch: routers });
  /** What each router chose in a step, and what a capacity kept of it, microbatch after microbatch. */
  const chosen = async () =>
    Promise.all(routers.map(async (id) => Float32Array.from((await run.watched(id)).flatMap((t) => [...byPosition(t, job)]))));
  const first = await run.step({ detailed: true });
  const choices = [await chosen()];
  const gradients = await run.gradients();
  const second = await run.step({ detailed: true });
  choices.push(await chosen());
  const learnt = [...(await run.parameters())].filter(([name]) => !gradients.has(name));
  await run.close();
  return { steps: [first, second], routers, choices, gradients, learnt };
}
type Numbers = Awaited<ReturnType<typeof numbers>>;

/** The numbers of a job that other meshes are compared with: computed once. */
function reference(job: object): Promise<Numbers> {
  const key = JSON.stringify(job);
  const known = references.get(key) ?? numbers(jobOf(job));
  references.set(key, known);
  return known;
}
const references = new Map<string, Promise<Numbers>>();
afterAll(() => references.clear());

/**
 * How many of the first `most` steps routers begin alike. A choice between equals is a matter of rounding, and what follows from another choice is another
 * model: so where a few tokens go elsewhere, only what came before is compared. A wrong router sends many elsewhere. A capacity chooses,
 * too: of two tokens whose weights differ in the last bits, it drops one.
 */
function alike(got: Numbers, want: Numbers, most: number): number {
  const at = want.choices.slice(0, most).findIndex((layers, step) => layers.some((c, i) => differing(c, got.choices[step]![i]!) > 0));
  if (at < 0) return most;
  const [first] = want.choices[at]!.map((c, i) => differing(c, got.choices[at]![i]!)).filter((n) => n > 0);
  expect(first, `choices that differ in step ${at}`).toBeLessThanOrEqual(8);
  return at;
}
const differing = (a: Float32Array, b: Float32Array): number => a.reduce((n, x, i) => n + Number(x !== b[i]), 0);

/**
 * Compares; returns how many of the two steps could be. With `reduction` bf16, gradients of the first step are compared alone: an update
 * divides a gradient by its own size, so that the sign of a small one, which is rounding, would move its weight by all of lr. Routers of the second step then choose among other
 * scores: logits of the first layer are up to 0.07 apart.
 */
function sameSoFar(got: Numbers, want: Numbers, reduction: Job["train"]["gradient_reduction"] = "f32"): number {
  const steps = alike(got, want, reduction === "bf16" ? 1 : 2);
  const bound = tolerances[reduction];
  for (const [i, { loss, mtp_loss, mtp_losses, aux_loss, grad_norm, parameter_norm, router_entropy }] of want.steps
    .slice(0, steps)
    .entries()) {
    const other = got.steps[i]!;
    expect(Math.abs(other.loss - loss), `loss of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
    expect(other.mtp_loss === undefined).toBe(mtp_loss === undefined);
    expect(Math.abs((other.mtp_loss ?? 0) - (mtp_loss ?? 0)), `loss of further tokens of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
    expect(Math.abs(other.aux_loss - aux_loss), `balancing loss of step ${i}`).toBeLessThan(1e-4 * Math.max(1, aux_loss));
    expect(Math.abs(other.grad_norm / grad_norm - 1), `norm of step ${i}`).toBeLessThan(bound);
    expect(Math.abs(other.parameter_norm! / parameter_norm! - 1), `norm of the weights after step ${i}`).toBeLessThan(bound / 10);
    expect(other.router_entropy === undefined).toBe(router_entropy === undefined);
    expect(Math.abs((other.router_entropy ?? 0) - (router_entropy ?? 0)), `router entropy of step ${i}`).toBeLessThan(1e-4);
    for (const [k, depth] of mtp_losses?.entries() ?? [])
      expect(Math.abs(other.mtp_losses![k]! - depth), `loss of depth ${k + 1} of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
  }
  const tensors = ({ gradients, learnt }: Numbers) => new Map([...(steps > 0 ? gradients : []), ...(steps > 1 ? learnt : [])]);
  const [ours, theirs] = [tensors(got), tensors(want)];
  expect([...ours.keys()].sort()).toEqual([...theirs.keys()].sort());
  for (const [name, t] of theirs) expect(distance(ours.get(name)!.data, t.data), name).toBeLessThan(bound);
  return steps;
}
/**
 * The largest relative distance of norms and tensors. bf16: each rank rounds its sum, and the sum over ranks is rounded once for each
 * collective that it takes, by 2^-9 of an element at most; sums of ranks whose gradients cancel in part are larger than what is left.
 */
const tolerances = { f32: 1e-4, bf16: 2 ** -5 };
const same = (got: Numbers, want: Numbers): void => expect(sameSoFar(got, want), "steps in which routers choose alike").toBe(2);
/** Over many random jobs: few may end early. */
const enough = (steps: readonly number[]): void =>
  expect(steps.filter((n) => n < 2).length, "runs that a choice between equals ended").toBeLessThanOrEqual(2 + steps.length / 10);

const moe = { experts: 8, top_k: 2, ffn: 16, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
const latent = { kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 };
const llama3 = { type: "llama3", factor: 4, original_seq: 8 };
const yarn = { type: "yarn", factor: 4, original_seq: 8, beta_fast: 4, mscale: 1, mscale_all_dim: 0.8 };
const shape = (over: object = {}) => ({ layers: 2, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16, ...over });
/** Sizes that thirds and halves divide: grids whose strides do not nest have both. */
const thirds = { hidden: 36, heads: 12, kv_heads: 6, vocab: 258, seq: 24 };
const moeOfThirds = { ...moe, experts: 6, ffn: 24 };
/** A gradient that is rounding alone, 5e-9 where few tokens have labels, would move its weight by all of lr with an eps of 1e-8. */
const adamw = { lr: 1e-2, eps: 1e-6 };
/** Sequences in a step: one for each of 8 data ranks, in the full tier two, so that also those ranks accumulate gradients. */
const SEQUENCES = isFull ? 16 : 8;
const text = (model: object, parallel: Parallel, train: object = {}, data: object = {}) => ({
  name: "law",
  model,
  parallel,
  train: {
    ...{ micro_batch: 1, global_batch: SEQUENCES, steps: 2, precision: "fp32", init: { std: 0.2 } },
    metrics: { parameter_norm: true, router_entropy: true },
    optimizer: adamw,
    ...train,
  },
  // where the text begins, sequences are one letter over and over: equals, among which rounding would choose
  data: { path: "corpus.txt", tokenizer: "bytes", order: "shuffled", ...data },
});
const some = labelsBeside(fixture("corpus.txt"));
afterAll(some.remove);

test("a token that a capacity drops in place of its equal ends the comparison; many such tokens are a fault", async () => {
  const got = await numbers(jobOf(text(shape({ moe: { ...moe, capacity: { factor: 0.75 } } }), { world: 1 })));
  const each = ["top_k_mask", "apply_capacity"];
  expect(got.routers).toEqual(["layers.0", "layers.1"].flatMap((layer) => each.map((name) => `${layer}.moe.${name}`)));
  /** The same numbers, had the capacity of the last layer kept others in the second step. */
  const keptOthers = (count: number): Numbers => {
    const [first, second] = [got.choices[0]!, [...got.choices[1]!]];
    second[3] = second[3]!.map((kept, i) => (i < count ? 1 - kept : kept));
    return { ...got, steps: [got.steps[0]!, { ...got.steps[1]!, loss: got.steps[1]!.loss + 1 }], choices: [first, second] };
  };
  expect(() => sameSoFar(keptOthers(0), got)).toThrow("loss of step 1");
  expect(sameSoFar(keptOthers(2), got)).toBe(1);
  expect(() => sameSoFar(keptOthers(9), got)).toThrow("choices that differ in step 1");
  expect(sameSoFar(keptOthers(9), got, "bf16")).toBe(1);
});

describe("on named meshes", () => {
  const dense: Parallel[] = [
    { world: 2, tensor: 2 },
    { world: 4, tensor: 4, sequence: true },
    { world: 4, context: 4 },
    { world: 8, tensor: 2, pipeline: 2, distributed_optimizer: true },
  ];
  for (const { options, rows } of byTier(dense, (_, i) => i === 3))
    test.each(rows)("dense %j", options, async (parallel) => {
      same(await numbers(jobOf(text(shape(), parallel))), await reference(text(shape(), { world: 1 })));
    });
  test("dense, tied embeddings, q/k norm per head, no sequence parallelism", full, async () => {
    const model = shape({ tie_embeddings: true, qk_norm: "head" });
    same(
      await numbers(jobOf(text(model, { world: 4, tensor: 2, distributed_optimizer: true }))),
      await reference(text(model, { world: 1 })),
    );
  });
  test("tied embeddings on the first and the last stage", full, async () => {
    const model = shape({ tie_embeddings: true });
    const train = { global_batch: 8 };
    same(
      await numbers(jobOf(text(model, { world: 8, tensor: 2, pipeline: 2, distributed_optimizer: true }, train))),
      await reference(text(model, { world: 1 }, train)),
    );
  });
  const schedules: [Parallel, object?, object?][] = [
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
    // parts without a layer pass on what they receive
    [{ world: 4, pipeline: 4, layout: "Ett||tt|L" }],
    [{ world: 2, pipeline: 2, layout: "E||tt,tt|L" }],
    [{ world: 2, pipeline: 2, layout: "Etttt|||L", tensor: 1, distributed_optimizer: true }, { tie_embeddings: true }],
    [{ world: 3, pipeline: 3, layout: "||Et|tt|tL|" }, { tie_embeddings: true }],
    [{ world: 1, layout: "Et||tt|t|L" }],
    // microbatches that are no multiple of the stages
    [{ world: 2, pipeline: 2, virtual_pipeline: 2 }, {}, { global_batch: 5 }],
    [{ world: 3, pipeline: 3, layout: "E|t|t|t|t|L" }, {}, { global_batch: 11 }],
  ];
  for (const { options, rows } of byTier(schedules, (_, i) => i === 3))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))(
      "stages, their order and that of ranks: %s",
      options,
      async (_, parallel, over = {}, train = {}) => {
        const model = shape({ layers: 4, moe, ...over });
        same(await numbers(jobOf(text(model, parallel, train))), await reference(text(model, { world: 1 }, train)));
      },
    );
  const attentions = {
    "biases, no gate, positions in neighbours": {
      qkv_bias: true,
      out_bias: true,
      mlp_bias: true,
      activation: "gelu",
      rope: { interleaved: true },
    },
    "layer norms of the stream and of heads": { norm: { type: "layernorm" }, qk_norm: "head" },
    "learned positions": { positions: "learned", max_positions: 20 },
    "half of a head is rotated": { rope: { fraction: 0.5 } },
    "layer norms of all heads, gains less 1": { norm: { type: "layernorm", zero_centered: true }, qk_norm: "full" },
    "latent attention, gains less 1": { norm: { zero_centered: true }, mla: latent, kv_heads: 8, head_dim: 10, rope: { scaling: yarn } },
    "latent attention, queries too": {
      norm: { type: "layernorm" },
      mla: { ...latent, q_rank: 10 },
      kv_heads: 8,
      head_dim: 10,
      out_bias: true,
    },
  };
  const attentionMeshes = [
    { world: 8, tensor: 4, sequence: true, context: 2, distributed_optimizer: true },
    { world: 2, tensor: 2 },
  ];
  for (const { options, rows } of byTier(Object.entries(attentions), ([name]) => name.endsWith("queries too")))
    test.each(rows)("%s", options, async (_, model) => {
      const alone = await reference(text(shape(model), { world: 1 }));
      for (const parallel of attentionMeshes.slice(0, isFull ? 2 : 1)) same(await numbers(jobOf(text(shape(model), parallel))), alone);
    });
  // some tensor ranks have copies of one key/value head, whose gradients are summed
  const sharedHeads: [object, Parallel[]][] = [
    [
      { kv_heads: 2 },
      [
        { world: 4, tensor: 4 },
        { world: 8, tensor: 8, sequence: true, distributed_optimizer: true },
      ],
    ],
    [{ kv_heads: 1, qkv_bias: true, qk_norm: "head" }, [{ world: 8, tensor: 4, sequence: true, context: 2 }]],
    [{ kv_heads: 2, qk_norm: "full", tie_embeddings: true }, [{ world: 8, tensor: 4, sequence: true, pipeline: 2 }]],
    [{ kv_heads: 2, moe, dropout: { attention: 0.2 } }, [{ world: 8, tensor: 4, sequence: true, expert: 4, expert_tensor: 2 }]],
    [{ ...thirds, kv_heads: 2, moe: moeOfThirds }, [{ world: 6, tensor: 6, sequence: true, expert: 2, expert_tensor: 1 }]],
  ];
  for (const { options, rows } of byTier(sharedHeads, (_, i) => i === 4))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))(
      "key/value heads fewer than tensor ranks: %s",
      options,
      async (_, model, meshes) => {
        const train = { global_batch: 12 };
        const alone = await reference(text(shape(model), { world: 1 }, train));
        for (const mesh of meshes) same(await numbers(jobOf(text(shape(model), mesh, train))), alone);
      },
    );
  // an orthogonal update reads the whole matrix: shares of the state, and matrices over tensor ranks, are gathered for it
  const muonMeshes: Parallel[] = [
    { world: 8, tensor: 2, sequence: true, pipeline: 2, distributed_optimizer: true },
    { world: 8, tensor: 2, sequence: true, expert: 4, expert_tensor: 2, distributed_optimizer: true },
    { world: 8, context: 2, expert: 2, distributed_optimizer: true, optimizer_instances: 2 },
    { world: 4, tensor: 4, sequence: true, expert: 2 },
  ];
  for (const { options, rows } of byTier(muonMeshes, () => false))
    test.each(rows)("muon: %j", options, async (parallel) => {
      const model = shape({ moe: { ...moe, shared: { ffn: 24, gate: true } }, tie_embeddings: true });
      const train = { optimizer: { lr: 1e-2, type: "muon" }, global_batch: 8 };
      same(await numbers(jobOf(text(model, parallel, train))), await reference(text(model, { world: 1 }, train)));
    });
  // a token is sent once to each rank with experts of it, and the rank returns one sum: the sums over experts have another order
  const once: [Parallel, object?, object?][] = [
    [{ world: 8, tensor: 2, sequence: true, expert: 4, expert_tensor: 2, distributed_optimizer: true }, { shared: { ffn: 24 } }],
    [{ world: 4, expert: 4 }, { rows_bound: 4, latent: 12 }, { recompute: { mode: "selective", modules: ["moe_permute"] } }],
    [{ world: 8, pipeline: 2, expert: 2, expert_tensor: 2 }, { bias: true }, { recompute: { mode: "full" } }],
    [{ world: 4, expert: 2 }, { top_k: 3 }, { recompute: { mode: "selective", modules: ["moe"] } }],
    [
      { world: 8, pipeline: 2, schedule: "zero_bubble", context: 2, expert: 4, expert_overlap: "shared" },
      { shared: { ffn: 24, gate: true } },
    ],
    [{ world: 4, expert: 4 }, { router: { groups: 2, group_top_k: 1, aux_coeff: 0.05 } }],
    [{ world: 4, expert: 4 }, { router: { type: "expert_choice", normalize_top_k: false } }],
    // a rank has two groups
    [{ world: 2, expert: 2 }, { router: { groups: 4, group_top_k: 2, aux_coeff: 0.05 } }],
  ];
  for (const { options, rows } of byTier(once, (_, i) => i < 2))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))(
      "the dispatcher once: %s",
      options,
      async (_, parallel, over = {}, train = {}) => {
        const of = (dispatch: string, mesh: Parallel, more: object) => text(shape({ moe: { ...moe, ...over, dispatch } }), mesh, more);
        same(await numbers(jobOf(of("once", parallel, train))), await reference(of("all_to_all", { world: 1 }, {})));
      },
    );
  test("the dispatcher all_gather", full, async () => {
    const model = shape({ moe: { ...moe, dispatch: "all_gather" } });
    same(
      await numbers(jobOf(text(model, { world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true }))),
      await reference(text(shape({ moe }), { world: 1 })),
    );
  });
});

// no factor is common to both: tokens cross by a fold, in which each rank keeps those it has
describe("on grids that do not nest", () => {
  const pairs: [Parallel, object?, object?][] = [
    [{ world: 6, tensor: 2, sequence: true, expert: 3 }],
    [{ world: 6, tensor: 3, sequence: true, expert: 2, distributed_optimizer: true }],
    [
      { world: 6, context: 2, expert: 3 },
      { shared: { ffn: 24, gate: true }, latent: 12 },
    ],
    [{ world: 6, tensor: 2, sequence: true, expert_tensor: 3 }],
    [{ world: 12, pipeline: 2, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true }, { dispatch: "all_gather" }],
    [{ world: 12, pipeline: 2, schedule: "zero_bubble", tensor: 3, sequence: true, expert: 2 }, {}, { recompute: { mode: "full" } }],
    [{ world: 12, tensor: 2, sequence: true, context: 2, expert: 3, expert_tensor: 2, distributed_optimizer: true }],
    [{ world: 12, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true, optimizer_instances: 2 }],
    [{ world: 6, tensor: 2, sequence: true, expert: 3 }, { router: { type: "expert_choice", normalize_top_k: false } }],
    [{ world: 12, tensor: 2, sequence: true, context: 2, expert: 3, expert_tensor: 2, distributed_optimizer: true }, { dispatch: "once" }],
    // a group of 3 experts lies on two of three ranks
    [
      { world: 12, context: 2, expert: 3 },
      { dispatch: "once", router: { groups: 2, group_top_k: 1, aux_coeff: 0.05 } },
    ],
  ];
  for (const { options, rows } of byTier(pairs, (_, i) => i === 6))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))("%s", options, async (_, parallel, over = {}, train = {}) => {
      const model = shape({ ...thirds, moe: { ...moeOfThirds, ...over } });
      const job = jobOf(text(model, parallel, { global_batch: 12, ...train }));
      expect(hasSeparateGrids(buildMesh(job))).toBe(true);
      same(await numbers(job), await reference(text(model, { world: 1 }, { global_batch: 12 })));
    });
  test("the capacity of an expert depends only on the sharding of the sequence", full, async () => {
    const model = shape({ ...thirds, moe: { ...moeOfThirds, capacity: { factor: 1, pad: true } } });
    const [got, want] = [{ world: 6, expert: 3 }, { world: 2 }].map((p) =>
      numbers(jobOf(text(model, { tensor: 2, sequence: true, ...p }, { global_batch: 12, micro_batch: 2 }))),
    );
    same(await got!, await want!);
  });
});

// what a microbatch is says train.micro_batch alone: with microbatch too, where its means are what is averaged, meshes do not matter
describe.each(["microbatch", "token"])(
  "labels that ignore some tokens, loss_weighting %s, and multi-token prediction",
  (loss_weighting) => {
    const mtp = { layers: 2, coeff: 0.3 };
    const train = { micro_batch: 2, loss_weighting };
    const model = shape({ moe, mtp });
    const numbersOn = (parallel: Parallel, over: object = {}) =>
      numbers(jobOf(text({ ...model, ...over }, parallel, train, { labels: some.path })));
    const alone = () => reference(text(model, { world: 1 }, train, { labels: some.path }));
    const meshes: Parallel[] = [
      { world: 2, tensor: 2, sequence: true },
      { world: 4, context: 4, context_method: "all_gather" },
      { world: 8, expert: 4, expert_tensor: 2, distributed_optimizer: true },
      { world: 8, tensor: 2, sequence: true, context: 2, pipeline: 2, expert: 2 },
      { world: 4, pipeline: 2, virtual_pipeline: 1, schedule: "zero_bubble", distributed_optimizer: true },
      { world: 2, pipeline: 2, layout: "E|t|t|mmL" },
    ];
    for (const { options, rows } of byTier(meshes, (_, i) => i === 3 && loss_weighting === "token"))
      test.each(rows.map((p) => [JSON.stringify(p), p] as const))("%s", options, async (_, parallel) =>
        same(await numbersOn(parallel), await alone()),
      );
    // the embedding on the first stage, before the further layers, and as the head: three stages have it
    const layouts: Parallel[] = [
      { world: 3, pipeline: 3, layout: "Et|tmm|L" },
      { world: 8, pipeline: 4, tensor: 2, sequence: true, layout: "E|tt|mm|L", distributed_optimizer: false, schedule: "zero_bubble" },
      { world: 8, pipeline: 4, layout: "Et|t|mm|L", distributed_optimizer: true, expert: 2 },
    ];
    const tied = { tie_embeddings: true };
    test.each(layouts)("tied embeddings, the head past the further layers: %j", full, async (parallel) => {
      const alone = await reference(text({ ...model, ...tied }, { world: 1 }, train, { labels: some.path }));
      same(await numbersOn(parallel, tied), alone);
    });
  },
);

test("labels and their weights change the result", full, async () => {
  const model = shape({ moe });
  const losses = [
    await reference(text(model, { world: 1 })),
    await reference(text(model, { world: 1 }, {}, { labels: some.path })),
    await reference(text(model, { world: 1 }, { loss_weighting: "token" }, { labels: some.path })),
    await reference(text(model, { world: 1 }, { micro_batch: 4 }, { labels: some.path })),
  ];
  expect(new Set(losses.map(({ steps }) => steps[0]!.loss)).size).toBe(4);
});

// an expert has room for so many of the tokens of one rank, as in Megatron Core: it matters in how many pieces the sequence is cut
describe("with a capacity, for equal shardings of the sequence", () => {
  const pieces: readonly Parallel[][] = [
    [{ world: 1 }, { world: 8, pipeline: 2, expert: 4, distributed_optimizer: true }, { world: 4, expert: 2, expert_tensor: 2 }],
    [
      { world: 2, tensor: 2, sequence: true },
      { world: 8, tensor: 2, sequence: true, expert: 8, distributed_optimizer: true },
    ],
    [
      { world: 2, context: 2 },
      { world: 16, context: 2, pipeline: 2, expert: 4, expert_tensor: 2 },
    ],
    [
      { world: 4, tensor: 2, sequence: true, context: 2 },
      { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    ],
  ];
  const capacities: readonly [object, string][] = [
    [{ factor: 0.75 }, "all_to_all"],
    [{ factor: 0.75 }, "all_gather"],
    [{ factor: 1, drop: "position" }, "all_to_all"],
    [{ factor: 1, pad: true }, "all_to_all"],
    [{ factor: 0.75 }, "once"],
    [{ factor: 1, pad: true }, "once"],
    [{ factor: 1.5, drop: "position", pad: true }, "all_gather"],
  ];
  const cases = capacities.map(([c, dispatch]) => [JSON.stringify(c), dispatch, c] as const);
  for (const { options, rows } of byTier(cases, () => false))
    test.each(rows)("%s, %s", options, async (_, dispatch, capacity) => {
      const router = { ...moe.router, score: "sigmoid", expert_bias: true, bias_rate: 0.05 };
      const model = shape({ moe: { ...moe, capacity, dispatch, router } });
      const train = { micro_batch: 2 };
      const losses = [];
      const tried = isFull ? pieces : pieces.slice(1, 3);
      for (const meshes of tried) {
        const [first, ...others] = meshes.map((mesh) => numbers(jobOf(text(model, mesh, train))));
        for (const other of others) same(await other, await first!);
        losses.push((await first!).steps[0]!.loss);
      }
      expect(new Set(losses).size).toBe(tried.length);
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
  const alone = await reference(text(model, { world: 1 }, { micro_batch: 4 }));
  expect(alone.steps[0]!.aux_loss).toBeGreaterThan(0.1);
  for (const mesh of meshes.slice(isFull ? 0 : 1, isFull ? 3 : 2)) same(await numbers(jobOf(text(model, mesh))), alone);
});

test("the same plan on the same inputs gives the same bits", async () => {
  const job = jobOf(text(shape({ moe }), { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }));
  const [first, again] = [await numbers(job), await numbers(job)];
  const figures = ({ steps }: Numbers) => steps.map(({ loss, aux_loss, grad_norm }) => [loss, aux_loss, grad_norm]);
  expect(figures(again)).toEqual(figures(first));
  expect(again.choices).toEqual(first.choices);
  for (const [name, t] of first.gradients) expect(sameNumbers(again.gradients.get(name)!.data, t.data), name).toBe(true);
});

test("bf16 on any of these meshes follows fp32", async () => {
  const alone = await reference(text(shape({ moe }), { world: 1 }));
  for (const parallel of [{ world: 1 }, { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }]) {
    const got = await numbers(jobOf(text(shape({ moe }), parallel, { precision: "bf16" })));
    // bf16 keeps 8 bits: 2^-9 relative per rounding; a few dozen roundings on the way to the loss
    for (const [i, { loss, aux_loss }] of alone.steps.entries()) {
      expect(Math.abs(got.steps[i]!.loss - loss), `loss of step ${i}`).toBeLessThan(2e-2);
      expect(Math.abs(got.steps[i]!.aux_loss - aux_loss), `balancing loss of step ${i}`).toBeLessThan(2e-2);
    }
    expect(got.steps[0]!.loss).not.toBe(alone.steps[0]!.loss);
  }
});

/** All pairs of grids over 6 or 12 ranks whose strides do not nest. */
const apart = [6, 12].flatMap((ranks) => {
  const degrees = [1, 2, 3, 4, 6].filter((n) => ranks % n === 0);
  return degrees.flatMap((tensor) =>
    degrees.flatMap((context) =>
      degrees.flatMap((expert) =>
        degrees.flatMap((expert_tensor) => {
          const data = ranks / (tensor * context);
          if (!Number.isInteger(data) || ranks % (expert * expert_tensor) !== 0) return [];
          const grids = { tensor, context, data, expert, expert_tensor };
          const mesh = buildMesh({
            model: { kv_heads: tensor },
            parallel: parallelOf({ world: ranks, ...grids }),
            cluster: { nodes: 1, gpus_per_node: 8, device: "cpu" },
          });
          return hasSeparateGrids(mesh) ? [grids] : [];
        }),
      ),
    ),
  );
});
/** Layouts for two stages, of so many layers (t) and with what goes before the head (m). */
const layouts: Readonly<Record<string, (t: number, m: string) => string>> = {
  uneven: (t, m) => `${t === 2 ? "Ett|" : "Et|ttt"}${m}L`,
  "empty between": (t, m) => `E||t*${t},|${m}L`,
  "two empty": (t, m) => `Et*${t}|||${m}L`,
  "the first empty": (t, m) => `|Et|t*${t - 1}|${m}L`,
  "the last empty": (t, m) => (m ? `Et*${t}|${m}L` : `Et*${t - 1}|t|L|`),
};
const power = (max: number) => fc.integer({ min: 0, max }).map((n) => 2 ** n);
/** Draws are made smaller towards the first of each list. */
const oneOf = fc.constantFrom;
const router = fc.oneof(
  { weight: 2, arbitrary: fc.constant(moe.router) },
  {
    weight: 4,
    arbitrary: fc.record({
      score: oneOf("softmax", "sigmoid", "sqrt_softplus"),
      normalize_top_k: fc.boolean(),
      scaling: oneOf(1, 2.5),
      bias: fc.boolean(),
      precision: oneOf("model", "fp32"),
      jitter: oneOf(null, null, 0.05),
      groups: oneOf(1, 2),
      group_top_k: fc.constant(1),
      expert_bias: fc.boolean(),
      ...{ bias_rate: fc.constant(0.05), aux_coeff: fc.constant([0.05, 0.02]), z_coeff: fc.constant(0.01) },
      balance: oneOf(["aux_loss", "seq_aux_loss"], ["seq_aux_loss", "aux_loss"]),
    }),
  },
  oneOf<object>(
    { balance: "sinkhorn", normalize_top_k: false, z_coeff: 0.01 },
    { balance: "quantile", quantile_ema: 0.5 },
    { type: "expert_choice", normalize_top_k: false, z_coeff: 0.01 },
    { force: "uniform", score: "sigmoid", aux_coeff: 0.05 },
  ),
);
const anyJob = fc
  .record({
    model: fc.record({
      layers: oneOf(2, 4),
      kv_heads: oneOf(4, 8, 2, 1),
      qk_norm: oneOf("none", "head", "full"),
      tie_embeddings: fc.boolean(),
      vocab_multiple: oneOf(1, 1, 24),
      qkv_bias: fc.boolean(),
      out_bias: fc.boolean(),
      positions: oneOf("rope", "rope", "rope", "learned", "none"),
      mlp_bias: fc.boolean(),
      norm: oneOf<object>({}, {}, { type: "layernorm" }, { type: "layernorm", zero_centered: true }, { zero_centered: true }),
      dropout: oneOf({}, {}, { hidden: 0.1 }, { attention: 0.2 }, { hidden: 0.2, attention: 0.1 }),
      activation: fc.oneof(
        { weight: 5, arbitrary: fc.constant("swiglu") },
        { weight: 3, arbitrary: oneOf("geglu", "gelu", "squared_relu") },
      ),
      rope: oneOf<object>({}, { interleaved: true }, { fraction: 0.5 }, { scaling: llama3 }, { interleaved: true, scaling: yarn }),
    }),
    mla: fc.option(oneOf(latent, { ...latent, q_rank: 10 }, { ...latent, norm: false }), { freq: 2 }),
    experts: fc.option(
      fc.record({
        experts: oneOf(4, 8),
        top_k: oneOf(2, 3),
        router,
        capacity: oneOf<unknown>(
          "dropless",
          "dropless",
          "dropless",
          { factor: 1 },
          { factor: 0.75, drop: "position" },
          { factor: 1, pad: true },
        ),
        dispatch: oneOf("all_to_all", "once", "all_gather"),
        shared: oneOf(null, null, { ffn: 24 }, { ffn: 24, gate: true }),
        latent: oneOf(null, null, 16),
        bias: fc.boolean(),
        layers: oneOf<unknown>("all", "all", { first_dense: 1 }, { every: 2 }),
      }),
      { freq: 3 },
    ),
    parallel: fc.record({
      tensor: power(2),
      pipeline: power(1),
      context: power(2),
      data: power(3),
      expert: power(3),
      expert_tensor: power(2),
      apart: fc.oneof({ weight: 3, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: oneOf(...apart) }),
      sequence: fc.boolean(),
      distributed_optimizer: fc.boolean(),
      context_method: oneOf("ring", "all_gather"),
      order: oneOf("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"),
    }),
    // what asks for stages, or for a shared state, is taken where there is one
    stages: oneOf({}, { virtual_pipeline: 2 }, { schedule: "zero_bubble" }, ...Object.keys(layouts).map((layout) => ({ layout }))),
    // of chunks, an odd number of microbatches
    odd: fc.boolean(),
    optimizer_instances: power(1),
    // in MiB: buckets of one tensor and of several
    overlap: fc.record({
      gradient_bucket: oneOf<"none" | number>("none", "none", 0.02, 0.0001),
      parameter_bucket: oneOf<"none" | number>("none", "none", 0.01, 0.0001),
      parameter_gather: oneOf("step", "forward"),
      expert_overlap: oneOf("none", "shared", "interleave"),
      tensor_overlap: oneOf<"none" | "backward" | number>("none", "backward", 2),
    }),
    gradient_reduction: oneOf("f32", "f32", "bf16"),
    recompute: oneOf<object>(
      { mode: "none" },
      { mode: "none" },
      { mode: "selective", modules: ["core_attn", "layernorm"] },
      { mode: "selective", modules: ["moe_act", "layernorm"] },
      { mode: "selective", modules: ["moe"] },
      { mode: "full", method: "block" },
      { mode: "full", layers: 2 },
    ),
    micro_batch: oneOf(1, 2),
    mtp: oneOf(null, null, { layers: 1, coeff: 0.3 }, { layers: 2, coeff: 0.5 }),
    optimizer: oneOf<object>(
      ...[adamw, adamw],
      { ...adamw, type: "adam", weight_decay: 0.1 },
      { type: "sgd", lr: 0.05, momentum: 0.9, weight_decay: 0.1 },
      { type: "sgd", lr: 0.05, momentum: 0 },
      { ...adamw, type: "muon", weight_decay: 0.1 },
    ),
    // the first step has half as many sequences as the second
    batch_rampup: oneOf(null, null, null, { start: 8, increment: 8, samples: 8 }),
    // the letter e ends a document: some have two tokens, some more than a shard of a sequence
    documents: oneOf<object | undefined>(
      ...[undefined, undefined],
      { end: 101 },
      { end: 101, positions: false },
      { end: 101, mask: false, loss: false },
      { end: 10, mask: true, loss: false },
    ),
    learnt: oneOf<[string | null, string]>([null, "microbatch"], [null, "microbatch"], [some.path, "microbatch"], [some.path, "token"]),
  })
  .map(
    ({
      model,
      mla,
      experts,
      parallel: { apart, ...degrees },
      stages,
      odd,
      optimizer_instances,
      overlap: { gradient_bucket, parameter_bucket, parameter_gather, expert_overlap, tensor_overlap },
      gradient_reduction,
      recompute,
      micro_batch,
      mtp,
      documents,
      learnt,
      batch_rampup,
      optimizer,
    }) => {
      const pair = experts && apart;
      const { data, ...drawn } = pair ? { ...degrees, ...pair, sequence: true } : degrees;
      // half as much again of all that a third of the ranks has, but sequences in a step: those are three quarters
      const half = (n: number) => (pair ? (3 * n) / 2 : n);
      const step = pair
        ? { global_batch: 12, ...(batch_rampup ? { batch_rampup: { start: 6, increment: 6, samples: 6 } } : {}) }
        : odd && data <= 2 && ("layout" in stages || "virtual_pipeline" in stages)
          ? { global_batch: 5 * micro_batch * data }
          : { global_batch: 16, batch_rampup };
      const layout = "layout" in stages ? layouts[stages.layout]!(model.layers, "m".repeat(mtp?.layers ?? 0)) : undefined;
      const own = {
        ...(layout !== undefined && (drawn.pipeline > 1 || odd) ? { layout } : drawn.pipeline === 1 ? {} : stages),
        ...(drawn.distributed_optimizer ? { optimizer_instances, parameter_bucket, parameter_gather } : {}),
        // a schedule without bubbles has no pairs
        ...{
          gradient_bucket,
          ...(experts ? { expert_overlap: "schedule" in stages && drawn.pipeline > 1 ? "shared" : expert_overlap } : {}),
          ...(drawn.sequence && drawn.tensor > 1 ? { tensor_overlap } : {}),
        },
        ...(gradient_bucket === "none" ? {} : { communication_sms: 8 }),
      };
      const world = drawn.tensor * drawn.pipeline * drawn.context * data;
      // heads of a latent have keys and values, and norms, of their own
      const latents = mla ? { mla, kv_heads: half(8), head_dim: undefined, qk_norm: "none", qkv_bias: false } : {};
      // those of latent attention rotate other channels, and a depth of multi-token prediction has no position of its own
      const rope = mla && "fraction" in model.rope ? {} : model.rope;
      const asked = mtp && model.positions === "learned" ? "none" : model.positions;
      // without rotation a bias adds the same to the scores of all keys: its gradient is rounding alone
      const { qkv_bias, qk_norm, norm } = model;
      const positions = !mla && (qkv_bias || ("type" in norm && qk_norm !== "none")) ? "rope" : asked;
      const mixed = experts ? { moe: { ffn: half(16), ...experts, experts: half(experts.experts) } } : {};
      const { tensor, context, sequence } = drawn;
      // an expert's capacity is decided by those who share their tokens: it depends on how a sequence is cut, and by nothing else
      const cut = { world: tensor * context, tensor, context, sequence };
      const alone: Parallel = !experts || experts.capacity === "dropless" ? { world: 1 } : cut;
      const shaped = shape({
        ...(pair ? thirds : {}),
        ...model,
        kv_heads: half(pair ? Math.max(2, model.kv_heads) : model.kv_heads),
        ...mixed,
        ...latents,
        ...{ mtp, rope, positions },
      });
      const [labels, loss_weighting] = learnt;
      const train = { micro_batch, loss_weighting, optimizer, ...step };
      return {
        job: text(shaped, { ...drawn, ...own, world } as Parallel, { ...train, recompute, gradient_reduction }, { labels, documents }),
        alone: text(shaped, alone, train, { labels, documents }),
      };
    },
  )
  .filter(({ job }) => job.parallel.world! <= 16 && readJob(stringify(job), "law.yaml").job !== undefined);

test("on any legal mesh of up to 16 ranks, any small model, documents, labels, dropout and jitter, optimizer, growth of the batch, schedule, router, capacity and recompute", async () => {
  const steps: number[] = [];
  const { failed, counterexample, errorInstance, seed, counterexamplePath } = await fc.check(
    fc.asyncProperty(anyJob, async ({ job, alone }) => {
      const meshed = jobOf(job);
      const { gradient_reduction } = meshed.train;
      const compared = sameSoFar(await numbers(meshed), await reference(alone), gradient_reduction);
      steps.push(gradient_reduction === "bf16" ? 2 * compared : compared);
    }),
    { numRuns: draws(1, 200) },
  );
  if (failed)
    expect.fail(`${(errorInstance as Error).message}
Its numbers are not those of ${JSON.stringify(counterexample![0].alone.parallel)}; drawn by seed ${seed}, path ${counterexamplePath}.
The smallest job that fails:

${stringify(counterexample![0].job)}`);
  enough(steps);
});

test("any choice of dims gives the same numbers: the rules decide cost only", async () => {
  const router = {
    score: "sigmoid",
    expert_bias: true,
    bias_rate: 0.05,
    balance: ["seq_aux_loss", "global_aux_loss"],
    aux_coeff: [0.05, 0.05],
  };
  const experts = {
    plain: {},
    rich: {
      router: { ...router, bias: true },
      bias: true,
      capacity: { factor: 1, pad: true },
      shared: { ffn: 24, gate: true },
      latent: 16,
    },
    once: { dispatch: "once", top_k: 3 },
    even: { router: { balance: "sinkhorn", normalize_top_k: false } },
    chosen: { router: { type: "expert_choice", normalize_top_k: false } },
  };
  const jobFor = (parallel: Parallel, over: object): object =>
    parallel.world! % 3 === 0
      ? text(shape({ ...thirds, moe: { ...moeOfThirds, ...over } }), parallel, { global_batch: 12 })
      : text(shape({ moe: { ...moe, ...over } }), parallel);
  const steps: number[] = [];
  const meshes: Parallel[] = [
    { world: 4, tensor: 2, sequence: true, expert: 2 },
    { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    { world: 8, tensor: 2, sequence: true, expert: 2, expert_tensor: 2, distributed_optimizer: true },
    { world: 8, pipeline: 2, expert: 4 },
    { world: 6, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true },
    { world: 12, tensor: 2, sequence: true, context: 2, expert: 3, expert_tensor: 2 },
  ];
  await fc.assert(
    fc.asyncProperty(fc.integer(), fc.constantFrom(...meshes), fc.constantFrom(...Object.values(experts)), async (seed, parallel, over) => {
      let s = seed;
      const pick = (votes: readonly Choice[]): Choice => {
        s = Math.imul(s, 1664525) + 1013904223;
        return votes[(s >>> 8) % (votes.length + 1)] ?? { by: () => "nothing" };
      };
      const job = jobFor(parallel, over);
      steps.push(sameSoFar(await numbers(jobOf(job), pick), await reference(job)));
    }),
    {
      numRuns: draws(1, 20),
      // E cut by the same factors in another order: once two layouts under one name
      examples: [
        [77, meshes[1]!, experts.plain],
        ...(isFull ? [[1538828707, meshes[1]!, experts.plain] as [number, Parallel, object]] : []),
      ],
    },
  );
  enough(steps);
});
