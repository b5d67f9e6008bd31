/**
 * The table of devices: what a job may name in cluster.device, and what compiler and reports know about it. Figures are those of NVIDIA's
 * data sheets for SXM parts, dense, without sparsity: "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", and the column
 * HGX B200 of "NVIDIA Blackwell". Data sheets print peaks of 16 and 8 bits with sparsity (half of them is dense), and NVLink in both directions.
 */
import type { Dtype } from "./dtypes.ts";

/** CUDA architectures: multiprocessors of the largest part sold, and KiB of shared memory per multiprocessor and per thread block. */
export const cudaArchs = {
  sm_80: { multiprocessors: 108, sharedPerMultiprocessor: 164, sharedPerBlock: 163 },
  sm_90a: { multiprocessors: 132, sharedPerMultiprocessor: 228, sharedPerBlock: 227 },
  sm_100a: { multiprocessors: 148, sharedPerMultiprocessor: 228, sharedPerBlock: 227 },
} as const satisfies Record<string, { multiprocessors: number; sharedPerMultiprocessor: number; sharedPerBlock: number }>;
/** The name of a CUDA architecture. */
export type Arch = keyof typeof cudaArchs;
/** The names of all CUDA architectures. */
export const archs = Object.keys(cudaArchs) as [Arch, ...Arch[]];

/** A device. Memory in bytes, bandwidths in bytes/s, peaks in FLOP/s. */
export interface DeviceRow {
  readonly memory: number;
  /** Of the device's memory. */
  readonly bandwidth: number;
  /** Of arithmetic on operands of a type: on matrix units for 16 and 8 bits, on ordinary ones for f32. Null: the device has none, or plans do no arithmetic on it. */
  readonly peak: Readonly<Record<Dtype, number | null>>;
  /** From one GPU to others of its host, one way; and to other hosts, with one adapter per GPU. Null: one process has all ranks. */
  readonly links: { readonly host: number; readonly network: number } | null;
  /** The default target, whose kernels the memory rule counts. */
  readonly target: `cuda:${Arch}` | "cpu";
}

const a100 = {
  peak: { f32: 19.5e12, bf16: 312e12, f16: 312e12, f8e4m3: null, i32: null },
  links: { host: 300e9, network: 25e9 },
  target: "cuda:sm_80",
} as const;
const hopper = {
  peak: { f32: 67e12, bf16: 989e12, f16: 989e12, f8e4m3: 1979e12, i32: null },
  links: { host: 450e9, network: 50e9 },
  target: "cuda:sm_90a",
} as const;

/** All devices by name. */
export const devices = {
  "a100-40gb": { memory: 40 * 2 ** 30, bandwidth: 1.555e12, ...a100 },
  "a100-80gb": { memory: 80 * 2 ** 30, bandwidth: 2.039e12, ...a100 },
  "h100-80gb": { memory: 80 * 2 ** 30, bandwidth: 3.35e12, ...hopper },
  "h200-141gb": { memory: 141e9, bandwidth: 4.8e12, ...hopper },
  // The data sheet prints 180 GB, in units of 2^30 bytes (179 are usable, about 192e9 bytes), and 7.7 TB/s; earlier ones printed 192 GB and 8 TB/s.
  "b200-192gb": {
    ...{ memory: 192e9, bandwidth: 7.7e12 },
    peak: { f32: 75e12, bf16: 2250e12, f16: 2250e12, f8e4m3: 4500e12, i32: null },
    ...{ links: { host: 900e9, network: 50e9 }, target: "cuda:sm_100a" },
  },
  // One core of the reference backend, which computes in f32. The memory is the limit of Node for all ranks of a small job.
  cpu: {
    ...{ memory: 4 * 2 ** 30, bandwidth: 1e10 },
    ...{ peak: { f32: 2e9, bf16: 2e9, f16: 2e9, f8e4m3: 2e9, i32: null }, links: null, target: "cpu" },
  },
} as const satisfies Record<string, DeviceRow>;
/** The name of a device. */
export type Device = keyof typeof devices;
/** The names of all devices, for schemas. */
export const deviceNames = Object.keys(devices) as [Device, ...Device[]];

/** Returns the row of a device. */
export const deviceOf = (name: Device): DeviceRow => devices[name];
