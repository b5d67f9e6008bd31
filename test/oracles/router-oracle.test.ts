/**
 * The router's numbers are those of Megatron Core (fixtures/oracles/router.json), through the graph that a job makes: choices, weights,
 * losses, their gradients by the logits, and the parameters with a rule of their own.
 */
import { afterAll, expect, test } from "vitest";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import type { Job } from "../../schemas/job.ts";
import { isCount, type ModelGraphBuilder, moduleBuilders } from "../../src/model/builder.ts";
import { route } from "../../src/model/router.ts";
import { biasUpdate } from "../../src/ops/balance.ts";
import { type Grads, op, type Value } from "../../src/ops/op.ts";
import { addBackward } from "../../src/passes/backward.ts";
import { jobOf } from "../support/job.ts";
import { byId, type Named, near, oracle, unpacked } from "../support/oracle.ts";

interface Case extends Named {
  readonly params: Readonly<Record<"seq" | "batch" | "experts" | "topk", number>> & {
    readonly score_function: "softmax" | "sigmoid" | "sqrtsoftplus";
    readonly pre_softmax?: true;
    readonly num_groups?: number;
    readonly group_topk?: number;
    readonly scaling_factor?: number;
    readonly expert_bias?: true;
    readonly load_balancing: string | readonly string[];
    readonly aux_coeff?: number | readonly number[];
    readonly z_coeff?: number;
    readonly capacity_factor?: number;
    readonly pad_to_capacity?: true;
    readonly microbatches?: number;
  };
  readonly losses?: Readonly<Record<string, number>>;
  readonly losses_per_microbatch?: readonly number[];
  readonly routing_map_rows?: readonly string[];
  readonly selected_map_rows?: readonly string[];
  readonly tokens_per_expert?: readonly number[];
  readonly aux_counts?: readonly number[];
  readonly capacity?: number;
  readonly padding_choice_unspecified?: true;
}
const { cases } = oracle<{ cases: Case[] }>("router");
const tensors = openSafetensors(unpacked("router"));
afterAll(() => tensors.close());

/** Megatron's parameters of a router as a job. */
function jobFrom({ params: p }: Case): Job {
  const kinds = (t: string): string => t.replace("quantile_balancing", "quantile");
  const sinkhorn = p.load_balancing === "sinkhorn";
  const router = {
    score: p.score_function.replace("sqrtsoftplus", "sqrt_softplus"),
    normalize_top_k: p.score_function === "softmax" ? !p.pre_softmax && !sinkhorn : p.topk > 1,
    ...(p.num_groups ? { groups: p.num_groups, group_top_k: p.group_topk } : {}),
    ...(p.scaling_factor ? { scaling: p.scaling_factor } : {}),
    expert_bias: p.expert_bias ?? false,
    balance: typeof p.load_balancing === "string" ? kinds(p.load_balancing) : p.load_balancing.map(kinds),
    ...{ aux_coeff: p.aux_coeff ?? 0, z_coeff: p.z_coeff ?? 0 },
  };
  const capacity = p.capacity_factor ? { factor: p.capacity_factor, pad: p.pad_to_capacity ?? false } : "dropless";
  return jobOf({
    name: "router",
    model: {
      ...{ layers: 1, hidden: 16, ffn: 16, heads: 2, vocab: 256, seq: p.seq },
      moe: { experts: p.experts, top_k: p.topk, router, capacity },
    },
    train: { micro_batch: p.batch, global_batch: p.batch * (p.microbatches ?? 1), steps: 1, precision: "fp32", optimizer: { lr: 1 } },
    data: { path: "x" },
  });
}

/** Σ p·w, of which w is the gradient. */
const dot = op({
  name: "weighted_sum",
  sig: "p[B,S,E] w[B,S,E] -> y[]",
  cpu({ p, w, y }) {
    for (const [i, x] of p.entries()) y[0]! += x * w[i]!;
  },
  grad: ({ w }): Grads => ({ p: w }),
});

