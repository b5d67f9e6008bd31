/** What a layer communicates. Mistakes of cost never show in numbers, so the collectives themselves are held here: Megatron Core's, one by one. */

import { expect, test } from "vitest";
import { nodesOfExperts, ranksOfToken } from "../../schemas/experts.ts";
import { blocksOf, instructionsOf } from "../../schemas/program.ts";
import { numberInStage, rankAt, stageOfRank } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { microbatchesOf } from "../../src/passes/schedule.ts";
import { jobOf, meshOf, parallelOf } from "../support/job.ts";

const moe = { experts: 8, top_k: 2, ffn: 32, router: { balance: "aux_loss", aux_coeff: 0.01 } };
const plan = (parallel: object, model: object = { moe }, train: object = {}) =>
  compile(
    jobOf({
      name: "collectives",
      model: { layers: 4, hidden: 32, ffn: 32, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16, ...model },
      ...meshOf(parallel),
      train: { micro_batch: 1, global_batch: 16, steps: 1, optimizer: { lr: 1e-3 }, ...train },
      data: { path: "corpus.txt" },
    }),
  ).plan;

/** Moves between ranks in layer 1, or in the step block: `block name axes` → how many. */
function count(p: ReturnType<typeof plan>, block: "forward" | "backward" | "step", where = /layers\.1\./): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const i of blocksOf(p.programs[0]!).flatMap((b) => (b.kind === block ? b.instructions : [])))
    if (i.kind === "collective" && where.test(i.id)) counts[`${i.name} ${i.axes}`] = (counts[`${i.name} ${i.axes}`] ?? 0) + 1;
  return counts;
}

test("dispatch: once sends a row for each rank with experts of a token: as many collectives, fewer bytes, shorter lists", () => {
  const once = { ...moe, experts: 32, top_k: 8, dispatch: "once" };
  const mesh = { world: 8, expert: 8 };
  const [each, ranks] = ["all_to_all", "once"].map((dispatch) => plan(mesh, { hidden: 256, moe: { ...once, dispatch, rows_bound: 1 } }));
  for (const block of ["forward", "backward"] as const) expect(count(ranks!, block)).toEqual(count(each!, block));
  const sent = (p: ReturnType<typeof plan>) =>
    instructionsOf(p.programs[0]!)
      .filter((i) => i.kind === "collective" && i.axes === "ep")
      .reduce((sum, i) => sum + (i.kind === "collective" ? i.bytes : 0), 0);
  // 8·(1 − C(28, 8)/C(32, 8)) = 5.636 ranks of a token: 16 tokens to 8 ranks are lists of ⌈11.27⌉ rows instead of 16. Beside 256 channels of bf16
  // a row has 4 weights of f32 and its index, where each of 8 rows had 1 weight and an index
  expect(sent(ranks!) / sent(each!)).toBeGreaterThan(12 / 16);
  expect(sent(ranks!) / sent(each!)).toBeLessThan(12 / 16 + 0.02);
  const listOf = (p: ReturnType<typeof plan>): number =>
    Math.max(...p.programs[0]!.buffers.flatMap(({ id, shape }) => (/moe\.permute.*dispatch\.lists$/.test(id) ? [shape[1]!] : [])));
  expect([listOf(each!), listOf(ranks!)]).toEqual([16, 12]);
  // at worst every token goes to every rank; where a token may have all experts of a rank, lists are as many times as long
  const [worst, few] = ["all_to_all", "once"].map((dispatch) => plan(mesh, { moe: { ...once, dispatch } }));
  expect([listOf(worst!), listOf(few!)]).toEqual([64, 16]);
});

