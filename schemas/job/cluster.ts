/** The section cluster: hosts and devices. */
import { z } from "zod";
import { deviceNames } from "../devices.ts";
import { count } from "./numbers.ts";

/** cluster as written. */
export const ClusterText = z.strictObject({
  nodes: count.optional().describe("number of hosts; default: the smallest number with GPUs for all ranks"),
  gpus_per_node: count.default(8).describe("GPUs of one host, with fast links among them"),
  device: z.enum(deviceNames).default("h100-80gb").describe("the GPU; schemas/devices.ts has its memory, peaks and bandwidths"),
});

/** cluster with every default filled in. */
export const Cluster = ClusterText.required({ nodes: true });

/** Fills in defaults that depend on other keys. `world`: parallel.world. */
export function completeCluster(cluster: z.output<typeof ClusterText>, world: number): z.output<typeof Cluster> {
  return { ...cluster, nodes: cluster.nodes ?? Math.ceil(world / cluster.gpus_per_node) };
}