/** What values of the graph are; a step's running sums stay from one microbatch to the next. */
function evaluator(leaves: Readonly<Record<string, Float32Array>>, kept = new Map<Value, Float32Array>()) {
  const known = new Map<Value, Float32Array>();
  return function evaluate(v: Value): Float32Array {
    if (v.leaf) return leaves[v.leaf.name.replace("layers.0.", "")] ?? new Float32Array(v.sizes.reduce((a, b) => a * b, 1));
    const have = known.get(v);
    if (have) return have;
    const { op: o, args, outs, size } = v.node!;
    const made = o.outputs.map((t, i): [string, Float32Array] => {
      const before = o.inPlace?.includes(t.name) ? kept.get(outs[i]!) : undefined;
      return [t.name, before ?? new Float32Array(outs[i]!.sizes.reduce((a, b) => a * b, 1))];
    });
    const inputs = o.inputs.map((t, i) => [t.name, evaluate(args[i]!)]);
    o.cpu(Object.fromEntries([...inputs, ...made]), size, { start: () => 0, rows: new Int32Array(1) });
    for (const [i, [name, data]] of made.entries()) {
      known.set(outs[i]!, data);
      if (o.inPlace?.includes(name)) kept.set(outs[i]!, data);
    }
    return known.get(v)!;
  };
}

/** [seq, batch, experts] ↔ [batch, seq, experts] */
const turned = (x: Float32Array, outer: number, inner: number, E: number): Float32Array =>
  x.map((_, i) => x[(Math.floor(i / E / outer) + (Math.floor(i / E) % outer) * inner) * E + (i % E)]!);

