/** Rules E: load balancing of experts by losses, a bias, or balanced selection. */
import { balancesOf, evenBy } from "../../schemas/experts.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import { divisorsNear, rule } from "./rule.ts";

/** Rules of load balancing. */
export const balance = [
  rule({
    code: "E404",
    title: "a balancing loss has coefficient 0",
    why: "Without balancing, a router tends to prefer a few experts more and more. Some ranks then receive most of the rows while the others wait, or memory runs out after hundreds of steps (Megatron-LM #1445). The default is 0, as in Megatron Core.",
    level: "warning",
    *check({ model: { moe } }) {
      // a bias balances too, and expert choice needs no balancing
      if (!moe || evenBy(moe.router) || moe.router.expert_bias || moe.router.type === "expert_choice") return;
      const idle = balancesOf(moe.router).find(({ by, coeff }) => by !== "none" && coeff === 0);
      if (!idle) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `balance: ${idle.by} with coefficient 0`,
        fix: "0.01 is usual; or set balance: none",
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
    title: "a balancing coefficient is not used",
    why: "With balance: none there is no balancing loss to multiply. Megatron-LM ignores the coefficient without a message.",
    level: "warning",
    *check({ model: { moe } }) {
      const unused = moe && balancesOf(moe.router).find(({ by, coeff }) => by === "none" && coeff > 0);
      if (!unused) return;
      yield {
        at: "model.moe.router.aux_coeff",
        related: ["model.moe.router.balance"],
        found: `aux_coeff ${unused.coeff} with balance: none`,
        fix: "choose a balancing loss, or leave aux_coeff out",
        tries: [{ "model.moe.router.balance": "aux_loss" }, { "model.moe.router.aux_coeff": 0 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E443",
    title: "loss_weighting: token multiplies balancing losses by tokens / labels",
    why: "Megatron Core's calculate_per_token_loss sums balancing and z losses over all tokens and divides by the number of labels; rankc does the same. If a tenth of the tokens of a step have labels, these losses and their gradients are ten times as large relative to the main loss, and they vary with the labels of each step. A step without labels contributes nothing.",
    level: "warning",
    *check({ model: { moe }, train, data }) {
      if (!moe || !hasTokenWeights({ data }) || train.loss_weighting !== "token") return;
      const { router } = moe;
      const coeffs = { aux_coeff: Math.max(0, ...balancesOf(router).map(({ coeff }) => coeff)), z_coeff: router.z_coeff };
      const some = Object.entries(coeffs).filter(([, coeff]) => coeff > 0);
      if (some.length === 0) return;
      yield {
        at: "train.loss_weighting",
        related: ["data.labels", "model.moe.router.aux_coeff", "model.moe.router.z_coeff"],
        found: `loss_weighting: token with data.labels and ${some.map(([key, coeff]) => `${key} ${coeff}`).join(", ")}`,
        fix: "multiply the coefficients by the share of labelled tokens, or set loss_weighting: microbatch",
        tries: [{ "train.loss_weighting": "microbatch" }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}\ntrain: {loss_weighting: token}\ndata: {labels: labels.i32}",
  }),
  rule({
    code: "E406",
    title: "a router coefficient is negative",
    why: "A negative coefficient rewards what the loss should penalise: uneven experts, or ever larger logits. A negative rate sends more tokens to the experts that have most. Megatron-LM accepts both.",
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
    code: "E413",
    title: "balancing kinds and coefficients do not match",
    why: "Each balancing loss has its own coefficient: balance and aux_coeff are lists of equal length.",
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
        fix: "write one coefficient for each loss",
        tries: [{ "model.moe.router.aux_coeff": kinds.map((_, i) => coeffs[i] ?? coeffs[0] ?? 0.01) }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: [aux_loss, seq_aux_loss], aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E414",
    title: "a balancing kind is listed twice",
    why: "Two losses of one kind equal one loss with the sum of their coefficients. Megatron-LM uses the first coefficient and ignores the second without a message.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      const kinds = [moe.router.balance].flat();
      const kept = [...new Set(kinds)];
      if (kept.length === kinds.length) return;
      const coeffs = [moe.router.aux_coeff].flat();
      yield {
        at: "model.moe.router.balance",
        related: ["model.moe.router.aux_coeff"],
        found: `balance: [${kinds.join(", ")}]`,
        fix: `list each kind once: [${kept.join(", ")}], with one coefficient each`,
        tries: [
          { "model.moe.router.balance": kept, "model.moe.router.aux_coeff": kept.map((by) => coeffs[kinds.indexOf(by)] ?? 0.01) },
          { "model.moe.router.balance": kept },
        ],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: [aux_loss, aux_loss], aux_coeff: [0.01, 0.02]}}}",
  }),
  rule({
    code: "E420",
    title: "a routing bias needs scores that do not depend on each other",
    why: "The bias is added to independent scores from 0 to 1. Softmax scores decrease with the number of experts, so that the bias would outweigh them. Megatron-LM refuses the combination, too.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe?.router.expert_bias || moe.router.score !== "softmax") return;
      yield {
        at: "model.moe.router.expert_bias",
        related: ["model.moe.router.score"],
        found: "expert_bias with score: softmax",
        fix: "use score: sigmoid, as DeepSeek-V3 does, or a balancing loss",
        tries: [{ "model.moe.router.score": "sigmoid" }, { "model.moe.router.expert_bias": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: none, expert_bias: true}}}",
  }),
  rule({
    code: "E421",
    title: "the bias and its rate are not both set",
    why: "bias_rate is the step of the bias that expert_bias enables. With rate 0 the bias stays 0, and without the bias the rate is ignored. Megatron-LM accepts either key alone, which balances nothing.",
    level: "warning",
    *check({ model: { moe } }) {
      if (!moe || moe.router.bias_rate < 0) return;
      const { expert_bias, bias_rate } = moe.router;
      if (expert_bias ? bias_rate > 0 : bias_rate === 1e-3) return;
      yield {
        at: "model.moe.router.bias_rate",
        related: ["model.moe.router.expert_bias"],
        found: `bias_rate ${bias_rate} with expert_bias: ${expert_bias}`,
        fix: expert_bias ? "0.001 is usual" : "set expert_bias: true, or leave bias_rate out",
        tries: [
          ...(expert_bias ? [] : [{ "model.moe.router.expert_bias": true }]),
          ...(expert_bias ? [] : [{ "model.moe.router.expert_bias": true, "model.moe.router.score": "sigmoid" }]),
          { "model.moe.router.bias_rate": 1e-3 },
        ],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01, score: sigmoid, bias_rate: 0.01}}}",
  }),
  rule({
    code: "E424",
    title: "balanced selection excludes balancing losses",
    why: "Sinkhorn's method and quantiles balance the selection itself; an additional loss would change logits that are balanced already. Megatron-LM reports the combination in the first forward pass.",
    level: "error",
    *check({ model: { moe } }) {
      const by = moe && evenBy(moe.router);
      if (!by) return;
      const { balance, aux_coeff } = moe.router;
      if ([balance].flat().length === 1 && [aux_coeff].flat().every((c) => c === 0)) return;
      yield {
        at: "model.moe.router.balance",
        related: ["model.moe.router.aux_coeff"],
        found: `balance: ${[balance].flat().join(", ")} with aux_coeff ${[aux_coeff].flat().join(", ")}`,
        fix: `use ${by} alone`,
        tries: [{ "model.moe.router.balance": by, "model.moe.router.aux_coeff": 0 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: quantile, aux_coeff: 0.01}}}",
  }),
  rule({
    code: "E425",
    title: "balanced selection excludes groups and a bias",
    why: "Balanced selection uses the logits of all experts at once. With sinkhorn Megatron-LM ignores groups and the bias without a message; with quantiles it refuses groups.",
    level: "error",
    *check({ model: { moe } }) {
      const by = moe && evenBy(moe.router);
      if (!by) return;
      const { groups, expert_bias } = moe.router;
      if (groups > 1)
        yield {
          at: "model.moe.router.groups",
          related: ["model.moe.router.balance"],
          found: `${groups} groups with balance: ${by}`,
          fix: "use one group, or a balancing loss",
          tries: [
            { "model.moe.router.groups": 1 },
            { "model.moe.router.groups": 1, "model.moe.router.group_top_k": 1 },
            { "model.moe.router.groups": 1, "model.moe.router.group_top_k": 1, "model.moe.router.group_scores": 1 },
          ],
        };
      if (expert_bias)
        yield {
          at: "model.moe.router.expert_bias",
          related: ["model.moe.router.balance"],
          found: `expert_bias with balance: ${by}`,
          fix: "use one of them",
          tries: [{ "model.moe.router.expert_bias": false }],
        };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: quantile, groups: 2}}}",
  }),
  rule({
    code: "E426",
    title: "score or normalize_top_k differs from the one that Sinkhorn's method uses",
    why: "The balanced matrix selects experts; their weights are the softmax over all experts (sigmoid if top_k is 1), without normalisation. Megatron Core always uses these, whatever score is set; a job must name them.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe || evenBy(moe.router) !== "sinkhorn") return;
      const score = moe.top_k === 1 ? "sigmoid" : "softmax";
      if (moe.router.score === score && !moe.router.normalize_top_k) return;
      yield {
        at: "model.moe.router.balance",
        related: ["model.moe.router.score", "model.moe.router.normalize_top_k"],
        found: `balance: sinkhorn with score: ${moe.router.score} and normalize_top_k: ${moe.router.normalize_top_k}`,
        fix: `score: ${score} with normalize_top_k: false`,
        tries: [{ "model.moe.router.score": score, "model.moe.router.normalize_top_k": false }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: sinkhorn}}}",
  }),
  rule({
    code: "E427",
    title: "quantile balancing needs an equal number of tokens per expert, and a spare expert",
    why: "The bias of an expert is the quantile that admits tokens x top_k / experts tokens of a microbatch, which must be a whole number. The threshold of a token is its best score among experts that are not selected, so at least one expert must remain.",
    level: "error",
    *check({ model: { moe, seq }, train }) {
      if (!moe || evenBy(moe.router) !== "quantile" || moe.top_k > moe.experts) return;
      const choices = train.micro_batch * seq * moe.top_k;
      if (choices % moe.experts === 0 && moe.top_k < moe.experts) return;
      yield {
        at: "model.moe.router.balance",
        related: ["model.moe.experts", "model.moe.top_k", "model.seq"],
        found:
          moe.top_k === moe.experts
            ? `top_k ${moe.top_k} of ${moe.experts} experts`
            : `${train.micro_batch * seq} tokens x top_k ${moe.top_k} over ${moe.experts} experts leaves ${choices % moe.experts} over`,
        fix: "choose a number of experts above top_k that divides tokens x top_k, or use a balancing loss",
        tries: [
          ...divisorsNear(choices, moe.experts).map((experts) => ({ "model.moe.experts": experts })),
          { "model.moe.router.balance": "aux_loss", "model.moe.router.aux_coeff": 0.01 },
        ],
      };
    },
    bad: "model: {moe: {experts: 5, top_k: 2, router: {balance: quantile}}}",
  }),
  rule({
    code: "E428",
    title: "quantile_ema is not from 0 to below 1, or has no quantiles",
    why: "quantile_ema is the share of the bias that a step keeps; with 1 the bias would never change. Without balance: quantile there is no such bias.",
    level: "error",
    *check({ model: { moe } }) {
      if (!moe) return;
      const { quantile_ema: ema } = moe.router;
      if (ema === 0 || (ema > 0 && ema < 1 && evenBy(moe.router) === "quantile")) return;
      yield {
        at: "model.moe.router.quantile_ema",
        related: ["model.moe.router.balance"],
        found: `quantile_ema ${ema} with balance: ${[moe.router.balance].flat().join(", ")}`,
        fix: evenBy(moe.router) === "quantile" ? "0 or a number below 1, such as 0.9" : "leave it out",
        tries: [{ "model.moe.router.quantile_ema": 0 }],
      };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {balance: quantile, quantile_ema: 1}}}",
  }),
  rule({
    code: "E430",
    title: "expert choice has no use for balancing, groups, a bias, or drop and pad",
    why: "With type: expert_choice each expert takes the same number of tokens. There is nothing to balance, tokens do not choose groups, and no row is dropped or padded.",
    level: "error",
    *check({ model: { moe } }) {
      if (moe?.router.type !== "expert_choice") return;
      const { balance, aux_coeff, groups, expert_bias } = moe.router;
      if (evenBy(moe.router) || [aux_coeff].flat().some((c) => c !== 0))
        yield {
          at: "model.moe.router.balance",
          related: ["model.moe.router.type", "model.moe.router.aux_coeff"],
          found: `balance: ${[balance].flat().join(", ")} with type: expert_choice`,
          fix: "balance: none",
          tries: [{ "model.moe.router.balance": "none", "model.moe.router.aux_coeff": 0 }],
        };
      if (groups > 1)
        yield {
          at: "model.moe.router.groups",
          related: ["model.moe.router.type"],
          found: `${groups} groups with type: expert_choice`,
          fix: "use one group",
          tries: [{ "model.moe.router.groups": 1 }, { "model.moe.router.groups": 1, "model.moe.router.group_top_k": 1 }],
        };
      if (expert_bias)
        yield {
          at: "model.moe.router.expert_bias",
          related: ["model.moe.router.type"],
          found: "expert_bias with type: expert_choice",
          fix: "leave expert_bias out",
          tries: [{ "model.moe.router.expert_bias": false }],
        };
      if (moe.capacity !== "dropless" && (moe.capacity.pad || moe.capacity.drop !== "probs"))
        yield {
          at: "model.moe.capacity",
          related: ["model.moe.router.type"],
          found: `drop: ${moe.capacity.drop}, pad: ${moe.capacity.pad} with type: expert_choice`,
          fix: "set the factor alone: it gives the number of tokens per expert",
          tries: [{ "model.moe.capacity": { factor: moe.capacity.factor } }],
        };
    },
    bad: "model: {moe: {experts: 4, top_k: 2, router: {type: expert_choice, normalize_top_k: false, force: uniform, aux_coeff: 0.01}}}",
  }),
] as const;
