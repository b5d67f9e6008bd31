/** Rules E: router scores and selection. */

import { evenBy } from "../../schemas/experts.ts";
import { SMALLEST } from "../../schemas/job/numbers.ts";
import { divisorsNear, rule } from "./rule.ts";

/** Rules of the router. */
export const router = [
  rule({
    code: "E412",
    title: "top_k 1 with normalised weights gives the router no gradient",
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
    code: "E415",
    title: "groups does not divide experts",
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
        fix: "fewer, or more groups",
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
    why: "Without groups a token may use all experts: group_top_k and group_scores are not read, and nothing bounds how far a token travels. Megatron-LM ignores them too.",
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
          fix: "write how many groups there are, or leave the keys out",
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
    title: "a group scores more experts than it has",
    why: "The worth of a group is the sum of its group_scores largest scores.",
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
    why: "Kept groups are all of them, or more than a token has experts: it cannot use so many. Megatron-LM takes the sum of the 0 best scores as the worth of a group then, and keeps groups at random in silence.",
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
        fix: `at most ${fewer}, or no groups`,
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
    why: "It is a factor on all weights: with 0 the experts compute for nothing, and below 0 what they say is turned around.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || moe.router.scaling >= SMALLEST) return;
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
  rule({
    code: "E429",
    title: "experts that choose look at later tokens",
    why: "An expert takes the best tokens of a microbatch: whether an early token gets it depends on those that come after. A model that is trained to predict the next token learns from what it will not have when it generates (Zhou et al. 2022, section 4).",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.type !== "expert_choice" || moe.router.force !== "none") return;
      yield {
        at: "model.moe.router.type",
        found: "type: expert_choice in a model that predicts the next token",
        fix: "let tokens choose, and balance",
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
    why: "The number of experts that take a token varies. If a single expert takes it, its normalised weight is 1 whatever its score, and the router has no gradient from it. Zhou et al. (2022) use the scores without normalisation.",
    level: "warning",
    *check({ model: { moe } }) {
      if (moe?.router.type !== "expert_choice" || !moe.router.normalize_top_k || moe.top_k === 1) return;
      yield {
        at: "model.moe.router.normalize_top_k",
        related: ["model.moe.router.type"],
        found: "type: expert_choice with normalize_top_k: true",
        fix: "weigh by the score itself",
        tries: [{ "model.moe.router.normalize_top_k": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {type: expert_choice, force: uniform}}}",
  }),
  rule({
    code: "E432",
    title: "a choice that ignores the scores",
    why: "force: uniform is for benchmarks: it shows what even loads would cost. The experts of a token are then chance, and the model learns to live with it.",
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
