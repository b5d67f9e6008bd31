/** The job keys behind instructions and buffers, and the changes of a job that remove them. */
import { transportOps } from "../../schemas/effects.ts";
import type { Job } from "../../schemas/job.ts";
import type { Buffer, Collective, Compute, Instruction } from "../../schemas/plan.ts";
import type { Block } from "../../schemas/program.ts";
import { isComputedAgain, moduleOf } from "../analysis/idParts.ts";
import { runsInPairs } from "../passes/pipelineStages.ts";

/** Changes of a job, and their price. */
export interface Cure {
  readonly set: Readonly<Record<string, unknown>>;
  readonly effect: string;
}

interface KeyReason {
  readonly path: string;
  readonly because: string;
}

/** Returns the job key that an instruction comes from. */
export function keyOfCompute({ id, op }: Pick<Compute, "id" | "op">, phase: Block["kind"]): KeyReason {
  const gradient = phase === "backward" || phase === "weights" ? "the gradients of " : "";
  if (phase === "step") return { path: "train.optimizer.type", because: "the optimizer step updates parameters and reports metrics" };
  if (isComputedAgain(id))
    return { path: "train.recompute", because: "the value is computed again in backward, so that it needs no memory between the passes" };
  if (transportOps.includes(op))
    return { path: "parallel.expert", because: "rows of experts move between ranks: they are put in order before and after" };
  const of = (path: string, what: string): KeyReason => ({ path, because: `${gradient}${what}` });
  const module = moduleOf(id);
  switch (module) {
    case "mtp":
      return of("model.mtp", "multi-token prediction");
    case "shared":
      return of("model.moe.shared", "the shared expert of the layer");
    case "moe":
      return of("model.moe", "the experts of the layer and their router");
    case "mlp":
      return of("model.ffn", "the feed-forward block of the layer");
    case "attn":
      return of(op === "rope" ? "model.rope" : "model.heads", "the attention of the layer");
    case "vocab":
      return of("model.vocab", "the embedding, the logits and the loss");
    case undefined:
      return of("model.layers", "the model");
    default:
      return module satisfies never;
  }
}

/** Returns the job key that decides about a buffer. */
export function keyOfBuffer(job: Job, { kind, within, id }: Buffer, copies: number): KeyReason {
  if (within !== undefined)
    return { path: "parallel", because: `it shares the first bytes of ${within}, which is dead once it is written: it needs no memory` };
  switch (kind) {
    case "parameter":
      return { path: "train.precision", because: "a parameter lives for the whole run, in the type of train.precision" };
    case "gradient":
      return { path: "train.precision", because: "gradients add up over the microbatches of a step" };
    case "optimizer":
      return job.parallel.distributed_optimizer
        ? { path: "parallel.distributed_optimizer", because: "state of the optimizer, of which each data rank holds a shard" }
        : { path: "parallel.distributed_optimizer", because: "state of the optimizer, of which each data rank holds a copy" };
    case "activation":
      if (copies > 1 && runsInPairs(job) && job.parallel.pipeline === 1)
        return {
          path: "parallel.expert_overlap",
          because: `backward reads it, and alternates with the forward of the next microbatch: ${copies} are in flight`,
        };
      return {
        path: copies > 1 ? "parallel.pipeline" : "train.recompute.mode",
        because:
          copies > 1
            ? `backward reads it, and ${copies} microbatches are in flight at the stage at most`
            : "forward writes it and backward reads it, so it stays between the passes",
      };
    case "workspace":
      return {
        path: isComputedAgain(id) ? "train.recompute" : "train.micro_batch",
        because: "it lives within one block; its bytes are used again as soon as its last reader is done",
      };
    default:
      return kind satisfies never;
  }
}

const change = (path: string, value: unknown, effect: string): Cure => ({ set: { [path]: value }, effect });

/** Returns the changes that remove an instruction or a buffer, the most direct first; none for what every job has. */
export function curesOf(job: Job, of: Instruction | { readonly path: string }): Cure[] {
  const path = "path" in of ? of.path : of.kind === "compute" ? "" : of.why.path;
  const { parallel: p } = job;
  const turned = "kind" in of && of.kind === "collective" ? instead(job, of) : [];
  switch (path) {
    case "parallel.tensor":
      return [...turned, change(path, 1, "no tensor parallelism: a rank holds whole weights, and more data ranks share the batch")];
    case "parallel.sequence":
      return turned;
    case "parallel.expert":
      return [change(path, 1, "no expert parallelism: a rank holds all experts of its layers, and no row leaves it")];
    case "parallel.expert_tensor":
      return [change(path, 1, "whole experts on a rank, in place of shards: more memory, fewer bytes")];
    case "parallel.context":
      return [change(path, 1, "no context parallelism: a rank has whole sequences, and their activations")];
    case "parallel.pipeline":
      return p.pipeline > 1 ? [change(path, 1, "no pipeline: a rank holds all layers")] : [];
    case "parallel.expert_overlap":
      return [change(path, "shared", "no pairs: one microbatch less is in memory, and less runs beside the exchanges of rows")];
    case "parallel.distributed_optimizer":
      return p.distributed_optimizer
        ? [change(path, false, "each rank updates all its parameters, and holds the whole state of the optimizer")]
        : [];
    case "parallel.data":
      return turned;
    case "model.mtp":
      return [change(path, null, "no multi-token prediction: another model")];
    case "train.recompute":
    case "train.recompute.mode":
      return job.train.recompute.mode === "none"
        ? [change("train.recompute.mode", "full", "layers are computed again in backward: less memory, about a third more flops")]
        : [change("train.recompute.mode", "none", "values stay in memory, and nothing is computed twice")];
    default:
      return [];
  }
}

/** Changes that give another collective in its place. */
function instead({ parallel: p }: Job, { how, why }: Collective): Cure[] {
  if (why.path === "parallel.data" || why.because === "each rank saw other tokens")
    return p.distributed_optimizer && how === "reduce_scatter"
      ? [
          change(
            "parallel.distributed_optimizer",
            false,
            "an all-reduce of the gradient in its place, and no all-gather of the parameter after the update",
          ),
        ]
      : [];
  if (p.sequence && (how === "all_gather" || how === "reduce_scatter"))
    return [change("parallel.sequence", false, "all-reduces in place of all-gathers and reduce-scatters: as many bytes, more activations")];
  return [];
}
