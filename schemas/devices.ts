/**
 * The table of devices: what a job may name in cluster.device, and what compiler and reports know about it. Figures are those of NVIDIA's
 * data sheets for SXM parts, dense, without sparsity: "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", the columns
 * HGX B200 and GB200 of "NVIDIA Blackwell", "A10 Tensor Core GPU", "L40S", the white paper "NVIDIA Ada GPU Architecture" for the RTX 4090 (with
 * sums in f32), and AMD's "Instinct MI300X", for which there are estimates and no kernels. Data sheets print peaks of 16 and 8 bits with sparsity (half of them is dense), and NVLink in both directions.
 */
import type { Dtype } from "./dtypes.ts";

/** A row of the table of architectures. */
interface ArchRow {
  /** Of the largest part sold. */
  readonly multiprocessors: number;
  /** KiB of shared memory. */
  readonly sharedPerMultiprocessor: number;
  readonly sharedPerBlock: number;
  /** The most resident thread blocks. */
  readonly blocksPerMultiprocessor: number;
  /** Whether one reduction to memory adds four floats (PTX ISA: red.v4.f32, since sm_90). */
  readonly vectorReductions: boolean;
}
/** CUDA architectures, by "CUDA C++ Programming Guide", technical specifications per compute capability. */
export const cudaArchs = {
  sm_80: { multiprocessors: 108, sharedPerMultiprocessor: 164, sharedPerBlock: 163, blocksPerMultiprocessor: 32, vectorReductions: false },
  sm_86: { multiprocessors: 84, sharedPerMultiprocessor: 100, sharedPerBlock: 99, blocksPerMultiprocessor: 16, vectorReductions: false },
  sm_89: { multiprocessors: 142, sharedPerMultiprocessor: 100, sharedPerBlock: 99, blocksPerMultiprocessor: 24, vectorReductions: false },
  sm_90a: { multiprocessors: 132, sharedPerMultiprocessor: 228, sharedPerBlock: 227, blocksPerMultiprocessor: 32, vectorReductions: true },
  sm_100a: { multiprocessors: 148, sharedPerMultiprocessor: 228, sharedPerBlock: 227, blocksPerMultiprocessor: 32, vectorReductions: true },
} as const satisfies Record<string, ArchRow>;
/** The name of a CUDA architecture. */
export type Arch = keyof typeof cudaArchs;
/** The names of all CUDA architectures. */
export const archs = Object.keys(cudaArchs) as [Arch, ...Arch[]];

/** A device. Memory in bytes, bandwidths in bytes/s, peaks in FLOP/s. */
export interface DeviceRow {
  readonly memory: number;
  /** Streaming multiprocessors, or compute units. */
  readonly multiprocessors: number;
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
  multiprocessors: 108,
  peak: { f32: 19.5e12, bf16: 312e12, f16: 312e12, f8e4m3: null, i32: null },
  links: { host: 300e9, network: 25e9 },
  target: "cuda:sm_80",
} as const;
const hopper = {
  multiprocessors: 132,
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
    ...{ memory: 192e9, multiprocessors: 148, bandwidth: 7.7e12 },
    peak: { f32: 75e12, bf16: 2250e12, f16: 2250e12, f8e4m3: 4500e12, i32: null },
    ...{ links: { host: 900e9, network: 50e9 }, target: "cuda:sm_100a" },
  },
  // A tray has four, and the 72 of a rack are one NVLink domain: cluster.gpus_per_node says how many of them a job sees as a node.
  "gb200-186gb": {
    ...{ memory: 186e9, multiprocessors: 148, bandwidth: 8e12 },
    peak: { f32: 80e12, bf16: 2500e12, f16: 2500e12, f8e4m3: 5000e12, i32: null },
    ...{ links: { host: 900e9, network: 50e9 }, target: "cuda:sm_100a" },
  },
  // PCIe 4.0; one adapter of 100G a GPU for A10 and RTX 4090, of 200G for L40S, is an assumption: hosts differ.
  "a10-24gb": {
    ...{ memory: 24 * 2 ** 30, multiprocessors: 72, bandwidth: 600e9 },
    peak: { f32: 31.2e12, bf16: 125e12, f16: 125e12, f8e4m3: null, i32: null },
    ...{ links: { host: 32e9, network: 12.5e9 }, target: "cuda:sm_86" },
  },
  "l40s-48gb": {
    ...{ memory: 48 * 2 ** 30, multiprocessors: 142, bandwidth: 864e9 },
    peak: { f32: 91.6e12, bf16: 362e12, f16: 362e12, f8e4m3: 733e12, i32: null },
    ...{ links: { host: 32e9, network: 25e9 }, target: "cuda:sm_89" },
  },
  "rtx4090-24gb": {
    ...{ memory: 24 * 2 ** 30, multiprocessors: 128, bandwidth: 1008e9 },
    peak: { f32: 82.6e12, bf16: 165.2e12, f16: 165.2e12, f8e4m3: 330.3e12, i32: null },
    ...{ links: { host: 32e9, network: 12.5e9 }, target: "cuda:sm_89" },
  },
  "mi300x-192gb": {
    ...{ memory: 192e9, multiprocessors: 304, bandwidth: 5.3e12 },
    peak: { f32: 163.4e12, bf16: 1307.4e12, f16: 1307.4e12, f8e4m3: 2614.9e12, i32: null },
    ...{ links: { host: 448e9, network: 50e9 }, target: "cpu" },
  },
  // One core of the reference backend, which computes in f32. The memory is the limit of Node for all ranks of a small job.
  cpu: {
    ...{ memory: 4 * 2 ** 30, multiprocessors: 1, bandwidth: 1e10 },
    ...{ peak: { f32: 2e9, bf16: 2e9, f16: 2e9, f8e4m3: 2e9, i32: null }, links: null, target: "cpu" },
  },
} as const satisfies Record<string, DeviceRow>;
/** The name of a device. */
export type Device = keyof typeof devices;
/** The names of all devices, for schemas. */
export const deviceNames = Object.keys(devices) as [Device, ...Device[]];

/** Returns the row of a device. */
export const deviceOf = (name: Device): DeviceRow => devices[name];