test("dispatch: once_per_node crosses the network with a row for each node of a token, and inside a node has a row for each rank", () => {
  const perNode = { ...moe, experts: 32, top_k: 8, dispatch: "once_per_node" };
  const of = (over: object) => plan({ world: 8, expert: 8, gpus_per_node: 4 }, { hidden: 256, moe: { ...perNode, ...over } });
  const [program] = of({ rows_bound: 1 }).programs;
  const rowsOf = (name: RegExp): number[] => program!.buffers.flatMap(({ id, shape }) => (name.test(id) ? [shape[1]!] : []));
  // 2·(1 − C(16, 8)/C(32, 8)) = 1.998 nodes of a token: 16 tokens to two nodes are two lists of 16 rows in each layer
  expect(rowsOf(/moe\.permute@.*dispatch\.lists$/)).toEqual([16, 16, 16, 16]);
  // a rank of the rail has the rows of two ranks, and each of them goes to 5.636 of 8 ranks in all: lists of ⌈2 · 16 · 5.636 / 8⌉ rows to four ranks
  expect(rowsOf(/moe\.permute_ranks@.*dispatch\.lists$/)).toEqual([23, 23, 23, 23]);
  const axes = new Set(instructionsOf(program!).flatMap((i) => (i.kind === "collective" && i.how === "all_to_all" ? [i.axes] : [])));
  expect([...axes].sort()).toEqual(["ep/2@4", "ep/4@1"]);
  // at worst each token of two ranks goes to each rank of the node
  const worst = of({}).programs[0]!.buffers.flatMap(({ id, shape }) =>
    /moe\.permute_ranks@.*dispatch\.lists$/.test(id) ? [shape[1]!] : [],
  );
  expect(worst).toEqual([32, 32, 32, 32]);
  // one rank on each node, or one node: the plan of once
  for (const gpus_per_node of [1, 8]) {
    const [own, once] = ["once_per_node", "once"].map((dispatch) =>
      plan({ world: 8, expert: 8, gpus_per_node }, { moe: { ...perNode, dispatch } }),
    );
    expect(own!.programs).toEqual(once!.programs);
  }
});