test("all 38 cases apply", () => expect(cases.length).toBe(38));
test.each(byId(cases))("%s", (id, c) => {
  const { seq, batch, experts: E, microbatches = 1 } = c.params;
  const job = jobFrom(c);
  const graph: ModelGraphBuilder = { losses: [], updateInputs: new Map() };
  const part = moduleBuilders(job, graph)(1, "layers.0.");
  const leaf = (name: string, kind: "parameter" | "input"): Value => ({
    ...{ out: 0, sizes: [batch, seq, E], ragged: 0, fanout: 0, dtype: "f32", leaf: { kind, name, position: 1 } },
  });
  const logits = leaf("logits", "parameter");
  const { map, weights } = route(part, job.model.moe!, logits);
  const losses = graph.losses.filter(({ name }) => !isCount(name));
  const selected = map.node!.op.name === "apply_capacity" ? map.node!.args[1]! : map;
  const bias = selected.node!.args.find((v) => graph.updateInputs.has(v));
  const statistic = bias && graph.updateInputs.get(bias);

  const read = (name: string) => tensors.read(`${id}.${name}`);
  const has = (name: string) => tensors.names.includes(`${id}.${name}`);
  // as Megatron orders tokens, and back
  const out = (x: Float32Array) => turned(x, batch, seq, E);
  const into = (x: Float32Array) => turned(x, seq, batch, E);
  const same = (got: ArrayLike<number>, want: ArrayLike<number>, what: string) => {
    expect(got.length, what).toBe(want.length);
    for (let i = 0; i < want.length; i++) near(got[i]!, want[i]!, 1e-5, `${what}[${i}]`, 1e-6);
  };
  const rowsOf = (x: Float32Array) => Array.from({ length: seq * batch }, (_, t) => [...x.subarray(t * E, t * E + E)].join(""));
  const columns = (x: Float32Array) => Array.from({ length: E }, (_, e) => x.reduce((n, v, i) => n + (i % E === e ? v : 0), 0));
  /** The gradient of a sum of losses by the logits. */
  const slope = (of: readonly Value[], evaluate: (v: Value) => Float32Array, leaves: Record<string, Float32Array>): Float32Array => {
    leaves.one = Float32Array.of(1);
    const sum = new Float32Array(batch * seq * E);
    const { parameterGrads } = addBackward({
      losses: of.map((value) => ({ name: "aux_loss" as const, value })),
      updateInputs: graph.updateInputs,
    });
    for (const g of parameterGrads.get(logits) ?? []) for (const [i, x] of evaluate(g).entries()) sum[i]! += x;
    return out(sum);
  };

  if (c.losses_per_microbatch) {
    const kept = new Map<Value, Float32Array>();
    for (const [m, loss] of c.losses_per_microbatch.entries()) {
      const leaves = { logits: into(read(`logits.${m}`)) };
      const evaluate = evaluator(leaves, kept);
      // ours is averaged over the microbatches as it is added up
      near(evaluate(losses[0]!.value)[0]! * microbatches, loss, 1e-5, `loss of microbatch ${m}`);
      same(
        slope([losses[0]!.value], evaluate, leaves).map((x) => x * microbatches),
        read(`grad_losses.${m}`),
        `grad_losses.${m}`,
      );
    }
    return;
  }

  const leaves: Record<string, Float32Array> = { logits: into(read("logits")), cotangent: into(read("cotangent")) };
  if (has("expert_bias")) leaves.router_bias = read("expert_bias");
  if (has("quantile_beta")) leaves.router_beta = read("quantile_beta");
  const evaluate = evaluator(leaves);

  const [kept, chosen] = [map, selected].map((v) => out(evaluate(v))) as [Float32Array, Float32Array];
  // which tokens fill the remaining room is not defined
  const theirs = c.padding_choice_unspecified
    ? c.routing_map_rows!.map((row, t) => [...row].map((x, e) => Number(x) * Number(c.selected_map_rows![t]![e])).join(""))
    : c.routing_map_rows;
  expect(rowsOf(c.padding_choice_unspecified ? kept.map((x, i) => x * chosen[i]!) : kept)).toEqual(theirs);
  if (c.selected_map_rows) expect(rowsOf(chosen)).toEqual(c.selected_map_rows);
  expect(columns(kept)).toEqual(c.tokens_per_expert);
  if (c.capacity && map !== selected) expect(map.node!.attrs.capacity).toBe(Math.min(c.capacity, seq * batch));
  same(
    out(evaluate(weights)).map((p, i) => p * kept[i]!),
    read("probs"),
    "probs",
  );
  // what is dropped has no slope: its row is not there
  leaves.cotangent = leaves.cotangent!.map((w, i) => w * evaluate(map)[i]!);
  same(slope([dot.of({ p: weights, w: leaf("cotangent", "input") })], evaluate, leaves), read("grad_probs"), "grad_probs");

  same(
    losses.filter(({ name }) => name === "aux_loss" || name === "z_loss").map(({ value }) => evaluate(value)[0]!),
    Object.values(c.losses!),
    "losses",
  );
  if (losses.length)
    same(
      slope(
        losses.map((l) => l.value),
        evaluate,
        leaves,
      ),
      read("grad_losses"),
      "grad_losses",
    );
  const balancing = losses.find(({ value }) => /aux_loss$/.test(value.node!.op.name));
  if (balancing) expect(columns(evaluate(balancing.value.node!.args[1]!))).toEqual(c.aux_counts);

  if (has("sinkhorn_norm")) same(out(evaluate(selected.node!.args[0]!)), read("sinkhorn_norm"), "sinkhorn_norm");
  if (has("quantile_beta_next_raw")) same(evaluate(statistic!), read("quantile_beta_next_raw"), "quantile_beta_next_raw");
  if (has("bias_after_update_rate_1e-3")) {
    const after = { n: evaluate(statistic!), scale: Float32Array.of(1), bias: leaves.router_bias!.slice() };
    biasUpdate.cpu(after, { E, ...bias!.leaf!.rule!.attrs }, { start: () => 0, rows: new Int32Array(1) });
    same(after.bias, read("bias_after_update_rate_1e-3"), "bias");
  }
});
