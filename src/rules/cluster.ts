/** Rules C: the cluster, and groups that span nodes. memory.ts has the rule of device memory (C510). */
import type { Job } from "../../schemas/job.ts";
import { needsPrograms } from "./memory.ts";
import { stageRanks } from "./mesh.ts";
import { divisorsNear, downTo, rule } from "./rule.ts";

/** Whether blocks of `span` neighbouring ranks cross from one node to the next. */
const crosses = ({ parallel, cluster }: Job, span: number): boolean =>
  parallel.world > cluster.gpus_per_node && cluster.gpus_per_node % span !== 0;

/** Rules of the cluster. */
export const cluster = [
  rule({
    code: "C501",
    title: "the cluster has fewer GPUs than ranks",
    why: "One rank is one process on one GPU.",
    level: "error",
    *check({ parallel: p, cluster: c }) {
      const gpus = c.nodes * c.gpus_per_node;
      if (p.world <= gpus) return;
      yield {
        at: "cluster.nodes",
        related: ["cluster.gpus_per_node", "parallel.world"],
        found: `world ${p.world} on ${c.nodes} node${c.nodes > 1 ? "s" : ""} x ${c.gpus_per_node} GPUs = ${gpus}`,
        fix: "more nodes, or a smaller world",
        tries: [{ "cluster.nodes": Math.ceil(p.world / c.gpus_per_node) }, { "parallel.world": gpus }],
      };
    },
    bad: "parallel: {world: 16}\ncluster: {nodes: 1}",
  }),
  rule({
    code: "C502",
    title: "the last node is only partly used",
    why: "Ranks fill nodes in order. On a partly filled node, groups have another layout than on all other nodes.",
    level: "warning",
    *check({ parallel: p, cluster: c }) {
      if (p.world <= c.gpus_per_node || p.world % c.gpus_per_node === 0) return;
      yield {
        at: "parallel.world",
        related: ["cluster.gpus_per_node"],
        found: `${p.world} ranks on nodes of ${c.gpus_per_node}: the last one has ${p.world % c.gpus_per_node}`,
        fix: "fill whole nodes",
        tries: [
          { "parallel.world": downTo(p.world, c.gpus_per_node) },
          ...divisorsNear(p.world, c.gpus_per_node)
            .filter((g) => g <= c.gpus_per_node)
            .map((g) => ({ "cluster.gpus_per_node": g, "cluster.nodes": p.world / g })),
        ],
      };
    },
    bad: "parallel: {world: 12}",
  }),
  rule({
    code: "C503",
    title: "tensor groups cross nodes",
    why: "Every layer waits for collectives over the tensor ranks. Between nodes a GPU has about a tenth of the bandwidth that it has within a node.",
    level: "warning",
    *check(job) {
      const { tensor } = job.parallel;
      const { gpus_per_node: gpus } = job.cluster;
      if (!stageRanks(job) || !crosses(job, tensor)) return;
      yield {
        at: "parallel.tensor",
        related: ["cluster.gpus_per_node"],
        found: `tensor ${tensor} on nodes of ${gpus} GPUs`,
        fix: `keep tensor within a node: a divisor of ${gpus}; pipeline may cross nodes`,
        tries: divisorsNear(gpus, tensor).flatMap((t) => [
          ...(tensor % t ? [] : [{ "parallel.tensor": t, "parallel.pipeline": (job.parallel.pipeline * tensor) / t }]),
          { "parallel.tensor": t },
        ]),
      };
    },
    bad: "model: {heads: 16, kv_heads: 16, head_dim: 2}\nparallel: {world: 16, tensor: 16}",
  }),
  rule({
    code: "C504",
    title: "expert groups cross nodes",
    why: "Dispatch and combine move every routed row twice in each layer, forward and backward; with dispatch: once_per_node, a row for each token and node. Between nodes a GPU has about a tenth of the bandwidth that it has within a node.",
    level: "warning",
    *check(job) {
      const { expert, expert_tensor: etp } = job.parallel;
      const { gpus_per_node: gpus } = job.cluster;
      if (!job.model.moe || expert * etp === 1 || !stageRanks(job) || !crosses(job, expert * etp)) return;
      yield {
        at: expert > 1 ? "parallel.expert" : "parallel.expert_tensor",
        related: ["cluster.gpus_per_node"],
        found: `expert ${expert}${etp > 1 ? ` x expert_tensor ${etp}` : ""} = ${expert * etp} neighbouring ranks on nodes of ${gpus} GPUs`,
        fix: `expert x expert_tensor should divide ${gpus}; if the experts of a node do not fit its memory, write allow: [C504]${job.model.moe.dispatch === "once_per_node" ? "" : ", and dispatch: once_per_node sends a token once to each node"}`,
        // fewer expert ranks hold more experts each: a fix is proposed only if the job certainly fits, or C510 would undo it
        tries: [
          ...divisorsNear(gpus, expert).map((e) => ({ "parallel.expert": e, "parallel.expert_tensor": 1 })),
          ...divisorsNear(gpus, etp).map((e) => ({ "parallel.expert": 1, "parallel.expert_tensor": e })),
        ].filter(
          (set) =>
            !needsPrograms({
              ...job,
              parallel: { ...job.parallel, expert: set["parallel.expert"], expert_tensor: set["parallel.expert_tensor"] },
            }),
        ),
      };
    },
    bad: "model: {moe: {experts: 16, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 16, expert: 16}",
  }),
  rule({
    code: "C505",
    title: "whole nodes stay idle",
    why: "Unused nodes cost money and are not available to other jobs.",
    level: "warning",
    *check({ parallel: p, cluster: c }) {
      const used = Math.ceil(p.world / c.gpus_per_node);
      if (c.nodes <= used) return;
      yield {
        at: "cluster.nodes",
        related: ["parallel.world"],
        found: `${c.nodes} nodes; ${p.world} rank${p.world > 1 ? "s" : ""} fill ${used}`,
        fix: "use fewer nodes, or raise world",
        tries: [{ "cluster.nodes": used }],
      };
    },
    bad: "cluster: {nodes: 2}",
  }),
] as const;