test("the nodes of expert groups are those on which their ranks are, in any order of axes", () => {
  const degrees = [1, 2, 3, 4, 6];
  const found = new Set<string>();
  for (const order of ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"] as const)
    for (const [tensor, pipeline, expert, expert_tensor] of product4(degrees))
      for (const gpus_per_node of [1, 2, 3, 4, 6, 8, 12]) {
        const data = 12 / tensor;
        if (!Number.isInteger(data) || 12 % (expert * expert_tensor) !== 0) continue;
        // in the other order both grids have runs of one length before the stages
        if (order === "tp-cp-ep-pp-dp" && tensor !== expert * expert_tensor) continue;
        const parallel = parallelOf({ world: 12 * pipeline, tensor, pipeline, data, expert, expert_tensor, order });
        const cluster = { nodes: 1, gpus_per_node, device: "cpu" } as const;
        const mesh = buildMesh({ model: { kv_heads: 12 }, parallel, cluster });
        const groups = Array.from({ length: 12 * pipeline }, (_, rank) => rank).flatMap((rank) => {
          const n = numberInStage(mesh, rank);
          if (n % (expert * expert_tensor) !== 0) return [];
          const nodeOf = (at: number): number => Math.floor(rankAt(mesh, stageOfRank(mesh, rank), n + at) / gpus_per_node);
          return [Array.from({ length: expert * expert_tensor }, (_, at) => nodeOf(at))];
        });
        const fits = (perNode: number): boolean =>
          groups.every((nodes) =>
            nodes.every((node, at) =>
              nodes.every(
                (other, by) =>
                  (node === other) === (Math.floor(at / (perNode * expert_tensor)) === Math.floor(by / (perNode * expert_tensor))),
              ),
            ),
          );
        const perNode = degrees.filter((n) => expert % n === 0).find(fits);
        const nodes = nodesOfExperts({ parallel, cluster });
        expect(nodes, JSON.stringify({ order, tensor, pipeline, expert, expert_tensor, gpus_per_node })).toEqual(
          perNode === undefined ? undefined : { nodes: expert / perNode, perNode },
        );
        found.add(nodes ? `${nodes.nodes} of ${nodes.perNode}` : "none");
      }
  expect(found).toContain("2 of 2");
  expect(found).toContain("none");
});
const product4 = (values: readonly number[]) =>
  values.flatMap((a) => values.flatMap((b) => values.flatMap((c) => values.map((d) => [a, b, c, d] as const))));

test("a router that is limited to groups of experts limits the ranks of a token", () => {
  const router = { group_top_k: 4, groups: 8, type: "top_k" } as const;
  const of = (experts: number, ranks: number, rows: number, over: object = {}) =>
    ranksOfToken({ experts, router: jobOf(routed({ experts, top_k: rows, router: { ...over } })).model.moe!.router }, ranks, rows);
  // 1 − C(112, 8)/C(128, 8) of 8 ranks
  expect(of(128, 8, 8).mean).toBeCloseTo(8 * (1 - product(8, (i) => (112 - i) / (128 - i))), 10);
  expect(of(128, 8, 8).most).toBe(8);
  expect(of(8, 8, 2)).toEqual({ most: 2, mean: 2 });
  // as in DeepSeek-V3: 4 of 8 groups, 64 ranks of 4 experts, 32 of them in reach
  expect(of(256, 64, 8, router).mean).toBeCloseTo(32 * (1 - product(8, (i) => (124 - i) / (128 - i))), 10);
  expect(of(256, 16, 8, router).most).toBe(8);
  expect(of(256, 4, 8, router).most).toBe(4);
  expect(of(256, 2, 8).most).toBe(2);
  // a group of 3 experts lies on two of three ranks of 2
  expect(of(6, 3, 2, { groups: 2, group_top_k: 1 }).most).toBe(2);
  // what chooses without groups is not limited by them
  expect(of(8, 4, 4, { groups: 2, group_top_k: 1, force: "uniform" }).most).toBe(4);
});
const product = (n: number, of: (i: number) => number): number => Array.from({ length: n }, (_, i) => of(i)).reduce((a, b) => a * b, 1);
const routed = (more: object) => ({
  name: "routed",
  model: { layers: 1, hidden: 32, ffn: 32, heads: 8, vocab: 256, seq: 16, moe: { ffn: 32, ...more } },
  parallel: { world: 1 },
  train: { global_batch: 1, steps: 1, optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});

test("tensor with sequence, experts over data: gather, scatter, dispatch, combine", () => {
  const p = plan({ world: 4, tensor: 2, sequence: true, expert: 4 });
  // tokens before attention and after it; counts for the balancing loss; which rows, they and their weights out, rows back
  expect(count(p, "forward")).toEqual({
    "all_gather tp": 1,
    "reduce_scatter tp": 1,
    "all_reduce tp": 1,
    "dispatch_index ep": 1,
    "dispatch ep": 2,
    "combine ep": 1,
  });
  // tokens again for the weight gradient, dy of wo once for both of its gradients
  expect(count(p, "backward")).toEqual({ "dispatch ep": 1, "combine ep": 2, "all_gather tp": 2, "reduce_scatter tp": 1 });
});

test("tensor without sequence: one all-reduce after attention, one after the mlp, and their mirrors", () => {
  const p = plan({ world: 2, tensor: 2 }, {});
  expect(count(p, "forward")).toEqual({ "all_reduce tp": 2 });
  expect(count(p, "backward")).toEqual({ "all_reduce tp": 2 });
});

test("copies of key/value heads: a layer communicates as without them, and a step sums the gradients of keys and values over the copies", () => {
  const axes = "tp/2@1";
  for (const sequence of [true, false]) {
    const [copied, plain] = [2, 4].map((kv_heads) =>
      plan({ world: 4, tensor: 4, sequence }, { kv_heads, qk_norm: "head", qkv_bias: true }),
    );
    for (const block of ["forward", "backward"] as const) expect(count(copied!, block)).toEqual(count(plain!, block));
    expect(count(copied!, "step", /layers\.1\.(w[kv]|b[kv])\.grad/)).toEqual({ [`all_reduce ${axes}`]: 4 });
    expect(count(plain!, "step", /layers\.1\.(w[kv]|b[kv])\.grad/)).toEqual({});
  }
});

test("expert tensor parallelism gathers rows inside the dispatch and scatters them inside the combine", () => {
  const p = plan({ world: 8, tensor: 2, sequence: true, expert: 2, expert_tensor: 2 });
  expect(count(p, "forward")).toMatchObject({ "dispatch ep": 2, "all_gather etp": 2, "reduce_scatter etp": 1, "combine ep": 1 });
});

test("latent attention gathers latents over the tensor ranks, not the residual stream; each partial sum is reduced once", () => {
  const mla = { q_rank: 12, kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 };
  const model = { mla, kv_heads: 8, head_dim: 10 };
  const p = plan({ world: 2, tensor: 2, sequence: true }, model);
  // the queries' latent, that of keys and values, and the keys' turned channels; then the heads come together, and the mlp
  expect(count(p, "forward")).toEqual({ "all_gather tp": 4, "reduce_scatter tp": 2 });
  const forward = blocksOf(p.programs[0]!).flatMap((b) => (b.kind === "forward" ? b.instructions : []));
  const gathered = forward.flatMap((i) => (i.kind === "collective" && i.name === "all_gather" ? [i.from] : []));
  expect(gathered.filter((id) => /layers\.1\.attn/.test(id))).toEqual([
    "layers.1.attn.q_norm",
    "layers.1.attn.kv_norm",
    "layers.1.attn.k_rope",
  ]);
  expect(count(p, "backward")).toEqual({ "all_gather tp": 5, "reduce_scatter tp": 4 });
  // what makes latents is whole on each rank, which saw its own tokens
  expect(count(p, "step", /layers\.1\.w(q|kv)_a/)).toEqual({ "all_reduce tp": 2 });
  expect(count(p, "step", /layers\.1\.(wq_b|wkv_b|wo)/)).toEqual({});
  // without the sequence cut they are made on every rank, and only gradients of latents are added up
  const whole = plan({ world: 2, tensor: 2 }, model);
  expect(count(whole, "forward")).toEqual({ "all_reduce tp": 2 });
  expect(count(whole, "backward")).toEqual({ "all_reduce tp": 4 });
});

test("biases cost no collective: the one after attention is added to the reduced sum", () => {
  const bias = { qkv_bias: true, out_bias: true };
  for (const parallel of [
    { world: 2, tensor: 2 },
    { world: 2, tensor: 2, sequence: true },
  ])
    for (const block of ["forward", "backward"] as const)
      expect(count(plan(parallel, bias), block)).toEqual(count(plan(parallel, {}), block));
  const p = plan({ world: 4, tensor: 2, sequence: true }, bias);
  expect(count(p, "step", /layers\.1\.bo/)).toEqual({ "all_reduce tp*dp": 1 });
  expect(count(p, "step", /layers\.1\.bq/)).toEqual({ "all_reduce dp": 1 });
});

test("context parallelism gathers keys and values, and scatters their gradients", () => {
  const p = plan({ world: 4, context: 4, context_method: "all_gather" }, {});
  expect(count(p, "forward")).toEqual({ "all_gather cp": 2 });
  expect(count(p, "backward")).toEqual({ "all_gather cp": 2, "reduce_scatter cp": 2 });
});

test("in a ring of four, keys and values are shifted three times, and their gradients four times", () => {
  const p = plan({ world: 4, context: 4, context_method: "ring" }, {});
  expect(count(p, "forward")).toEqual({ "ring cp": 6 });
  expect(count(p, "backward")).toEqual({ "ring cp": 6 + 8 });
  const forward = p.programs[0]!.chunks[0]!.forward.filter((i) => /^layers\.1\.attn\.core/.test(i.id));
  expect(forward.map((i) => (i.kind === "collective" ? i.name : i.kind === "compute" ? i.op : i.kind))).toEqual([
    ...["ring", "ring", "attention_part"],
    ...["ring", "ring", "attention_part", "attention_merge"],
    ...["ring", "ring", "attention_part", "attention_merge"],
    ...["attention_part", "attention_merge"],
  ]);
  // each rank works on the pieces of those before it
  expect(forward.flatMap((i) => (i.kind === "compute" && i.op === "attention_part" ? [i.ringOffset?.U ?? 0] : []))).toEqual([0, 1, 2, 3]);
});

test("the end of a step: the pending reductions of gradients, with their bytes", () => {
  const step = (distributed_optimizer: boolean, where: RegExp) =>
    count(plan({ world: 16, tensor: 2, sequence: true, context: 2, expert: 4, distributed_optimizer }), "step", where);
  expect(step(false, /layers\.1\.wq/)).toEqual({ "all_reduce cp*dp": 1 });
  expect(step(false, /layers\.1\.norm1/)).toEqual({ "all_reduce tp*cp*dp": 1 });
  expect(step(false, /layers\.1\.router/)).toEqual({ "all_reduce tp*cp*dp": 1 });
  expect(step(false, /layers\.1\.w1/)).toEqual({ "all_reduce edp": 1 });
  expect(step(true, /layers\.1\.wq/)).toEqual({ "reduce_scatter cp*dp": 1, "all_gather cp*dp": 1 });
  expect(step(true, /layers\.1\.w1/)).toEqual({ "reduce_scatter edp": 1, "all_gather edp": 1 });
});

test("gradients are reduced once a step, whatever the number of microbatches", () => {
  const p = plan({ world: 2, distributed_optimizer: true });
  expect(microbatchesOf(p.job)).toBe(8);
  expect(count(p, "backward", /./)).toEqual({});
});

test("the pipeline sends one activation forward and its gradient back for each microbatch", () => {
  const p = plan({ world: 4, pipeline: 4 }, {});
  const transfers = p.programs.map((r) =>
    instructionsOf(r).flatMap((i) => (i.kind === "send" || i.kind === "recv" ? [`${i.kind} ${i.peer}`] : [])),
  );
  expect(transfers).toEqual([
    ["send 1", "recv 1"],
    ["recv 0", "send 2", "recv 2", "send 0"],
    ["recv 1", "send 3", "recv 3", "send 1"],
    ["recv 2", "send 2"],
  ]);
  expect(p.programs.map((r) => r.chunks[0]!.copies)).toEqual([4, 3, 2, 1]);
});

test("each collective names the use and the job key that made it necessary", () => {
  const p = plan({ world: 4, tensor: 2, sequence: true, expert: 4 });
  const why = (id: RegExp) =>
    p.programs[0]!.chunks[0]!.forward.flatMap((i) => (i.kind === "collective" && id.test(i.id) ? [i.why] : []))[0];
  expect(why(/layers\.1\.attn\.norm@.*all_gather/)).toEqual({
    layer: 1,
    op: "layers.1.attn.wq.x",
    because: "layers.1.wq is sharded along N",
    path: "parallel.tensor",
  });
  expect(why(/layers\.1\.moe\.permute@.*dispatch/)).toEqual({
    layer: 1,
    op: "layers.1.moe.w1.x",
    because: "layers.1.w1 is sharded along E",
    path: "parallel.expert",
  });
});

test("a program does not grow with the number of ranks", () => {
  const bytes = (world: number) =>
    JSON.stringify(plan({ world, tensor: 2, sequence: true, expert: 2 }, { moe }, { global_batch: world * 8 }).programs).length;
  expect(bytes(1024) / bytes(16)).toBeLessThan(1.05);
});
