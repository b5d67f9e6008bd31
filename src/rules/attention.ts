/** Rules M32, M33: RoPE scaling and latent attention. */
import type { Job } from "../../schemas/job.ts";
import { rotatedWidth } from "../../schemas/jobSizes.ts";
import { type JobPath, type Rule, rule } from "./rule.ts";

type Scaling = NonNullable<Job["model"]["rope"]["scaling"]>;

/** Per key: the kinds of scaling that read it, and its default. */
const readers: readonly (readonly [keyof Scaling, Scaling["type"], number | null])[] = [
  ["low_freq", "llama3", 1],
  ["high_freq", "llama3", 4],
  ["beta_fast", "yarn", 32],
  ["beta_slow", "yarn", 1],
  ["mscale", "yarn", null],
  ["mscale_all_dim", "yarn", null],
  ["attention_factor", "yarn", null],
];
const scalingKey = <K extends keyof Scaling>(key: K): JobPath => `model.rope.scaling.${key}` as JobPath;

/** Rules of RoPE scaling. */
export const positions: readonly Rule[] = [
  rule({
    code: "M320",
    title: "rope.scaling.factor is below 1",
    why: "The factor multiplies wavelengths, so that positions of longer sequences stay in the trained range. Below 1 it would shrink that range.",
    level: "error",
    *check({ model: { rope } }) {
      const { scaling } = rope;
      if (!scaling || scaling.factor >= 1) return;
      yield {
        at: "model.rope.scaling.factor",
        found: `factor ${scaling.factor}`,
        fix: "the longest sequence divided by original_seq, or no scaling",
        tries: [...(scaling.factor > 0 ? [{ "model.rope.scaling.factor": 1 / scaling.factor }] : []), { "model.rope.scaling": null }],
      };
    },
    bad: "model: {rope: {scaling: {type: linear, factor: 0.25}}}",
  }),
  rule({
    code: "M321",
    title: "the RoPE frequency bounds are in the wrong order",
    why: "Scaling fades out between the two bounds. In the wrong order, short wavelengths, which distinguish neighbouring tokens, would be scaled, and long ones would not.",
    level: "error",
    *check({ model: { rope } }) {
      const { scaling } = rope;
      if (!scaling || scaling.type === "linear") return;
      const yarn = scaling.type === "yarn";
      const [low, high, lowest, highest] = yarn
        ? [scaling.beta_slow, scaling.beta_fast, "beta_slow", "beta_fast"]
        : [scaling.low_freq, scaling.high_freq, "low_freq", "high_freq"];
      // yarn takes the logarithm of both, llama3 divides by their difference
      if (low > 0 && (yarn ? high >= low : high > low)) return;
      const usual = yarn ? { beta_slow: 1, beta_fast: 32 } : { low_freq: 1, high_freq: 4 };
      yield {
        at: scalingKey(highest as keyof Scaling),
        related: [scalingKey(lowest as keyof Scaling)],
        found: `${lowest} ${low} and ${highest} ${high}`,
        fix: "usual values",
        tries: [Object.fromEntries(Object.entries(usual).map(([key, value]) => [scalingKey(key as keyof Scaling), value]))],
      };
    },
    bad: "model: {rope: {scaling: {type: llama3, factor: 4, low_freq: 4, high_freq: 1}}}",
  }),
  rule({
    code: "M322",
    title: "a scaling key has no effect",
    why: "Each kind of scaling has its own keys. A key of another kind would be ignored, and the model would differ from the configuration that it was copied from.",
    level: "error",
    *check({ model: { rope } }) {
      const { scaling } = rope;
      if (!scaling) return;
      for (const [key, type, otherwise] of readers)
        if (scaling.type !== type && scaling[key] !== otherwise)
          yield {
            at: scalingKey(key),
            related: ["model.rope.scaling.type"],
            found: `${key} ${scaling[key]} with type: ${scaling.type}`,
            fix: `${type} reads it`,
            tries: [{ [scalingKey(key)]: otherwise }],
          };
      if (scaling.type === "yarn" && scaling.mscale !== null && scaling.mscale_all_dim === null)
        yield {
          at: "model.rope.scaling.mscale",
          related: ["model.rope.scaling.mscale_all_dim"],
          found: `mscale ${scaling.mscale} without mscale_all_dim`,
          fix: "the two keys are read together; DeepSeek sets both to the same number",
          tries: [{ "model.rope.scaling.mscale_all_dim": scaling.mscale }],
        };
    },
    bad: "model: {rope: {scaling: {type: llama3, factor: 4, beta_fast: 16}}}",
  }),
  rule({
    code: "M323",
    title: "rope.scaling.attention_factor is not above 0",
    why: "It multiplies queries and keys after the rotation. With 0 all scores would be 0.",
    level: "error",
    *check({ model: { rope } }) {
      const factor = rope.scaling?.attention_factor ?? null;
      if (factor === null || factor > 0) return;
      yield {
        at: "model.rope.scaling.attention_factor",
        found: `attention_factor ${factor}`,
        fix: "leave it out: it is derived from factor",
        tries: [{ "model.rope.scaling.attention_factor": null }],
      };
    },
    bad: "model: {rope: {scaling: {type: yarn, factor: 4, attention_factor: 0}}}",
  }),
  rule({
    code: "M324",
    title: "rope.fraction gives no whole pairs of channels",
    why: "That share of the channels of a head is rotated in pairs: an even number of them, at least two, at most all. In latent attention mla.rope_dim says how many.",
    level: "error",
    *check({ model: m }) {
      const { fraction } = m.rope;
      const width = rotatedWidth(m);
      const isFine = m.mla ? fraction === 1 : fraction > 0 && fraction <= 1 && width > 0 && width % 2 === 0;
      // M306 and M307 report heads whose width is not even
      if (m.positions !== "rope" || isFine || (fraction === 1 && !m.mla)) return;
      const even = Math.max(2, Math.min(m.head_dim, 2 * Math.round((m.head_dim * fraction) / 2)));
      yield {
        at: "model.rope.fraction",
        related: [m.mla ? "model.mla" : "model.head_dim"],
        found: m.mla ? `fraction ${fraction} with mla` : `${fraction} of ${m.head_dim} channels is ${width}`,
        fix: m.mla ? "leave it out; rope_dim is the number of rotated channels" : "choose a share that gives an even number of channels",
        tries: [...(m.mla ? [] : [{ "model.rope.fraction": even / m.head_dim }]), { "model.rope.fraction": 1 }],
      };
    },
    bad: "model: {rope: {fraction: 0.3}}",
  }),
  rule({
    code: "M325",
    title: "max_positions is below seq",
    why: "Each token of a sequence needs the vector of its position.",
    level: "error",
    *check({ model: { positions: by, max_positions, seq } }) {
      if (by !== "learned" || max_positions >= seq) return;
      yield {
        at: "model.max_positions",
        related: ["model.seq"],
        found: `${max_positions} positions for sequences of ${seq}`,
        fix: "as many as a sequence has tokens, or more",
        tries: [{ "model.max_positions": seq }],
      };
    },
    bad: "model: {positions: learned, max_positions: 32}",
  }),
];

