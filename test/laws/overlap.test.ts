/** Collectives that run beside compute change no number: not one bit, however long each of them takes. */
import { describe, expect, test } from "vitest";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf, meshOf, sameNumbers } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { train } from "../support/steps.ts";
import { byTier } from "../support/tiers.ts";

const moe = { experts: 4, top_k: 2, ffn: 8, shared: { ffn: 8, gate: true }, router: { balance: "aux_loss", aux_coeff: 0.05 } };
const planOf = (placed: object, model: object = {}, over: object = {}, data: object = { path: "corpus.txt" }): Plan =>
  compile(
    jobOf({
      name: "overlap",
      model: { ...{ layers: 2, hidden: 16, ffn: 24, heads: 4, kv_heads: 2, head_dim: 4, vocab: 256, seq: 8 }, ...model },
      ...meshOf(placed),
      train: { micro_batch: 1, global_batch: 8, steps: 3, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2 }, ...over },
      data,
    }),
  ).plan;

/** In MiB: buckets of a few tensors each of these small models. */
const buckets = { gradient_bucket: 0.004, parameter_bucket: 0.002 };
const bucketsOf = (parallel: object) => ("distributed_optimizer" in parallel ? buckets : { gradient_bucket: buckets.gradient_bucket });
/** Leaves out the keys that only say what runs beside what: collectives then run in order. */
const inOrder = ({
  expert_overlap: _,
  tensor_overlap: __,
  ...parallel
}: {
  readonly expert_overlap?: string;
  readonly tensor_overlap?: unknown;
}) => parallel;
const next = random(7);
const durations = {
  "as short as possible": () => false,
  "as long as possible": () => true,
  "by chance": () => next() > 0,
};

