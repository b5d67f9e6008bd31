/** E: experts, the router, and how rows travel. */
import { balancesOf, type Job } from "../../schemas/job.ts";
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
    title: "a balancing loss with coefficient 0 balances nothing",
    why: "Left alone, a router tends to favour a few experts more and more; some ranks then hold most of the rows and the others wait, or memory runs out after hundreds of steps (Megatron-LM #1445). 0 is the default here because it is Megatron Core's.",
    level: "warning",
    *check({ model: { moe } }) {
      const idle = moe && balancesOf(moe.router).find(({ by, coeff }) => by !== "none" && coeff === 0);
      if (!idle) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `balance: ${idle.by} with coefficient 0`,
        fix: "0.01 is usual; or say balance: none",
        tries: [
          { "model.moe.router.aux_coeff": 0.01 },
          { "model.moe.router.aux_coeff": balancesOf(moe.router).map(({ coeff }) => coeff || 0.01) },
          { "model.moe.router.balance": "none" },
        ],
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
      const unused = moe && balancesOf(moe.router).find(({ by, coeff }) => by === "none" && coeff > 0);
      if (!unused) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `aux_coeff ${unused.coeff} with balance: none`,
        fix: "balance with it, or leave it out",
        tries: [{ "model.moe.router.balance": "aux_loss" }, { "model.moe.router.aux_coeff": 0 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E406",
    title: "router coefficients are not negative",
    why: "A negative weight rewards what the loss should punish: uneven experts, or ever larger logits; a negative rate sends more tokens to the experts that have most. Megatron-LM accepts them.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      const { aux_coeff, z_coeff, bias_rate } = moe.router;
      const positive = (x: number | readonly number[]) => (typeof x === "number" ? Math.abs(x) : x.map(Math.abs));
      for (const [key, value] of Object.entries({ aux_coeff, z_coeff, bias_rate })) {
        if ([value].flat().every((x) => x >= 0)) continue;
        const at = `model.moe.router.${key as "aux_coeff" | "z_coeff" | "bias_rate"}` as const;
        yield { at, found: `${key} ${value}`, fix: "0 or more", tries: [{ [at]: positive(value) }] };
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
  rule({
    code: "E413",
    title: "each kind of balancing has its coefficient",
    why: "Losses of different kinds have different weights: the lists of balance and of aux_coeff go side by side.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      const { balance, aux_coeff } = moe.router;
      const [kinds, coeffs] = [[balance].flat(), [aux_coeff].flat()];
      if (kinds.length === coeffs.length) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `${kinds.length} in balance, ${coeffs.length} in aux_coeff`,
        fix: "a coefficient for each",
        tries: [{ "model.moe.router.aux_coeff": kinds.map((_, i) => coeffs[i] ?? coeffs[0] ?? 0.01) }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: [aux_loss, seq_aux_loss], aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E414",
    title: "a list of balancing names each kind once, and none alone",
    why: "Two losses of one kind are one with their weights added, and beside a loss `none` says nothing.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      const kinds = [moe.router.balance].flat();
      const kept = [...new Set(kinds)].filter((by, _, all) => by !== "none" || all.length === 1);
      if (kept.length === kinds.length) return;
      const coeffs = [moe.router.aux_coeff].flat();
      yield {
        at: "model.moe.router.balance",
        related: ["model.moe.router.aux_coeff"],
        found: `balance: [${kinds.join(", ")}]`,
        fix: `[${kept.join(", ")}], with a coefficient for each`,
        tries: [
          { "model.moe.router.balance": kept, "model.moe.router.aux_coeff": kept.map((by) => coeffs[kinds.indexOf(by)] ?? 0.01) },
          { "model.moe.router.balance": kept },
        ],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: [none, aux_loss], aux_coeff: [0, 0.01]}}}",
  }),
  rule({
    code: "E415",
    title: "groups divides experts",
    why: "Groups of experts are of one size: the experts of a node, or of a device.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.experts % moe.router.groups === 0) return;
      const { groups } = moe.router;
      yield {
        at: "model.moe.router.groups",
        related: ["model.moe.experts"],
        found: `${moe.experts} experts in ${groups} groups leaves ${moe.experts % groups} over`,
        fix: `groups must divide ${moe.experts}`,
        tries: divisorsNear(moe.experts, groups).map((g) => ({ "model.moe.router.groups": g })),
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, groups: 3}}}",
  }),
  rule({
    code: "E416",
    title: "group_top_k is at most groups",
    why: "A token chooses its experts from group_top_k of the groups; without groups there is but one, of all experts.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.router.group_top_k <= moe.router.groups) return;
      const { groups, group_top_k } = moe.router;
      yield {
        at: "model.moe.router.group_top_k",
        related: ["model.moe.router.groups"],
        found: `group_top_k ${group_top_k} of ${groups} group${groups === 1 ? "" : "s"}`,
        fix: "fewer, or more groups",
        tries: [
          ...(groups > 1 ? [{ "model.moe.router.group_top_k": Math.max(1, groups / 2) }, { "model.moe.router.group_top_k": groups }] : []),
          ...[group_top_k * 2, group_top_k].map((g) => ({ "model.moe.router.groups": g })),
        ],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, group_top_k: 2}}}",
  }),
  rule({
    code: "E417",
    title: "the groups of a token hold as many experts as it needs",
    why: "A token takes top_k experts from group_top_k groups. Where these hold fewer, Megatron-LM fills up with experts of groups that were ruled out, which of them is chance.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.experts % moe.router.groups || moe.router.group_top_k > moe.router.groups || moe.top_k > moe.experts) return;
      const { groups, group_top_k } = moe.router;
      const size = moe.experts / groups;
      if (group_top_k * size >= moe.top_k) return;
      yield {
        at: "model.moe.router.group_top_k",
        related: ["model.moe.router.groups", "model.moe.top_k"],
        found: `${group_top_k} group${group_top_k === 1 ? "" : "s"} of ${size} for top_k ${moe.top_k}`,
        fix: "more groups for a token, or larger ones",
        tries: [{ "model.moe.router.group_top_k": Math.ceil(moe.top_k / size) }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 3, router: {aux_coeff: 0.01, groups: 4, group_top_k: 1, group_scores: 1}}}",
  }),
  rule({
    code: "E418",
    title: "a group is worth no more scores than it has",
    why: "The worth of a group is the sum of its group_scores largest scores.",
    level: "error",
    *check({ model: { moe } }) {
      // what the groups lack, other rules say
      if (!moe || moe.router.groups === 1 || moe.experts % moe.router.groups) return;
      const { groups, group_scores, group_top_k } = moe.router;
      const size = moe.experts / groups;
      if (group_scores <= size || group_top_k * size < moe.top_k) return;
      yield {
        at: "model.moe.router.group_scores",
        related: ["model.moe.router.groups"],
        found: `group_scores ${group_scores} in groups of ${size}`,
        fix: `at most ${size}`,
        tries: [{ "model.moe.router.group_scores": size }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, groups: 4, group_top_k: 2, group_scores: 3}}}",
  }),
  rule({
    code: "E419",
    title: "more groups than experts for a token",
    why: "A token cannot use more groups than it has experts, so the limit limits nothing but which groups are left over. Megatron-LM then takes the sum of its 0 best scores as a group's worth, and keeps groups at random in silence.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.router.groups === 1 || moe.router.group_top_k > moe.router.groups) return;
      const { groups, group_top_k } = moe.router;
      if (group_top_k <= moe.top_k || group_top_k === groups) return;
      yield {
        at: "model.moe.router.group_top_k",
        related: ["model.moe.top_k"],
        found: `group_top_k ${group_top_k} with top_k ${moe.top_k}`,
        fix: `at most ${moe.top_k}`,
        tries: [{ "model.moe.router.group_top_k": moe.top_k }, { "model.moe.router.groups": 1, "model.moe.router.group_top_k": 1 }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, groups: 4, group_top_k: 3}}}",
  }),
  rule({
    code: "E420",
    title: "a bias of the choice needs scores by themselves",
    why: "The bias is added to scores from 0 to 1 that do not depend on each other. A softmax's scores shrink with the number of experts: the same bias would outweigh them. Megatron-LM refuses the same.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe?.router.expert_bias || moe.router.score !== "softmax") return;
      yield {
        at: "model.moe.router.expert_bias",
        related: ["model.moe.router.score"],
        found: "expert_bias with score: softmax",
        fix: "score by sigmoid, as DeepSeek-V3 does, or balance with a loss",
        tries: [{ "model.moe.router.score": "sigmoid" }, { "model.moe.router.expert_bias": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, expert_bias: true}}}",
  }),
  rule({
    code: "E421",
    title: "a rate for a bias that is not there",
    why: "bias_rate moves the bias of expert_bias. Megatron-LM accepts the rate alone, and nothing balances.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.router.expert_bias || moe.router.bias_rate === 1e-3 || moe.router.bias_rate < 0) return;
      yield {
        at: "model.moe.router.bias_rate",
        related: ["model.moe.router.expert_bias"],
        found: `bias_rate ${moe.router.bias_rate} with expert_bias: false`,
        fix: "turn the bias on, or leave the rate out",
        tries: [
          { "model.moe.router.expert_bias": true },
          { "model.moe.router.expert_bias": true, "model.moe.router.score": "sigmoid" },
          { "model.moe.router.bias_rate": 1e-3 },
        ],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, score: sigmoid, bias_rate: 0.01}}}",
  }),
  rule({
    code: "E422",
    title: "scaling is above 0",
    why: "It is a factor on all weights: with 0 the experts compute for nothing, and below 0 what they say is turned around.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.router.scaling > 0) return;
      yield {
        at: "model.moe.router.scaling",
        found: `scaling ${moe.router.scaling}`,
        fix: "1 leaves weights as they are",
        tries: [{ "model.moe.router.scaling": 1 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, scaling: 0}}}",
  }),
  rule({
    code: "E423",
    title: "a router of many experts in half precision",
    why: "bf16 keeps 8 bits: among many experts the logits of several are then equal, and the order of the experts decides. Megatron-LM warns of it from 32 experts on.",
    level: "warning",
    *check({ model: { moe }, train }) {
      if (!moe || moe.experts < 32 || train.precision !== "bf16" || moe.router.precision === "fp32") return;
      yield {
        at: "model.moe.router.precision",
        related: ["model.moe.experts", "train.precision"],
        found: `logits of ${moe.experts} experts in bf16`,
        fix: "the router is a small part of a layer",
        tries: [{ "model.moe.router.precision": "fp32" }],
      };
    },
    bad: "model: {moe: {experts: 32, top_k: 2, router: {aux_coeff: 0.01}}}",
  }),
] as const;
