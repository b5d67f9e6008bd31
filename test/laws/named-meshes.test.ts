import { afterAll, describe, expect, test } from "vitest";
import { buildMesh, hasSeparateGrids } from "../../src/passes/mesh.ts";
import { fixture, jobOf } from "../support/job.ts";
import { labelsBeside } from "../support/labels.ts";
import {
  latent,
  moe,
  moeOfThirds,
  type Numbers,
  numbers,
  type Parallel,
  reference,
  references,
  same,
  sameSoFar,
  shape,
  text,
  thirds,
  yarn,
} from "../support/meshLaw.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

afterAll(() => references.clear());

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
    [{ world: 4, pipeline: 2, virtual_pipeline: 2, schedule: "zero_bubble", expert: 2, distributed_optimizer: true }],
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
  // a token crosses the network once for each node with experts of it, and the node returns one sum of its ranks' sums
  const perNode: [Parallel, number, object?, object?][] = [
    [{ world: 4, expert: 4 }, 2],
    [{ world: 8, tensor: 2, sequence: true, expert: 8, distributed_optimizer: true }, 4, { shared: { ffn: 24 }, bias: true }],
    [{ world: 8, expert: 4 }, 2, { top_k: 3, rows_bound: 4, latent: 12 }, { recompute: { mode: "selective", modules: ["moe_permute"] } }],
    [{ world: 8, tensor: 2, sequence: true, expert: 4, expert_tensor: 2 }, 4, {}, { recompute: { mode: "full" } }],
    [{ world: 16, context: 4, pipeline: 2, expert: 4, order: "tp-cp-ep-pp-dp", expert_overlap: "shared" }, 2],
    [{ world: 8, expert: 8 }, 2, { router: { groups: 4, group_top_k: 2, aux_coeff: 0.05 } }],
    [{ world: 4, expert: 4 }, 2, { router: { type: "expert_choice", normalize_top_k: false } }],
    [{ world: 16, pipeline: 2, expert: 8, expert_overlap: "interleave" }, 4, {}, { global_batch: 32 }],
    [{ world: 8, pipeline: 2, expert: 4, schedule: "zero_bubble", expert_overlap: "shared" }, 2, { top_k: 3, shared: { ffn: 24 } }],
  ];
  for (const { options, rows } of byTier(perNode, (_, i) => i === 0))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))(
      "the dispatcher once_per_node: %s",
      options,
      async (_, parallel, gpus_per_node, over = {}, train = {}) => {
        const of = (dispatch: string, mesh: Parallel) => text(shape({ moe: { ...moe, experts: 8, ...over, dispatch } }), mesh, train);
        const job = jobOf({ ...of("once_per_node", parallel), cluster: { gpus_per_node } });
        expect(buildMesh(job).subAxes.length).toBeGreaterThan(1);
        const { recompute: _recompute, ...alone } = train as { recompute?: object };
        same(await numbers(job), await reference(text(shape({ moe: { ...moe, experts: 8, ...over } }), { world: 1 }, alone)));
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
    [
      { world: 12, tensor: 3, sequence: true, expert: 4 },
      { experts: 8, top_k: 3, dispatch: "once_per_node" },
    ],
    [{ world: 12, context: 3, expert: 2, expert_tensor: 2 }, { dispatch: "once_per_node" }],
  ];
  for (const { options, rows } of byTier(pairs, (_, i) => i === 6))
    test.each(rows.map((c) => [JSON.stringify(c), ...c] as const))("%s", options, async (_, parallel, over = {}, train = {}) => {
      const model = shape({ ...thirds, moe: { ...moeOfThirds, ...over } });
      const job = jobOf({ ...text(model, parallel, { global_batch: 12, ...train }), cluster: { gpus_per_node: 2 } });
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
    [{ factor: 0.75 }, "once_per_node"],
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
        const nodes = { cluster: { gpus_per_node: 2 } };
        const [first, ...others] = meshes.map((mesh) => numbers(jobOf({ ...text(model, mesh, train), ...nodes })));
        for (const other of others) same(await other, await first!);
        losses.push((await first!).steps[0]!.loss);
      }
      expect(new Set(losses).size).toBe(tried.length);
    });
});

// its counts run over the microbatches of a step, so how many these are is part of it: of two meshes the same number
