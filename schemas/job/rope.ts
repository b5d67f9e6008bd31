/** The section model.rope: rotary position embedding. */
import { z } from "zod";
import { count, real } from "./numbers.ts";

const RopeScalingText = z.strictObject({
  type: z
    .enum(["linear", "llama3", "yarn"])
    .describe(
      "which wavelengths are stretched. linear: all; llama3, yarn: the long ones, by the number of rotations within original_seq tokens",
    ),
  factor: real.describe("factor by which wavelengths are stretched: the ratio of the new sequence length to the original one"),
  original_seq: count.optional().describe("llama3, yarn: sequence length in tokens before stretching; default: model.seq"),
  low_freq: real
    .default(1)
    .describe("llama3: a wavelength with at most this many rotations within original_seq is stretched by the whole factor"),
  high_freq: real.default(4).describe("llama3: a wavelength with at least this many rotations within original_seq is not stretched"),
  beta_fast: real.default(32).describe("yarn: a wavelength with at least this many rotations within original_seq is not stretched"),
  beta_slow: real
    .default(1)
    .describe("yarn: a wavelength with at most this many rotations within original_seq is stretched by the whole factor"),
  mscale: real.nullable().default(null).describe("yarn: coefficient in the numerator of the default attention_factor"),
  mscale_all_dim: real
    .nullable()
    .default(null)
    .describe(
      "yarn: coefficient in the denominator of the default attention_factor; with mla, attention scores are also multiplied by (0.1 x mscale_all_dim x ln factor + 1) squared",
    ),
  attention_factor: real
    .nullable()
    .default(null)
    .describe(
      "yarn: factor on rotated queries and keys; null = 0.1 x ln factor + 1, or with mscale and mscale_all_dim (0.1 x mscale x ln factor + 1) / (0.1 x mscale_all_dim x ln factor + 1)",
    ),
});

/** model.rope as written. */
export const RopeText = z.strictObject({
  theta: real.default(1e4).describe("base of the wavelengths of the rotary position embedding"),
  fraction: real
    .default(1)
    .describe(
      "share of the channels of a head that are rotated, the first ones (rotary_percent of Megatron, partial_rotary_factor of Hugging Face)",
    ),
  interleaved: z
    .boolean()
    .default(false)
    .describe("which channels form a rotated pair. true: neighbours (DeepSeek); false: one of each half of the head (most other models)"),
  scaling: RopeScalingText.nullable().default(null).describe("stretching of wavelengths for longer sequences; null = none"),
});

/** model.rope with every default filled in. */
export const Rope = RopeText.extend({ scaling: RopeScalingText.required({ original_seq: true }).nullable() });

/** Fills in defaults that depend on other keys. `seq`: model.seq. */
export function completeRope(rope: z.output<typeof RopeText>, seq: number): z.output<typeof Rope> {
  const { scaling } = rope;
  return { ...rope, scaling: scaling && { ...scaling, original_seq: scaling.original_seq ?? seq } };
}