const small = "kv_rank: 8, nope_dim: 4, v_dim: 4";

/** Rules of latent attention. */
export const latent: readonly Rule[] = [
  rule({
    code: "M330",
    title: "latent attention needs kv_heads equal to heads",
    why: "Each head computes its keys and values from the latent, so that only the latent is small. DeepSeek's models do not share keys and values among heads in addition, and Megatron-LM refuses the combination.",
    level: "error",
    *check({ model: m }) {
      if (!m.mla || m.kv_heads === m.heads) return;
      yield {
        at: "model.kv_heads",
        related: ["model.mla"],
        found: `kv_heads ${m.kv_heads} of ${m.heads} heads, with mla`,
        fix: "leave kv_heads out",
        safe: { "model.kv_heads": undefined },
      };
    },
    bad: `model: {kv_heads: 2, mla: {rope_dim: 2, ${small}}}`,
  }),
  rule({
    code: "M331",
    title: "latent attention excludes qk_norm",
    why: "Queries and keys are projections of normalised latents; heads are not normalised again. With latent attention, Megatron-LM's qk_layernorm is the norm of the latents, model.mla.norm.",
    level: "error",
    *check({ model: m }) {
      if (!m.mla || m.qk_norm === "none") return;
      yield {
        at: "model.qk_norm",
        related: ["model.mla"],
        found: `qk_norm: ${m.qk_norm} with mla`,
        fix: "leave qk_norm out",
        tries: [{ "model.qk_norm": "none" }],
      };
    },
    bad: `model: {qk_norm: head, mla: {rope_dim: 2, ${small}}}`,
  }),
  rule({
    code: "M332",
    title: "mla.rope_dim is odd",
    why: "Rotary position embedding rotates pairs of channels.",
    level: "error",
    *check({ model: { mla } }) {
      if (!mla || mla.rope_dim % 2 === 0) return;
      yield {
        at: "model.mla.rope_dim",
        related: ["model.rope"],
        found: `rope_dim ${mla.rope_dim}`,
        fix: "make it even",
        tries: [{ "model.mla.rope_dim": mla.rope_dim + 1 }],
      };
    },
    bad: `model: {mla: {rope_dim: 3, ${small}}}`,
  }),
  rule({
    code: "M333",
    title: "head_dim is not mla.nope_dim + mla.rope_dim",
    why: "In latent attention these two give the width of a query or key head; another head_dim would be ignored.",
    level: "error",
    *check({ model: { mla, head_dim } }) {
      if (!mla || head_dim === mla.nope_dim + mla.rope_dim) return;
      yield {
        at: "model.head_dim",
        related: ["model.mla.nope_dim", "model.mla.rope_dim"],
        found: `head_dim ${head_dim}, with nope_dim ${mla.nope_dim} and rope_dim ${mla.rope_dim}`,
        fix: "leave head_dim out",
        safe: { "model.head_dim": undefined },
      };
    },
    bad: `model: {head_dim: 8, mla: {rope_dim: 2, ${small}}}`,
  }),
  rule({
    code: "M334",
    title: "latent attention excludes query, key and value biases",
    why: "Published models with latent attention project latents to queries, keys and values without biases.",
    level: "error",
    *check({ model: m }) {
      if (!m.mla || !m.qkv_bias) return;
      yield {
        at: "model.qkv_bias",
        related: ["model.mla"],
        found: "qkv_bias: true with mla",
        fix: "out_bias is allowed",
        tries: [{ "model.qkv_bias": false }],
      };
    },
    bad: `model: {qkv_bias: true, mla: {rope_dim: 2, ${small}}}`,
  }),
];