const cases: Readonly<Record<string, readonly [parallel: object, model?: object, train?: object]>> = {
  "data parallel": [{ world: 4 }],
  "the distributed optimizer, bf16": [{ world: 4, distributed_optimizer: true }, {}, { precision: "bf16" }],
  "copies of the optimizer's shards": [{ world: 4, distributed_optimizer: true, optimizer_instances: 2 }],
  "tensor, sequence and expert parallel": [{ world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true }, { moe }],
  "chunks of a pipeline, tied embeddings": [
    { world: 4, pipeline: 2, virtual_pipeline: 2, distributed_optimizer: true },
    { layers: 4, tie_embeddings: true },
  ],
  "a token is sent once to each rank with experts of it": [
    { world: 8, tensor: 2, sequence: true, expert: 4, expert_tensor: 2, distributed_optimizer: true },
    { moe: { ...moe, experts: 8, top_k: 3, dispatch: "once" } },
  ],
  "a token is sent once to each node, and in it once to each rank": [
    { world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true, gpus_per_node: 2 },
    { moe: { ...moe, experts: 8, top_k: 3, dispatch: "once_per_node" } },
  ],
  "a pipeline without bubbles": [{ world: 8, pipeline: 2, schedule: "zero_bubble", expert: 2, distributed_optimizer: true }, { moe }],
  "latent experts, recomputed, on grids that do not nest": [
    { world: 6, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true },
    { hidden: 24, heads: 6, moe: { ...moe, experts: 6, latent: 8 } },
    { global_batch: 12, recompute: { mode: "selective", modules: ["moe_act", "shared_experts"] } },
  ],
  "an expert bias, which goes by counts of forward": [
    { world: 4, expert: 2, distributed_optimizer: true },
    { moe: { ...moe, router: { score: "sigmoid", expert_bias: true, bias_rate: 0.05, balance: "none" } } },
  ],
  "gradients that are sent in bf16": [
    { world: 8, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true, optimizer_instances: 2 },
    { moe },
    { gradient_reduction: "bf16" },
  ],
  "gradients that are sent in bf16, chunks of a pipeline, tied embeddings": [
    { world: 4, pipeline: 2, virtual_pipeline: 2 },
    { layers: 4, tie_embeddings: true },
    { gradient_reduction: "bf16" },
  ],
  "gradients that are sent in bf16, a pipeline without bubbles": [
    { world: 8, pipeline: 2, virtual_pipeline: 2, schedule: "zero_bubble", distributed_optimizer: true },
    { layers: 4 },
    { gradient_reduction: "bf16" },
  ],
  "parameters that are gathered in forward, bf16": [
    { world: 4, distributed_optimizer: true, optimizer_instances: 2, parameter_gather: "forward" },
    {},
    { precision: "bf16" },
  ],
  "parameters that are gathered in forward, experts": [
    { world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true, parameter_gather: "forward" },
    { moe },
  ],
  "parameters that are gathered in forward, chunks of a pipeline, tied embeddings": [
    { world: 4, pipeline: 2, virtual_pipeline: 2, distributed_optimizer: true, parameter_gather: "forward" },
    { layers: 4, tie_embeddings: true },
  ],
  "gradients of weights beside exchanges between tensor ranks": [
    { world: 4, tensor: 4, sequence: true, tensor_overlap: "backward" },
    { heads: 8, kv_heads: 4 },
    { micro_batch: 2 },
  ],
  "gradients of weights beside exchanges between tensor ranks, recomputed, tied, in bf16": [
    { world: 8, tensor: 2, context: 2, sequence: true, distributed_optimizer: true, tensor_overlap: "backward" },
    { tie_embeddings: true },
    { precision: "bf16", recompute: { mode: "selective", modules: ["core_attn", "layernorm", "mlp"] } },
  ],
  "gradients of weights beside exchanges between tensor ranks and experts, chunks of a pipeline": [
    { world: 8, tensor: 2, sequence: true, pipeline: 2, virtual_pipeline: 2, expert: 2, tensor_overlap: "backward" },
    { layers: 4, moe },
  ],
  "gradients of weights beside exchanges between tensor ranks, a pipeline without bubbles": [
    { world: 4, tensor: 2, sequence: true, pipeline: 2, schedule: "zero_bubble", tensor_overlap: "backward" },
  ],
  "products in parts": [{ world: 4, tensor: 2, sequence: true, tensor_overlap: 2 }, { seq: 16 }],
  "products in parts of a sequence, two sequences a microbatch, bf16": [
    { world: 8, tensor: 4, sequence: true, distributed_optimizer: true, tensor_overlap: 4 },
    { hidden: 32, heads: 8, kv_heads: 4, ffn: 32, seq: 64, qkv_bias: true, qk_norm: "head" },
    { micro_batch: 2, precision: "bf16" },
  ],
  "products in four parts, biases, layer norms": [
    { world: 2, tensor: 2, sequence: true, tensor_overlap: 4 },
    { hidden: 32, ffn: 32, seq: 64, layers: 3, norm: { type: "layernorm" }, qkv_bias: true, out_bias: true, activation: "gelu" },
  ],
  "products in four parts, dropout, tied embeddings": [
    { world: 4, tensor: 2, sequence: true, tensor_overlap: 4 },
    { hidden: 32, ffn: 32, seq: 64, dropout: { hidden: 0.1 }, tie_embeddings: true },
  ],
  "products in parts of two sequences, context, recomputed": [
    { world: 4, tensor: 2, context: 2, sequence: true, tensor_overlap: 2 },
    { seq: 32, norm: { type: "layernorm" } },
    { micro_batch: 4, recompute: { mode: "selective", modules: ["layernorm", "mlp"] } },
  ],
  "products in parts, experts, chunks of a pipeline": [
    { world: 8, tensor: 2, sequence: true, pipeline: 2, virtual_pipeline: 2, expert: 2, tensor_overlap: 2 },
    { layers: 4, seq: 32, moe },
  ],
  "pairs of microbatches, the forward of one beside the backward of another": [
    {
      world: 8,
      tensor: 2,
      sequence: true,
      expert: 2,
      distributed_optimizer: true,
      parameter_gather: "forward",
      expert_overlap: "interleave",
    },
    { moe },
    { global_batch: 12 },
  ],
  "pairs on the stages of a pipeline, bf16": [
    { world: 4, pipeline: 2, expert: 2, expert_overlap: "interleave" },
    { moe, layers: 4 },
    { global_batch: 10, precision: "bf16" },
  ],
  "pairs of chunks, an odd number of microbatches, tied embeddings": [
    { world: 8, pipeline: 2, virtual_pipeline: 2, expert: 4, distributed_optimizer: true, expert_overlap: "interleave" },
    { moe, layers: 4, tie_embeddings: true, dropout: { hidden: 0.1, attention: 0.1 } },
    { global_batch: 20 },
  ],
  "pairs of chunks on four stages": [
    { world: 8, pipeline: 4, virtual_pipeline: 2, expert: 2, expert_overlap: "interleave" },
    { moe, layers: 8 },
    { global_batch: 18 },
  ],
  "pairs, recomputed experts, a bias and all balancing losses": [
    { world: 4, expert: 4, expert_overlap: "interleave" },
    {
      moe: {
        ...moe,
        router: {
          score: "sigmoid",
          expert_bias: true,
          bias_rate: 0.05,
          balance: ["seq_aux_loss", "global_aux_loss"],
          aux_coeff: [0.05, 0.05],
        },
      },
    },
    { global_batch: 12, recompute: { mode: "selective", modules: ["moe"] } },
  ],
  "pairs whose tokens travel once to each rank, products in parts": [
    { world: 8, tensor: 2, sequence: true, expert: 4, tensor_overlap: 2, expert_overlap: "interleave" },
    { moe: { ...moe, dispatch: "once" }, seq: 32 },
    { global_batch: 16 },
  ],
  "pairs whose tokens travel once to each node": [
    { world: 8, pipeline: 2, expert: 4, expert_overlap: "interleave", gpus_per_node: 2 },
    { moe: { ...moe, dispatch: "once_per_node" } },
    { global_batch: 16 },
  ],
  "pairs while the batch grows": [
    { world: 4, pipeline: 2, expert: 2, expert_overlap: "interleave" },
    { moe },
    { global_batch: 16, batch_rampup: { start: 2, increment: 2, samples: 12 } },
  ],
  "a batch that grows, muon": [
    { world: 2, distributed_optimizer: true },
    {},
    { batch_rampup: { start: 4, increment: 4, samples: 4 }, optimizer: { type: "muon", lr: 1e-2 } },
  ],
};

