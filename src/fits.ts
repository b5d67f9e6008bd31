/** Whether a compiled plan fits its device: the one finding that needs the whole plan, for the peak is known only then. */
import { devices } from "../schemas/job.ts";
import type { Plan } from "../schemas/plan.ts";
import type { Finding } from "./diagnostic.ts";
import type { Source } from "./source.ts";
import { bytesText } from "./units.ts";

export const fitRule = {
  code: "C510",
  level: "warning",
  title: "the plan does not fit the device",
  why: "The peak is exact: every buffer has its place. A run on such a device would be refused before its first step.",
  bad: "model: {hidden: 65536, heads: 512, kv_heads: 512}",
} as const;

export function fitFindings({ job, memory, mesh }: Plan, source: Source): Finding[] {
  const { device } = job.cluster;
  const limit = devices[device].memory;
  // on the CPU one process holds all ranks
  const needs = device === "cpu" ? memory.map((m) => m.peak * mesh.per_stage) : memory.map((m) => m.peak);
  const worst = device === "cpu" ? needs.reduce((sum, n) => sum + n, 0) : Math.max(...needs);
  if (worst <= limit) return [];
  const m = memory[needs.indexOf(Math.max(...needs))]!;
  const kinds = { parameters: m.parameter, gradients: m.gradient, optimizer: m.optimizer, workspace: m.workspace };
  const parts = Object.entries({ ...kinds, activations: m.peak - Object.values(kinds).reduce((sum, n) => sum + n, 0) });
  const largest = parts.sort((a, b) => b[1] - a[1]).map(([name, bytes]) => `${name} ${bytesText(bytes)}`);
  const { code, level, title, why } = fitRule;
  const who = device === "cpu" ? "all ranks together need" : `a rank of stage ${m.stage} needs`;
  const at = source.at("cluster.device");
  return [
    {
      code,
      level,
      title,
      why,
      path: "cluster.device",
      found: `${who} ${bytesText(worst)} (${largest.join(", ")}), ${device} has ${bytesText(limit)}`,
      fix: fixFor(job),
      ...(at && { at }),
    },
  ];
}

function fixFor({ parallel, model, train }: Plan["job"]): string {
  const ways = [
    ...(parallel.distributed_optimizer || parallel.data === 1 ? [] : ["set parallel.distributed_optimizer: true"]),
    ...(parallel.tensor > 1 && !parallel.sequence ? ["set parallel.sequence: true"] : []),
    ...(train.micro_batch > 1 ? ["lower train.micro_batch"] : []),
    ...(model.moe && parallel.expert < model.moe.experts ? ["raise parallel.expert"] : []),
    "raise parallel.pipeline or parallel.tensor, with world",
    "or name a device with more memory",
  ];
  return ways.join(", ");
}
