/** Rules E: experts, capacity and token dispatch. See also router.ts and balance.ts. */
import { evenBy, hasExperts, hasTwoHops, nodesOfExperts, sendsTokensOnce } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { divisorsNear, downTo, rule, upTo } from "./rule.ts";

type Moe = NonNullable<Job["model"]["moe"]>;

/** Returns the most rows that an expert rank can receive, as a multiple of the balanced load: min(top_k, its experts) per token, or its capacity. */
function worstLoad({ top_k, experts, capacity, router }: Moe, expert: number): number {
  const all = (Math.min(top_k, experts / expert) * expert) / top_k;
  if (router.type === "expert_choice" || (capacity !== "dropless" && capacity.pad)) return 1;
  return capacity === "dropless" ? all : Math.min(all, Math.max(1, capacity.factor));
}

const loadText = (load: number): string => String(Number(load.toFixed(2)));

/** Rules of experts. */
export const moe = [
  rule({
    code: "E401",
    title: "top_k exceeds experts",
    why: "A token goes to top_k different experts. Megatron-LM accepts the arguments and fails in the first forward pass.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.top_k <= moe.experts) return;
      yield {
        at: "model.moe.top_k",
        related: ["model.moe.experts"],
        found: `top_k ${moe.top_k} of ${moe.experts} experts`,
        fix: `top_k from 1 to ${moe.experts}`,
        tries: [{ "model.moe.top_k": Math.min(2, moe.experts) }, { "model.moe.top_k": moe.experts }, { "model.moe.experts": moe.top_k }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 9, router: {aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E402",
    title: "expert does not divide experts",
    why: "Each expert rank holds the same number of whole experts, so that its memory and its matrices have one shape.",
    level: "error",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.experts % p.expert === 0) return;
      yield {
        at: "parallel.expert",
        related: ["model.moe.experts"],
        found: `${moe.experts} experts over ${p.expert} ranks leaves ${moe.experts % p.expert} over`,
        fix: `expert must divide ${moe.experts}`,
        tries: [
          ...divisorsNear(moe.experts, p.expert).map((expert) => ({ "parallel.expert": expert })),
          { "model.moe.experts": upTo(moe.experts, p.expert) },
        ],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 3, expert: 3}",
  }),
  rule({
    code: "E403",
    title: "expert_tensor does not divide the experts' ffn",
    why: "expert_tensor shards the matrices of each expert along their inner width. Megatron-LM checks it only when it builds the model.",
    level: "error",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.ffn % p.expert_tensor === 0) return;
      yield {
        at: "model.moe.ffn",
        related: ["parallel.expert_tensor"],
        found: `${moe.ffn} columns over ${p.expert_tensor} ranks leaves ${moe.ffn % p.expert_tensor} over`,
        fix: `expert_tensor must divide ${moe.ffn}; 1 does not shard experts`,
        tries: [{ "parallel.expert_tensor": 1 }, { "model.moe.ffn": downTo(moe.ffn, p.expert_tensor) }],
      };
    },
    bad: "model: {moe: {experts: 3, top_k: 2, ffn: 33, router: {aux_coeff: 0.01}}}\nparallel: {world: 2, expert_tensor: 2}",
  }),
  rule({
    code: "E407",
    title: "every token goes to every expert",
    why: "With top_k = experts the layer costs as much as a dense layer of the combined width, plus routing and dispatch.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.top_k !== moe.experts || moe.experts === 1) return;
      yield {
        at: "model.moe.top_k",
        related: ["model.moe.experts"],
        found: `top_k ${moe.top_k} of ${moe.experts} experts`,
        fix: "send a token to fewer experts",
        tries: [{ "model.moe.top_k": Math.max(1, Math.floor(moe.experts / 2)) }, { "model.moe.experts": 4 * moe.experts }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 4, router: {aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E408",
    title: "experts are sharded although whole ones fit the ranks",
    why: "Sharded experts have narrow matrices, which run slower, and need an all-gather and a reduce-scatter of rows. Whole experts, distributed over the same ranks, avoid both. In Megatron-LM expert_tensor defaults to tensor.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || p.expert_tensor === 1 || moe.experts % (p.expert * p.expert_tensor) !== 0) return;
      yield {
        at: "parallel.expert_tensor",
        related: ["parallel.expert", "model.moe.experts"],
        found: `expert_tensor ${p.expert_tensor}, while ${moe.experts} experts divide over expert ${p.expert * p.expert_tensor}`,
        fix: "use the same ranks for whole experts",
        tries: [{ "parallel.expert": p.expert * p.expert_tensor, "parallel.expert_tensor": 1 }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 2, expert_tensor: 2}",
  }),
  rule({
    code: "E409",
    title: "dispatch: all_gather sends more than all_to_all would",
    why: "all_gather copies every token to all ranks of the expert group; all_to_all sends it to the ranks of its own experts, at most top_k (Megatron-LM #756 reports the slowdown).",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (moe?.dispatch !== "all_gather" || p.expert <= moe.top_k) return;
      yield {
        at: "model.moe.dispatch",
        related: ["parallel.expert", "model.moe.top_k"],
        found: `each token goes to ${p.expert} ranks, but is routed to ${moe.top_k} experts`,
        fix: "use all_gather only if expert is at most top_k",
        tries: [{ "model.moe.dispatch": "all_to_all" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, dispatch: all_gather}}\nparallel: {world: 4, expert: 4}",
  }),
  rule({
    code: "E410",
    title: "rows_bound is above the worst case",
    why: "A rank receives at most one row for each token and each of its experts that the token may choose; memory beyond that is never used.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.rows_bound === "worst" || moe.experts % p.expert || moe.rows_bound <= worstLoad(moe, p.expert)) return;
      yield {
        at: "model.moe.rows_bound",
        related: ["parallel.expert"],
        found: `rows_bound ${moe.rows_bound}; the worst case is ${loadText(worstLoad(moe, p.expert))} times the balanced load`,
        fix: "use the worst case, which never overflows",
        safe: { "model.moe.rows_bound": "worst" },
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, rows_bound: 9}}\nparallel: {world: 2, expert: 2}",
  }),
  rule({
    code: "E411",
    title: "rows_bound leaves no room for imbalance",
    why: "Routing is never exactly balanced, and least so in the first steps. Rows beyond the bound are not dropped: the run stops with an error.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.rows_bound === "worst" || moe.experts % p.expert) return;
      const worst = worstLoad(moe, p.expert);
      if (moe.rows_bound >= Math.min(1.25, worst)) return;
      yield {
        at: "model.moe.rows_bound",
        found: `rows_bound ${moe.rows_bound}, so ${Math.round(100 * (moe.rows_bound - 1))} % above the balanced load`,
        fix: `2 suits a balanced router; 'worst' is ${loadText(worst)} here`,
        tries: [...(worst > 2 ? [{ "model.moe.rows_bound": 2 }] : []), { "model.moe.rows_bound": "worst" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, rows_bound: 1.1}}\nparallel: {world: 4, expert: 4}",
  }),
  rule({
    code: "E444",
    title: "a token sent once saves nothing",
    why: "A token is sent once to each rank, or to each node, that has several of its experts. With expert 1 no row is sent, and with top_k 1 a token has one expert.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || !sendsTokensOnce(moe) || (p.expert > 1 && moe.top_k > 1)) return;
      yield {
        at: "model.moe.dispatch",
        related: ["parallel.expert", "model.moe.top_k"],
        found: `dispatch: ${moe.dispatch} with ${p.expert === 1 ? "expert 1" : "top_k 1"}`,
        fix: "leave it out: the numbers are the same",
        safe: { "model.moe.dispatch": "all_to_all" },
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, dispatch: once}}",
  }),
  rule({
    code: "E445",
    title: "dispatch: once_per_node has one step",
    why: "A token is sent to each node with experts of it, and inside the node to each rank. If the ranks of an expert group share one node, or have a node each, the first of these steps or the second sends nothing: the plan is that of dispatch: once.",
    level: "warning",
    *check({ model: { moe }, parallel, cluster }) {
      if (moe?.dispatch !== "once_per_node" || parallel.expert === 1 || moe.top_k === 1) return;
      const found = nodesOfExperts({ parallel, cluster });
      if (!found || hasTwoHops(found)) return;
      yield {
        at: "model.moe.dispatch",
        related: ["parallel.expert", "cluster.gpus_per_node"],
        found: `expert ${parallel.expert} on ${found.nodes === 1 ? "one node" : `${found.nodes} nodes`} of ${cluster.gpus_per_node} GPUs`,
        fix: "write once",
        safe: { "model.moe.dispatch": "once" },
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, dispatch: once_per_node}}\nparallel: {world: 4, expert: 4}",
  }),
  rule({
    code: "E446",
    title: "nodes begin inside the parts of an expert group",
    why: "With dispatch: once_per_node a token goes to the rank of another node that has the same place in it. Each node must have the same number of ranks of an expert group, and all expert tensor ranks of an expert.",
    level: "error",
    *check({ model: { moe }, parallel, cluster }) {
      if (moe?.dispatch !== "once_per_node" || parallel.expert === 1 || nodesOfExperts({ parallel, cluster })) return;
      const { expert, expert_tensor: etp } = parallel;
      yield {
        at: "model.moe.dispatch",
        related: ["parallel.expert", "parallel.expert_tensor", "cluster.gpus_per_node"],
        found: `expert ${expert}${etp > 1 ? ` x expert_tensor ${etp}` : ""} on nodes of ${cluster.gpus_per_node} GPUs`,
        fix: "write once, or choose degrees of which a node has whole multiples",
        tries: [{ "model.moe.dispatch": "once" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, dispatch: once_per_node}}\nparallel: {world: 12, expert: 4}\ntrain: {global_batch: 12}\ncluster: {gpus_per_node: 6}\nallow: [C504]",
  }),
  rule({
    code: "E433",
    title: "the capacity factor is not above 0",
    why: "An expert has room for factor times its balanced share of tokens. Megatron-LM treats a negative factor as no capacity and drops nothing, without a message.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.capacity === "dropless" || moe.capacity.factor > 0) return;
      yield {
        at: "model.moe.capacity.factor",
        found: `factor ${moe.capacity.factor}`,
        fix: "1.25 is usual; or capacity: dropless",
        tries: [{ "model.moe.capacity.factor": 1.25 }, { "model.moe.capacity": "dropless" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}, capacity: {factor: -1}}}",
  }),
  rule({
    code: "E434",
    title: "a capacity with balanced selection",
    why: "Sinkhorn's method and quantiles balance the selection already. Megatron-LM refuses a capacity with them.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.capacity === "dropless") return;
      const by = evenBy(moe.router);
      if (!by) return;
      yield {
        at: "model.moe.capacity",
        related: ["model.moe.router.balance"],
        found: `a capacity with balance: ${by}`,
        fix: "use dropless, or a balancing loss",
        tries: [{ "model.moe.capacity": "dropless" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: quantile}, capacity: {factor: 1.25}}}",
  }),
  rule({
    code: "E435",
    title: "the capacity holds all tokens",
    why: "An expert cannot get more rows than there are tokens: from experts / top_k on, the factor drops nothing, and with pad every expert computes every token. Megatron-LM fails in the first forward pass.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.capacity === "dropless" || moe.experts <= moe.top_k) return;
      const all = moe.experts / moe.top_k;
      if (moe.capacity.factor < all) return;
      yield {
        at: "model.moe.capacity.factor",
        related: ["model.moe.experts", "model.moe.top_k"],
        found: `factor ${moe.capacity.factor}, while ${all} holds all tokens`,
        fix: "use a smaller factor, or dropless",
        tries: [...(all > 1.25 ? [{ "model.moe.capacity.factor": 1.25 }] : []), { "model.moe.capacity": "dropless" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, capacity: {factor: 5, pad: true}}}",
  }),
  rule({
    code: "E436",
    title: "padding equalizes the loads that the bias uses",
    why: "The bias changes with the number of rows of each expert, padding included, as in Megatron Core. With padding all experts have equal numbers, and the bias never changes.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe?.router.expert_bias || moe.capacity === "dropless" || !moe.capacity.pad) return;
      yield {
        at: "model.moe.router.expert_bias",
        related: ["model.moe.capacity"],
        found: "expert_bias with capacity padded",
        fix: "drop without padding",
        tries: [{ "model.moe.capacity.pad": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, score: sigmoid, expert_bias: true}, capacity: {factor: 1.25, pad: true}}}",
  }),
  rule({
    code: "E437",
    title: "layers has the wrong number of entries",
    why: "The list has one entry per layer. Megatron-LM reports another length when it builds the model.",
    level: "error",
    *check({ model: { moe, layers } }) {
      if (!moe || !Array.isArray(moe.layers) || moe.layers.length === layers) return;
      yield {
        at: "model.moe.layers",
        related: ["model.layers"],
        found: `a list of ${moe.layers.length} for ${layers} layers`,
        fix: "write one number for each layer",
        tries: [{ "model.moe.layers": Array.from({ length: layers }, (_, i) => (moe.layers as number[])[i] ?? 1) }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}, layers: [0, 1, 1]}}",
  }),
  rule({
    code: "E438",
    title: "no layer has experts",
    why: "A model without experts is dense and needs no model.moe.",
    level: "error",
    *check({ model }) {
      const { moe, layers } = model;
      if (!moe || (Array.isArray(moe.layers) && moe.layers.length !== layers)) return;
      if (Array.from({ length: layers }, (_, i) => i).some((i) => hasExperts(model, i))) return;
      yield {
        at: "model.moe.layers",
        related: ["model.layers"],
        found: `no layer of ${layers} has experts`,
        fix: "give some layer experts, or leave model.moe out",
        tries: [{ "model.moe.layers": "all" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}, layers: {first_dense: 4}}}",
  }),
  rule({
    code: "E439",
    title: "tensor does not divide the width of shared experts",
    why: "Every token uses the shared experts: like a dense layer, they are sharded along their inner width over the tensor ranks.",
    level: "error",
    *check({ model: { moe }, parallel: p }) {
      if (!moe?.shared || moe.shared.ffn % p.tensor === 0) return;
      yield {
        at: "model.moe.shared.ffn",
        related: ["parallel.tensor"],
        found: `${moe.shared.ffn} columns over ${p.tensor} tensor ranks leaves ${moe.shared.ffn % p.tensor} over`,
        fix: `tensor must divide ${moe.shared.ffn}`,
        tries: [{ "model.moe.shared.ffn": downTo(moe.shared.ffn, p.tensor) }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}, shared: {ffn: 33}}}\nparallel: {world: 2, tensor: 2, sequence: true}",
  }),
  rule({
    code: "E440",
    title: "the latent width is not below hidden",
    why: "Tokens are projected to the latent width, so that they need less traffic and smaller experts. With the width of the model, two more matrices save nothing.",
    level: "warning",
    *check({ model: { moe, hidden } }) {
      if (moe?.latent == null || moe.latent < hidden) return;
      yield {
        at: "model.moe.latent",
        related: ["model.hidden"],
        found: `latent ${moe.latent} with hidden ${hidden}`,
        fix: "use a fraction of hidden, or null",
        tries: [{ "model.moe.latent": Math.max(1, Math.floor(hidden / 2)) }, { "model.moe.latent": null }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}, latent: 16}}",
  }),
] as const;
