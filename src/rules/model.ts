/** Rules M: the shape of the model, and its sharding. */

import { hasExperts } from "../../schemas/experts.ts";
import { SMALLEST } from "../../schemas/float32.ts";
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { latent, positions } from "./attention.ts";
import { divisorsNear, downTo, type JobPath, type Rule, type RuleResult, rule } from "./rule.ts";

/** The largest element count with exact sums of bytes. */
const LARGEST_COUNT = 2 ** 48;

/** Returns the number of parameters of the whole model. */
function parameters({ model: m }: Job): number {
  const attention = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads);
  const width = m.moe?.latent ?? m.hidden;
  const mlp = m.moe
    ? m.moe.experts * 3 * width * m.moe.ffn + m.hidden * m.moe.experts + 3 * m.hidden * (m.moe.shared?.ffn ?? 0)
    : 3 * m.hidden * m.ffn;
  const ahead = depthsOf(m);
  const layers = (m.layers + ahead) * (attention + mlp + 2 * m.hidden) + ahead * 2 * m.hidden ** 2;
  return layers + (m.tie_embeddings ? 1 : 2) * paddedVocab(m) * m.hidden + (m.positions === "learned" ? m.max_positions : 1) * m.hidden;
}

/** Builds a finding for a size that `tensor` does not divide. */
function* byTensor(job: Job, at: JobPath, size: number, what: string, more: RuleResult["tries"] = []): Iterable<RuleResult> {
  const { tensor } = job.parallel;
  if (size % tensor === 0) return;
  yield {
    at,
    related: ["parallel.tensor"],
    found: `${size} ${what} over ${tensor} tensor ranks leaves ${size % tensor} over`,
    fix: `tensor must divide ${size}`,
    tries: [...divisorsNear(size, tensor).map((t) => ({ "parallel.tensor": t })), ...more],
  };
}

