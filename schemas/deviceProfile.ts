/**
 * The schema of device profiles: what kernels and links of a device reach with one software stack. The files of schemas/devices/ have it, and
 * those that `rankc calibrate` writes. Peaks and bandwidths on paper stand in schemas/devices.ts; a profile may replace them for a device of its own.
 */
import { z } from "zod";
import { deviceNames } from "./devices.ts";
import { CollectiveKind } from "./plan.ts";

const positive = z.number().positive();
const share = z.number().positive().max(2);
const hiddenShare = z.number().min(0).max(1).default(0);
const atLeastZero = z.number().min(0);

/** Families of kernels: those of one family have one law. */
export const kernelFamilies = [
  "product",
  "product_wgrad",
  "grouped",
  "grouped_wgrad",
  "product_f32",
  "attention",
  "attention_grad",
  "streaming",
  "rows",
  "optimizer",
] as const;
/** The name of a family. */
export type KernelFamily = (typeof kernelFamilies)[number];

/**
 * The law of a family. Seconds = overhead + (arithmetic^power + memory^power)^(1/power), where memory = bytes / (bandwidth_share · bandwidth),
 * and arithmetic = flops / (peak_share · peak) · (1 + depth_half/depth) / fill^fill_power; a power above 1 says how far the two overlap.
 */
const KernelLaw = z.strictObject({
  peak_share: share.describe("of the peak that arithmetic reaches on large shapes"),
  bandwidth_share: share.describe("of the memory's bandwidth"),
  overhead_us: atLeastZero.default(0).describe("of each kernel, beside arithmetic and memory"),
  depth_half: atLeastZero.default(0).describe("the depth at which a product reaches half of its rate; of attention: so many tokens"),
  fill_power: atLeastZero.default(0).describe("how a last wave of tiles that is not full counts: 1 in proportion, 0 not at all"),
  power: z.number().min(1).max(16).default(2),
});
/** A value of the schema `KernelLaw`. */
export type KernelLaw = z.infer<typeof KernelLaw>;

/** A measured kernel: op and sizes as `kernelShape` names them (m, n, k, experts; or tokens, keys, heads, group, width, value_width; or bytes). */
const MeasuredKernel = z.strictObject({
  op: z.string().min(1),
  sizes: z.record(z.string(), positive),
  us: positive,
});
/** A value of the schema `MeasuredKernel`. */
export type MeasuredKernel = z.infer<typeof MeasuredKernel>;

/** Rates of a collective among ranks of one host: bus bandwidth as nccl-tests defines it. */
const CollectiveRates = z.strictObject({
  ranks: z.int().min(2),
  latency_us: positive.describe("of 512 bytes"),
  busbw: z
    .array(z.tuple([positive, positive]))
    .min(1)
    .describe("[bytes of the largest buffer, GB/s], ascending bytes"),
});
/** A value of the schema `CollectiveRates`. */
export type CollectiveRates = z.infer<typeof CollectiveRates>;

const HostLinks = z.strictObject({
  bandwidth: positive.describe("bytes/s of one GPU to the others of its host, one way"),
  efficiency: share.describe("of the bandwidth, that large collectives without a table and transfers reach"),
  latency_us: positive.describe("of a collective, beside its steps"),
  step_us: positive.describe("of each step from rank to rank"),
  tables: z.partialRecord(CollectiveKind, z.array(CollectiveRates).min(1)).default({}),
});
/** A value of the schema `HostLinks`. */
export type HostLinks = z.infer<typeof HostLinks>;