describe("numbers are those of collectives in order, bit for bit", () => {
  const all = Object.entries(cases).map(([name, c]) => ({ name, c }));
  const inFast = [
    ...["the distributed optimizer, bf16", "tensor, sequence and expert parallel", "chunks of a pipeline, tied embeddings"],
    "gradients of weights beside exchanges between tensor ranks",
    "pairs of chunks, an odd number of microbatches, tied embeddings",
  ];
  for (const { options, rows } of byTier(all, ({ name }) => inFast.includes(name)))
    test.each(rows)("$name", options, async ({ c: [parallel, model, over] }) => {
      const options = { ...(model && "moe" in model && { expert_overlap: "shared" }), ...parallel, ...bucketsOf(parallel) };
      const { tensor_overlap }: { tensor_overlap?: unknown } = parallel;
      const [plain, beside] = [planOf(inOrder(parallel), model, over), planOf(options, model, over)];
      if ("expert_overlap" in parallel) expect(beside.programs.some(({ pairs }) => pairs)).toBe(true);
      const asynchronous = beside.programs.flatMap((p) => instructionsOf(p)).filter((i) => i.kind === "collective" && i.stream);
      expect(asynchronous.length).toBeGreaterThanOrEqual(2);
      const isOfTensor = asynchronous.some((i) => i.kind === "collective" && i.stream === "tensor");
      expect(isOfTensor, "beside tensor ranks").toBe("tensor_overlap" in parallel);
      const parts = asynchronous.filter((i) => i.kind === "collective" && i.stream === "tensor" && /\.part\d+$/.test(i.id));
      expect(parts.length > 0, "parts").toBe(typeof tensor_overlap === "number");
      const want = await train([openCpu(plain)], plain, undefined, 3);
      for (const [name, isHeld] of Object.entries(durations)) {
        const got = await train([openCpu(beside, { isHeld })], beside, undefined, 3);
        expect(got.metrics, name).toEqual(want.metrics);
        const isKept = "parameter_gather" in parallel ? lasting(beside) : () => true;
        for (const [n, values] of want.state.entries())
          if (isKept(n)) expect(sameNumbers(got.state[n]!, values), `${name}, piece ${n}`).toBe(true);
      }
    });
});

/** Returns whether a piece of the state after a step is no parameter that the next step gathers from the main weights. */
function lasting({ mesh, programs }: Plan): (piece: number) => boolean {
  const pieces = Array.from({ length: mesh.world }, (_, r) => programs[stageOfRank(mesh, r)]!).flatMap(({ parameters }) =>
    parameters.flatMap((q) => [...new Set([q.buffer, q.master, q.gradient])].map((id) => id !== q.buffer || q.master === q.buffer)),
  );
  return (piece) => pieces[piece]!;
}

test("buckets of gradients take no memory: sums lie in the bytes of their gradients", () => {
  for (const parallel of [
    { world: 4 },
    { world: 4, distributed_optimizer: true },
    { world: 8, distributed_optimizer: true, optimizer_instances: 2, expert: 4 },
  ]) {
    const model = "expert" in parallel ? { moe } : {};
    const [plain, bucketed] = [parallel, { ...parallel, gradient_bucket: 0.004 }].map((p) => planOf(p, model).memory[0]!);
    expect(bucketed!.gradient).toBe(plain!.gradient);
    expect(bucketed!.peak).toBeLessThanOrEqual(plain!.peak);
  }
});

test("evaluations see gathered parameters, in a plan whose steps end with shards", async () => {
  const own = { world: 4, distributed_optimizer: true, parameter_bucket: 0.002 };
  const data = { path: "corpus.txt", split: [0.999, 0.001, 0] };
  const over = { precision: "bf16", evaluation: { every: 1 } };
  const losses = await Promise.all(
    ["step", "forward"].map(async (parameter_gather) => {
      const plan = planOf({ ...own, parameter_gather }, {}, over, data);
      const run = await openRun(plan, { baseDir: fixture("") });
      const all: number[] = [];
      for (let n = 0; n < 2; n++) all.push((await run.step()).loss, (await run.evaluate("validation")).loss);
      await run.close();
      const gathered = instructionsOf(plan.programs[0]!).filter(({ only }) => only === "first");
      expect(gathered.length > 0).toBe(parameter_gather === "forward");
      return all;
    }),
  );
  expect(losses[1]).toEqual(losses[0]);
  expect(new Set(losses[0]).size).toBe(4);
});

test("without the waits of the plan numbers change: they are what holds the order", async () => {
  const plan = planOf({ world: 4, distributed_optimizer: true, ...buckets });
  const damaged: Plan = {
    ...plan,
    programs: plan.programs.map((p) => ({ ...p, step: p.step.map(({ waits: _, ...i }) => i) })),
  };
  const [want, got] = await Promise.all([plan, damaged].map((p) => train([openCpu(p, { isHeld: () => true })], p, undefined, 1)));
  expect(got!.metrics).not.toEqual(want!.metrics);
});