/** Rules of the model shape. */
export const model: readonly Rule[] = [
  rule({
    code: "M301",
    title: "kv_heads does not divide heads",
    why: "In grouped-query attention each key and value head serves the same number of query heads.",
    level: "error",
    *check({ model: m }) {
      if (m.heads % m.kv_heads === 0) return;
      yield {
        at: "model.kv_heads",
        related: ["model.heads"],
        found: `${m.heads} query heads share ${m.kv_heads} key and value heads unevenly`,
        fix: `kv_heads must divide ${m.heads}`,
        tries: divisorsNear(m.heads, m.kv_heads).map((kv) => ({ "model.kv_heads": kv })),
      };
    },
    bad: "model: {kv_heads: 3}",
  }),
  rule({
    code: "M302",
    title: "tensor does not divide heads",
    why: "Tensor parallelism gives each rank whole attention heads.",
    level: "error",
    check: (job) => byTensor(job, "model.heads", job.model.heads, "query heads"),
    bad: "model: {heads: 4, kv_heads: 1, head_dim: 8}\nparallel: {world: 3, tensor: 3}\n",
  }),
  rule({
    code: "M303",
    title: "tensor ranks and key/value heads are not multiples of each other",
    why: "Each tensor rank computes the query heads of whole key/value heads, or, with more ranks than such heads, those of one head of which equally many ranks have a copy. Megatron-LM has the same rule.",
    level: "error",
    *check({ model: { heads, kv_heads }, parallel: { tensor } }) {
      if (heads % tensor !== 0 || kv_heads % tensor === 0 || tensor % kv_heads === 0) return;
      const degrees = divisorsNear(heads, tensor).filter((t) => kv_heads % t === 0 || t % kv_heads === 0);
      yield {
        at: "model.kv_heads",
        related: ["parallel.tensor"],
        found: `${kv_heads} key/value heads over ${tensor} tensor ranks`,
        fix: `tensor must divide ${kv_heads} or be a multiple of it`,
        tries: degrees.map((t) => ({ "parallel.tensor": t })),
      };
    },
    bad: "model: {heads: 12, kv_heads: 6, head_dim: 8}\nparallel: {world: 4, tensor: 4}",
  }),
  rule({
    code: "M304",
    title: "tensor does not divide vocab",
    why: "The embedding and the output head are sharded over the vocabulary, in equal parts; model.vocab_multiple adds rows that no id has.",
    level: "error",
    check: (job) =>
      byTensor(job, "model.vocab", paddedVocab(job.model), "vocabulary rows", [{ "model.vocab_multiple": 128 * job.parallel.tensor }]),
    bad: "model: {vocab: 257}\nparallel: {world: 2, tensor: 2}",
  }),
  rule({
    code: "M305",
    title: "tensor does not divide ffn",
    why: "The dense feed-forward layer is sharded along its inner width. Megatron-LM accepts any width when it reads the arguments and fails when it builds the layer.",
    level: "error",
    *check(job) {
      const { ffn, layers } = job.model;
      const { tensor } = job.parallel;
      // most layers of most jobs have experts, and there may be many
      if (!Array.from({ length: layers }, (_, i) => i).every((i) => hasExperts(job.model, i)))
        yield* byTensor(job, "model.ffn", ffn, "columns", [{ "model.ffn": downTo(ffn, tensor) }]);
    },
    bad: "model: {ffn: 33}\nparallel: {world: 2, tensor: 2}",
  }),
  rule({
    code: "M306",
    title: "head_dim is not a whole number",
    why: "Left out, head_dim is hidden / heads; a head cannot have a fraction of a channel.",
    level: "error",
    *check({ model: m }) {
      if (Number.isInteger(m.head_dim)) return;
      const close = Math.max(2, 2 * Math.round(m.head_dim / 2));
      yield {
        at: "model.heads",
        related: ["model.hidden"],
        found: `hidden ${m.hidden} / heads ${m.heads} = ${m.head_dim.toFixed(2)}`,
        fix: `write head_dim, or choose heads that divide ${m.hidden}`,
        tries: [{ "model.head_dim": close }],
      };
    },
    bad: "model: {hidden: 16, heads: 3, kv_heads: 3}",
  }),
  rule({
    code: "M307",
    title: "head_dim is odd",
    why: "Rotary position embedding rotates pairs of channels.",
    level: "error",
    *check({ model: m }) {
      if (m.mla || m.positions !== "rope" || m.rope.fraction !== 1 || !Number.isInteger(m.head_dim) || m.head_dim % 2 === 0) return;
      yield {
        at: "model.head_dim",
        related: ["model.rope"],
        found: `head_dim ${m.head_dim}`,
        fix: "make it even",
        tries: [{ "model.head_dim": m.head_dim + 1 }],
      };
    },
    bad: "model: {head_dim: 7}",
  }),
  rule({
    code: "M308",
    title: "vocab is below the 256 ids of the byte tokenizer",
    why: "A byte is a number from 0 to 255; an id beyond the vocabulary has no row in the embedding.",
    level: "error",
    *check({ model: m, data }) {
      if (data.format !== "text" || data.tokenizer !== "bytes" || m.vocab >= 256) return;
      yield {
        at: "model.vocab",
        related: ["data.tokenizer"],
        found: `vocab ${m.vocab}`,
        fix: "use 256 or more",
        tries: [{ "model.vocab": 256 }],
      };
    },
    bad: "model: {vocab: 128}",
  }),
  rule({
    code: "M309",
    title: "qk_norm: full gathers queries and keys over the tensor ranks",
    why: "The mean square over all heads needs heads of other tensor ranks: a collective in every layer, forward and backward. qk_norm: head needs none.",
    level: "warning",
    *check({ model: m, parallel: p }) {
      if (m.qk_norm !== "full" || p.tensor === 1) return;
      yield {
        at: "model.qk_norm",
        related: ["parallel.tensor"],
        found: `qk_norm: full with tensor ${p.tensor}`,
        fix: "use tensor: 1 if the model must keep this norm (OLMoE has it); in a new model, qk_norm: head",
        tries: [{ "parallel.tensor": 1 }, { "model.qk_norm": "head" }],
      };
    },
    bad: "model: {qk_norm: full}\nparallel: {world: 2, tensor: 2}",
  }),
  rule({
    code: "M310",
    title: "norm.eps is not above 0",
    why: "eps keeps the divisor above zero: the root mean square of a zero vector is 0.",
    level: "error",
    *check({ model: m }) {
      const fix = "a small positive number";
      if (!(m.norm.eps >= SMALLEST)) yield { at: "model.norm.eps", found: `eps ${m.norm.eps}`, fix, tries: [{ "model.norm.eps": 1e-5 }] };
      if (m.mla && !(m.mla.norm_eps >= SMALLEST))
        yield { at: "model.mla.norm_eps", found: `norm_eps ${m.mla.norm_eps}`, fix, tries: [{ "model.mla.norm_eps": 1e-6 }] };
    },
    bad: "model: {norm: {eps: 0}}",
  }),
  rule({
    code: "M311",
    title: "rope.theta is not above 1",
    why: "Wavelengths are powers of theta: with 1 all channels have the same wavelength, and with 0 or below there are none.",
    level: "error",
    *check({ model: m }) {
      if (m.rope.theta > 1) return;
      yield {
        at: "model.rope.theta",
        found: `theta ${m.rope.theta}`,
        fix: "usual values are 1.0e4 to 1.0e6",
        tries: [{ "model.rope.theta": 1e4 }],
      };
    },
    bad: "model: {rope: {theta: 1}}",
  }),
  rule({
    code: "M312",
    title: "the model exceeds the range of exact numbers",
    why: "Sizes and byte offsets are exact up to 2^53; past 2^48 parameters, sums of bytes are not, and no cluster holds them.",
    level: "error",
    *check(job) {
      const n = parameters(job);
      if (n <= LARGEST_COUNT) return;
      const m = job.model;
      const largest = (["hidden", "ffn", "vocab", "layers"] as const).reduce((a, b) => (m[a] >= m[b] ? a : b));
      yield {
        at: `model.${largest}`,
        found: `about ${n.toPrecision(2)} parameters`,
        fix: "check the sizes of the model for a superfluous digit",
      };
    },
    bad: "model: {vocab: 1000000000000000}",
  }),
  rule({
    code: "M313",
    title: "a microbatch exceeds the range of exact numbers",
    why: "Sizes and byte offsets are exact up to 2^53; past 2^48 elements of one activation, sums of bytes are not.",
    level: "error",
    *check(job) {
      const { model: m, train, parallel: p } = job;
      const width = Math.max(m.hidden, m.ffn, m.vocab, m.heads * m.head_dim, m.moe ? m.moe.top_k * Math.max(m.moe.ffn, m.hidden) : 0);
      const tokens = train.micro_batch * p.data * m.seq;
      if (tokens * width <= LARGEST_COUNT || parameters(job) > LARGEST_COUNT) return;
      yield {
        at: m.seq >= train.micro_batch ? "model.seq" : "train.micro_batch",
        found: `${tokens.toPrecision(2)} tokens of ${width} elements`,
        fix: "check seq and micro_batch for a superfluous digit",
        tries: [{ "train.micro_batch": 1 }, { "model.seq": 4096 }, { "train.micro_batch": 1, "train.global_batch": p.data }],
      };
    },
    bad: "model: {seq: 1000000000000}",
  }),
  ...positions,
  ...latent,
];
