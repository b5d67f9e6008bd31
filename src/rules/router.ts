/** Rules E: router scores and selection. */

import { evenBy } from "../../schemas/experts.ts";
import { SMALLEST } from "../../schemas/float32.ts";
import { divisorsNear, rule } from "./rule.ts";

/** Rules of the router. */
export const router = [
  rule({
    code: "E412",
    title: "top_k 1 with normalised weights gives the router no gradient",
    why: "A single weight divided by itself is 1 for any router output, so the router gets no gradient from the loss. Megatron-LM refuses the combination, too.",
    level: "error",
    *check({ model: { moe } }) {
      if (moe?.top_k !== 1 || !moe.router.normalize_top_k || moe.experts === 1) return;
      yield {
        at: "model.moe.router.normalize_top_k",
        related: ["model.moe.top_k"],
        found: "top_k 1 with normalize_top_k: true",
        fix: "use the probability of the expert as its weight",
        tries: [{ "model.moe.router.normalize_top_k": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 1, router: {aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E415",
    title: "groups does not divide experts",
    why: "All groups have the same number of experts: those of a node, or of a device.",
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
    title: "group_top_k exceeds groups",
    why: "A token chooses its experts from group_top_k of the groups.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.router.groups === 1 || moe.router.group_top_k <= moe.router.groups) return;
      const { groups, group_top_k } = moe.router;
      yield {
        at: "model.moe.router.group_top_k",
        related: ["model.moe.router.groups"],
        found: `group_top_k ${group_top_k} of ${groups} groups`,
        fix: "use a smaller group_top_k, or more groups",
        tries: [
          { "model.moe.router.group_top_k": Math.max(1, Math.floor(groups / 2)) },
          { "model.moe.router.group_top_k": groups },
          ...[group_top_k * 2, group_top_k].map((g) => ({ "model.moe.router.groups": g })),
        ],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, groups: 2, group_top_k: 4}}}",
  }),
  rule({
    code: "E442",
    title: "group keys without groups",
    why: "Without groups a token may use all experts: group_top_k and group_scores are not read, and a token may go to any node. Megatron-LM ignores them, too.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.router.groups > 1) return;
      const { group_top_k, group_scores } = moe.router;
      // the value that completeMoe sets without groups
      const unread = [
        ...(group_top_k > 1 ? (["group_top_k"] as const) : []),
        ...(group_scores !== Math.max(1, Math.floor(moe.top_k / group_top_k)) ? (["group_scores"] as const) : []),
      ];
      for (const key of unread.slice(0, 1))
        yield {
          at: `model.moe.router.${key}`,
          related: ["model.moe.router.groups"],
          found: `${unread.map((k) => `${k} ${moe.router[k]}`).join(" and ")} with groups 1`,
          fix: "set groups, or leave the keys out",
          tries: [group_top_k * 2, group_top_k * 4]
            .filter((groups) => groups > 1)
            .map((groups) => ({ "model.moe.router.groups": groups }) as Readonly<Record<string, number>>)
            .concat({ "model.moe.router.group_top_k": 1, "model.moe.router.group_scores": moe.top_k }),
        };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, group_top_k: 2}}}",
  }),
  rule({
    code: "E417",
    title: "the groups of a token hold fewer experts than top_k",
    why: "A token selects top_k experts in group_top_k groups. If these groups have fewer experts, Megatron-LM adds arbitrary experts of other groups.",
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
        fix: "use more groups per token, or larger groups",
        tries: [{ "model.moe.router.group_top_k": Math.ceil(moe.top_k / size) }],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 3, router: {aux_coeff: 0.01, groups: 4, group_top_k: 1, group_scores: 1}}}",
  }),
  rule({
    code: "E418",
    title: "a group scores more experts than it has",
    why: "The score of a group is the sum of its group_scores largest expert scores.",
    level: "error",
    *check({ model: { moe } }) {
      // other rules report missing groups
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
    title: "groups have no effect",
    why: "A token may use all groups, or more groups than it has experts. In the second case Megatron-LM scores groups by an empty sum and selects arbitrary groups, without a message.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.router.groups === 1 || evenBy(moe.router)) return;
      const { groups, group_top_k } = moe.router;
      if (moe.experts % groups || group_top_k > groups) return;
      if (group_top_k <= moe.top_k && group_top_k < groups) return;
      const fewer = Math.min(moe.top_k, groups - 1);
      yield {
        at: "model.moe.router.group_top_k",
        related: ["model.moe.router.groups", "model.moe.top_k"],
        found: `group_top_k ${group_top_k} of ${groups} groups with top_k ${moe.top_k}`,
        fix: `use at most ${fewer}, or no groups`,
        tries: [
          { "model.moe.router.group_top_k": fewer },
          { "model.moe.router.group_top_k": fewer, "model.moe.router.group_scores": 1 },
          { "model.moe.router.groups": 1, "model.moe.router.group_top_k": 1 },
        ],
      };
    },
    bad: "model: {moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01, groups: 4, group_top_k: 3}}}",
  }),
  rule({
    code: "E422",
    title: "scaling is not above 0",
    why: "It multiplies all weights: with 0 the output of experts is discarded, and a negative value reverses its sign.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.router.scaling >= SMALLEST) return;
      yield {
        at: "model.moe.router.scaling",
        found: `scaling ${moe.router.scaling}`,
        fix: "1 does not change weights",
        tries: [{ "model.moe.router.scaling": 1 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, scaling: 0}}}",
  }),
  rule({
    code: "E423",
    title: "a router of many experts in half precision",
    why: "bf16 has 8 significant bits: with many experts several logits are equal, and the index of the expert decides. Megatron-LM warns from 32 experts on.",
    level: "warning",
    *check({ model: { moe }, train }) {
      if (!moe || moe.experts < 32 || train.precision !== "bf16" || moe.router.precision === "fp32") return;
      yield {
        at: "model.moe.router.precision",
        related: ["model.moe.experts", "train.precision"],
        found: `logits of ${moe.experts} experts in bf16`,
        fix: "use fp32: the router is a small part of a layer",
        tries: [{ "model.moe.router.precision": "fp32" }],
      };
    },
    bad: "model: {moe: {experts: 32, top_k: 2, router: {aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E429",
    title: "expert choice depends on later tokens",
    why: "An expert takes the best tokens of a microbatch, so that the selection of a token depends on later tokens. These do not exist yet when the model generates text (Zhou et al. 2022, section 4).",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.type !== "expert_choice" || moe.router.force !== "none") return;
      yield {
        at: "model.moe.router.type",
        found: "type: expert_choice in a model that predicts the next token",
        fix: "let tokens choose experts, with a balancing loss",
        tries: [
          { "model.moe.router.type": "top_k", "model.moe.router.aux_coeff": 0.01 },
          { "model.moe.router.type": "top_k", "model.moe.router.balance": "aux_loss", "model.moe.router.aux_coeff": 0.01 },
        ],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {type: expert_choice, normalize_top_k: false}}}",
  }),
  rule({
    code: "E431",
    title: "expert choice with normalised weights",
    why: "The number of experts that take a token varies. If one expert takes it, its normalised weight is 1 for any score, and the router gets no gradient from it. Zhou et al. (2022) use the scores without normalisation.",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.type !== "expert_choice" || !moe.router.normalize_top_k || moe.top_k === 1) return;
      yield {
        at: "model.moe.router.normalize_top_k",
        related: ["model.moe.router.type"],
        found: "type: expert_choice with normalize_top_k: true",
        fix: "use the score as the weight",
        tries: [{ "model.moe.router.normalize_top_k": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {type: expert_choice, force: uniform}}}",
  }),
  rule({
    code: "E432",
    title: "forced routing ignores the scores",
    why: "force: uniform is for benchmarks with balanced loads. The experts of a token are random, so the router does not train.",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.force !== "uniform" || moe.router.type === "expert_choice") return;
      yield {
        at: "model.moe.router.force",
        found: "force: uniform",
        fix: "leave it out to train a model",
        tries: [{ "model.moe.router.force": "none" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, force: uniform}}}",
  }),
] as const;