const NetworkLinks = z.strictObject({
  bandwidth: positive.describe("bytes/s of the adapter of one GPU, one way"),
  efficiency: share.describe("of the bandwidth, in rings and transfers"),
  latency_us: positive,
  step_us: positive.describe("of each step from node to node"),
  exchange_efficiency: z
    .array(z.tuple([z.int().min(2), share]))
    .min(1)
    .describe("[nodes, share of the bandwidth that an all-to-all over so many nodes reaches], ascending nodes"),
  rows_efficiency: share
    .default(0.87)
    .describe(
      "share of the bandwidth where software sends each row once to a node: 58 GB/s over 4 nodes, of which a quarter stays (DeepEP #130)",
    ),
  peer_us: atLeastZero.describe("of each peer in an all-to-all"),
  half_bytes: atLeastZero.describe("bytes to one peer with which an all-to-all has half of its rate"),
});
/** A value of the schema `NetworkLinks`. */
export type NetworkLinks = z.infer<typeof NetworkLinks>;

/** The profile of a device with one software stack. */
export const DeviceProfile = z.strictObject({
  $schema: z.string().optional(),
  format_version: z.literal("1.0"),
  name: z.string().regex(/^[A-Za-z0-9_.-]{1,80}$/),
  device: z
    .string()
    .min(1)
    .describe(`a device of schemas/devices.ts (${deviceNames.join(", ")}), or one of your own with \`hardware\``),
  stack: z.string().min(1).describe("the software whose kernels and collectives were measured or fitted"),
  sources: z
    .array(z.strictObject({ what: z.string().min(1), from: z.string().min(1), date: z.iso.date().optional() }))
    .min(1)
    .describe("where each figure comes from"),
  hardware: z
    .strictObject({
      memory: positive,
      bandwidth: positive,
      multiprocessors: z.int().min(1),
      peak: z.strictObject({ f32: positive, bf16: positive, f8e4m3: positive.optional() }),
    })
    .optional()
    .describe("replaces the row of the device"),
  kernels: z.strictObject({
    launch_us: atLeastZero.describe("between two kernels of a graph"),
    host_us: atLeastZero.describe("of the host for each kernel, where launches are not captured in a graph; 0: they are"),
    host_ahead_us: atLeastZero
      .optional()
      .describe("the same where the host waits for no count of rows, so that it prepares launches ahead; default: host_us"),
    event_us: atLeastZero.default(0).describe("of each instruction in a step whose instructions are timed: the events around it"),
    clock: share.describe("arithmetic runs at this share of the rates of the laws and of the table: power lowers the clock in a long step"),
    power: z
      .strictObject({ limit: positive, arithmetic: atLeastZero, memory: atLeastZero })
      .optional()
      .describe(
        "what the power limit leaves of the clock, beside `clock`: limit - arithmetic · (FLOP/s of the kernels of a step / peak) - memory · (bytes/s / bandwidth), at most 1. `measured` has times at clock 1",
      ),
    families: z.record(z.enum(kernelFamilies), KernelLaw),
    measured: z.array(MeasuredKernel),
  }),
  links: z.strictObject({ host: HostLinks, network: NetworkLinks }),
  overlap: z.strictObject({
    slowdown: z.number().min(0).max(0.9).describe("share of its rate that a kernel loses while communication runs"),
    collective_factor: z
      .number()
      .min(1)
      .default(1)
      .describe("asynchronous collectives take so many times as long as alone: kernels beside them use the memory too"),
    limits: z
      .array(
        z.strictObject({
          multiprocessors: z.int().min(1),
          slowdown: z.number().min(0).max(0.9),
          collective_factor: z.number().min(1),
        }),
      )
      .default([])
      .describe(
        "slowdown and collective_factor where parallel.communication_sms limits the collectives of a stream, by ascending numbers; between them interpolated over the logarithm, beyond the last as without a limit",
      ),
    hidden: z
      .strictObject({ experts: hiddenShare, data: hiddenShare, tensor: hiddenShare })
      .prefault({})
      .describe(
        "where the stack runs dispatch and combine, the reductions and gathers of the optimizer, or those of tensor parallelism, beside kernels, and a plan does not say so: the share of them that this hides",
      ),
    prefetches_transfers: z.boolean().describe("whether a message between stages travels before its receiver waits for it"),
  }),
});
/** A value of the schema `DeviceProfile`. */
export type DeviceProfile = z.infer<typeof DeviceProfile>;
