/** E: experts, the router, and how rows travel. */
import type { Job } from "../../schemas/job.ts";
import { divisorsNear, downTo, rule, upTo } from "./rule.ts";

type Moe = NonNullable<Job["model"]["moe"]>;

/** The most rows an expert rank can receive, as a multiple of the balanced load: every token sends it as many rows as it has experts. */
const worstLoad = (moe: Moe, expert: number): number => (Math.min(moe.top_k, moe.experts / expert) * expert) / moe.top_k;

export const moe = [
  rule({
    code: "E401",
    title: "top_k is at most experts",
    why: "A token goes to top_k different experts. Megatron-LM accepts the arguments and fails in the first forward.",
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
    title: "expert divides experts",
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
    title: "expert_tensor divides the experts' ffn",
    why: "expert_tensor cuts each expert's matrices along their inner width. Megatron-LM does not check it before it builds the model.",
    level: "error",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.ffn % p.expert_tensor === 0) return;
      yield {
        at: "model.moe.ffn",
        related: ["parallel.expert_tensor"],
        found: `${moe.ffn} columns over ${p.expert_tensor} ranks leaves ${moe.ffn % p.expert_tensor} over`,
        fix: `expert_tensor must divide ${moe.ffn}; 1 keeps experts whole`,
        tries: [{ "parallel.expert_tensor": 1 }, { "model.moe.ffn": downTo(moe.ffn, p.expert_tensor) }],
      };
    },
    bad: "model: {moe: {experts: 3, top_k: 2, ffn: 33, router: {aux_coeff: 0.01}}}\nparallel: {world: 2, expert_tensor: 2}",
  }),
  rule({
    code: "E404",
    title: "balance: aux_loss with coefficient 0 balances nothing",
    why: "Left alone, a router tends to favour a few experts more and more; some ranks then hold most of the rows and the others wait, or memory runs out after hundreds of steps (Megatron-LM #1445). 0 is the default here because it is Megatron Core's.",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.balance !== "aux_loss" || moe.router.aux_coeff !== 0) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: "balance: aux_loss and aux_coeff: 0",
        fix: "0.01 is usual; or say balance: none",
        tries: [{ "model.moe.router.aux_coeff": 0.01 }, { "model.moe.router.balance": "none" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2}}",
  }),
  rule({
    code: "E405",
    title: "a balancing coefficient that is not used",
    why: "With balance: none there is no balancing loss to weigh. Megatron-LM ignores the coefficient in silence.",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.balance !== "none" || !(moe.router.aux_coeff > 0)) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `aux_coeff ${moe.router.aux_coeff} with balance: none`,
        fix: "balance with it, or leave it out",
        tries: [{ "model.moe.router.balance": "aux_loss" }, { "model.moe.router.aux_coeff": 0 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E406",
    title: "router coefficients are not negative",
    why: "A negative weight rewards what the loss should punish: uneven experts, or ever larger logits.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      for (const key of ["aux_coeff", "z_coeff"] as const) {
        if (moe.router[key] < 0)
          yield {
            at: `model.moe.router.${key}`,
            found: `${key} ${moe.router[key]}`,
            fix: "0 or more",
            tries: [{ [`model.moe.router.${key}`]: -moe.router[key] }],
          };
      }
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, z_coeff: -0.001}}}",
  }),
  rule({
    code: "E407",
    title: "every token goes to every expert",
    why: "With top_k = experts nothing is left out: the layer costs as much as a dense one of all experts' width, and routing and dispatch come on top.",
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
    title: "experts are cut although whole ones fit the ranks",
    why: "Cutting experts makes narrow matrices, which run slower, and adds an all-gather and a reduce-scatter of rows; spreading whole experts over the same ranks does neither. In Megatron-LM the cut comes unasked: there expert_tensor defaults to tensor.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || p.expert_tensor === 1 || moe.experts % (p.expert * p.expert_tensor) !== 0) return;
      yield {
        at: "parallel.expert_tensor",
        related: ["parallel.expert", "model.moe.experts"],
        found: `expert_tensor ${p.expert_tensor}, while ${moe.experts} experts divide over expert ${p.expert * p.expert_tensor}`,
        fix: "the same ranks with whole experts",
        tries: [{ "parallel.expert": p.expert * p.expert_tensor, "parallel.expert_tensor": 1 }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 2, expert_tensor: 2}",
  }),
  rule({
    code: "E409",
    title: "dispatch: all_gather sends more than all_to_all would",
    why: "all_gather copies every token to all ranks of the expert group; all_to_all sends it to the ranks of its own experts, top_k at most (Megatron-LM #756: users meet this as a surprising slowness).",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (moe?.dispatch !== "all_gather" || p.expert <= moe.top_k) return;
      yield {
        at: "model.moe.dispatch",
        related: ["parallel.expert", "model.moe.top_k"],
        found: `each token goes to ${p.expert} ranks, though only ${moe.top_k} experts want it`,
        fix: "it pays where expert is at most top_k",
        tries: [{ "model.moe.dispatch": "all_to_all" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, dispatch: all_gather}}\nparallel: {world: 4, expert: 4}",
  }),
  rule({
    code: "E410",
    title: "rows_bound is above the worst case",
    why: "A rank receives at most one row for each token and each of its experts that the token may choose; memory beyond that is never touched.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.rows_bound === "worst" || moe.experts % p.expert || moe.rows_bound <= worstLoad(moe, p.expert)) return;
      yield {
        at: "model.moe.rows_bound",
        related: ["parallel.expert"],
        found: `rows_bound ${moe.rows_bound}; the worst case is ${worstLoad(moe, p.expert)} times the balanced load`,
        fix: "the worst case never overflows",
        tries: [{ "model.moe.rows_bound": "worst" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, rows_bound: 9}}\nparallel: {world: 2, expert: 2}",
  }),
  rule({
    code: "E411",
    title: "rows_bound leaves no room for imbalance",
    why: "Routing is never even, least of all in the first steps. Rows beyond the bound are not dropped: the run stops with an error.",
    level: "warning",
    *check({ model: { moe }, parallel: p }) {
      if (!moe || moe.rows_bound === "worst" || moe.experts % p.expert) return;
      const worst = worstLoad(moe, p.expert);
      if (moe.rows_bound >= Math.min(1.25, worst)) return;
      yield {
        at: "model.moe.rows_bound",
        found: `rows_bound ${moe.rows_bound}, so ${Math.round(100 * (moe.rows_bound - 1))} % above the balanced load`,
        fix: `2 suits a balanced router; 'worst' is ${worst} here`,
        tries: [...(worst > 2 ? [{ "model.moe.rows_bound": 2 }] : []), { "model.moe.rows_bound": "worst" }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}, rows_bound: 1.1}}\nparallel: {world: 4, expert: 4}",
  }),
  rule({
    code: "E412",
    title: "top_k 1 with normalised weights teaches the router nothing",
    why: "One weight divided by itself is 1 whatever the router says, so no gradient of the loss reaches it. Megatron-LM refuses the same choice.",
    level: "error",
    *check({ model: { moe } }) {
      if (moe?.top_k !== 1 || !moe.router.normalize_top_k || moe.experts === 1) return;
      yield {
        at: "model.moe.router.normalize_top_k",
        related: ["model.moe.top_k"],
        found: "top_k 1 with normalize_top_k: true",
        fix: "weigh the expert by its own probability",
        tries: [{ "model.moe.router.normalize_top_k": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 1, router: {aux_coeff: 0.01}}}",
  }),
] as const;
