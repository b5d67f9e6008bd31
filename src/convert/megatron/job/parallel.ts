/** The sections `parallel` and `cluster` of a job: degrees, stages and their layers, ranks and nodes. */
import { layoutText } from "../../../analysis/evenLayout.ts";
import type { MappedName } from "../arguments/spec.ts";
import type { Importing } from "./importing.ts";
import type { ModelSizes } from "./model.ts";
import { reducesInBf16 } from "./train.ts";

/** The number of ranks of a launch, and the words that determine it. */
export interface World {
  readonly ranks: number;
  readonly nodes?: number;
  readonly perNode?: number;
  readonly source: string;
}

/** Degrees that other sections derive values from. */
export interface Degrees {
  readonly tensor: number;
  readonly pipeline: number;
  readonly context: number;
  readonly expert: number;
  readonly expertTensor: number;
}

/** Reads the degrees. A launch without experts has no expert grid. */
export function degreesOf({ args }: Importing, hasExperts: boolean): Degrees {
  const tensor = args.number("tensor-model-parallel-size");
  return {
    tensor,
    pipeline: args.number("pipeline-model-parallel-size"),
    context: args.number("context-parallel-size"),
    expert: hasExperts ? args.number("expert-model-parallel-size") : 1,
    expertTensor: hasExperts ? (args.numberIfGiven("expert-tensor-parallel-size") ?? tensor) : 1,
  };
}

/** Returns the number of ranks whose multiples both grids can fill. */
export function smallestWorld({ tensor, pipeline, context, expert, expertTensor }: Degrees): number {
  const [dense, sparse] = [tensor * context, expert * expertTensor];
  const divisor = (a: number, b: number): number => (b === 0 ? a : divisor(b, a % b));
  return ((dense * sparse) / divisor(dense, sparse)) * pipeline;
}

/** Puts `parallel` and `cluster`. */
export function putParallel({ args, job }: Importing, world: World, sizes: ModelSizes, degrees: Degrees, hasExperts: boolean): void {
  const { tensor, pipeline, context, expert, expertTensor } = degrees;
  job.put("parallel.world", world.ranks, [], world.source);
  job.put("parallel.tensor", tensor, ["tensor-model-parallel-size"]);
  if (tensor > 1) job.put("parallel.sequence", args.has("sequence-parallel"), ["sequence-parallel"]);
  job.put("parallel.pipeline", pipeline, ["pipeline-model-parallel-size"]);
  putStages({ args, job }, sizes.layers, pipeline);
  if (hasExperts) {
    job.put("parallel.expert", expert, ["expert-model-parallel-size"]);
    const isGiven = args.has("expert-tensor-parallel-size");
    const remark = isGiven ? undefined : "Megatron takes the tensor degree";
    job.put("parallel.expert_tensor", expertTensor, isGiven ? ["expert-tensor-parallel-size"] : ["tensor-model-parallel-size"], remark);
  }
  job.put("parallel.context", context, ["context-parallel-size"]);
  if (context > 1) putContextMethod({ args, job });
  // the older name of muon with the distributed optimizer
  const isLayerwise = args.text("optimizer") === "dist_muon";
  const isDistributed = args.has("use-distributed-optimizer") || isLayerwise;
  job.put("parallel.distributed_optimizer", isDistributed, isLayerwise ? ["optimizer"] : ["use-distributed-optimizer"]);
  if (isLayerwise) job.decides("use-distributed-optimizer", "parallel.distributed_optimizer");
  const instances = args.number("num-distributed-optimizer-instances");
  job.put("parallel.optimizer_instances", instances, ["num-distributed-optimizer-instances"]);
  putOverlap({ args, job }, { data: world.ranks / (tensor * pipeline * context), isDistributed, expert, tensor });
  if (args.has("use-tp-pp-dp-mapping")) job.put("parallel.order", "tp-cp-ep-pp-dp", ["use-tp-pp-dp-mapping"]);
  if (world.nodes !== undefined) job.put("cluster.nodes", world.nodes, [], world.source);
  if (world.perNode !== undefined) job.put("cluster.gpus_per_node", world.perNode, [], world.source);
}

const MIB = 2 ** 20;
/** Returns the MiB of so many elements, as a job has them. */
const mebibytes = (elements: number, bytes: number): number => Math.max(1, Math.round((elements * bytes) / MIB));

/** Puts what runs beside computation. Megatron counts the size of a bucket in elements, in the type in which they are sent. */
function putOverlap(
  { args, job }: Importing,
  { data, isDistributed, expert, tensor }: { data: number; isDistributed: boolean; expert: number; tensor: number },
): void {
  const given = args.numberIfGiven("ddp-bucket-size");
  const elements = given ?? Math.max(40e6, 1e6 * data);
  const remark = `${elements / 1e6} million elements${given === undefined ? ", Megatron's default" : ""}`;
  if (args.has("overlap-grad-reduce") && data > 1)
    job.put(
      "parallel.gradient_bucket",
      mebibytes(elements, reducesInBf16({ args }) ? 2 : 4),
      ["overlap-grad-reduce", "ddp-bucket-size"],
      remark,
    );
  if (args.has("overlap-param-gather") && isDistributed && data > 1) {
    const bytes = args.has("bf16") || args.has("fp16") ? 2 : 4;
    job.put("parallel.parameter_bucket", mebibytes(elements, bytes), ["overlap-param-gather", "ddp-bucket-size"], remark);
    job.put("parallel.parameter_gather", "forward", ["overlap-param-gather"]);
  }
  if (args.has("tp-comm-overlap") && tensor > 1)
    job.put("parallel.tensor_overlap", 4, ["tp-comm-overlap"], "4 parts in forward: Transformer Engine's default");
  if (expert === 1) return;
  if (args.has("moe-shared-expert-overlap")) job.put("parallel.expert_overlap", "shared", ["moe-shared-expert-overlap"]);
  else if (args.has("overlap-moe-expert-parallel-comm"))
    job.put(
      "parallel.expert_overlap",
      "interleave",
      ["overlap-moe-expert-parallel-comm", "delay-wgrad-compute"],
      args.has("delay-wgrad-compute") ? "" : "gradients of weights run beside exchanges of rows as well",
    );
}

const methods: Readonly<Record<string, string>> = { p2p: "ring", all_gather: "all_gather" };

function putContextMethod({ args, job }: Importing): void {
  const given = [...new Set(args.textsIfGiven("cp-comm-type") ?? ["p2p"])];
  const [word = "p2p"] = given;
  const method = Object.hasOwn(methods, word) ? methods[word] : undefined;
  if (given.length === 1 && method !== undefined) job.put("parallel.context_method", method, ["cp-comm-type"]);
  else
    job.refuse(
      `--cp-comm-type ${given.join(" ")}`,
      "keys and values visit all ranks or are gathered, in all layers alike",
      "use p2p or all_gather",
    );
}

// -- stages

const COUNTS = ["decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"] as const;
const ACCOUNTS = ["account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"] as const;

function putStages({ args, job }: Importing, layers: number, stages: number): void {
  const layout = args.textIfGiven("pipeline-model-parallel-layout");
  const group = args.numberIfGiven("microbatch-group-size-per-virtual-pipeline-stage");
  if (group !== undefined && group !== stages)
    job.refuse(
      `--microbatch-group-size-per-virtual-pipeline-stage ${group}`,
      "a chunk runs as many microbatches in a row as there are stages",
      `leave it out, or give ${stages}`,
    );
  if (layout !== undefined) {
    const text = layout.replace(/[\s,'"]/g, "");
    const parts = partCount(text);
    job.put("parallel.layout", text, ["pipeline-model-parallel-layout"]);
    if (parts % stages !== 0)
      job.reject(
        `--pipeline-model-parallel-layout ${layout}`,
        `its ${parts} parts are no multiple of ${stages} stages`,
        "give each stage as many parts",
      );
    else job.put("parallel.virtual_pipeline", parts / stages, ["pipeline-model-parallel-layout"], `${parts} parts over ${stages} stages`);
    return;
  }
  const extra = ACCOUNTS.filter((name) => args.has(name)).length;
  const perChunk = args.numberIfGiven("num-layers-per-virtual-pipeline-stage");
  const chunks = args.numberIfGiven("num-virtual-stages-per-pipeline-rank") ?? (perChunk ? (layers + extra) / stages / perChunk : 1);
  const from: readonly MappedName[] = ["num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage"];
  if (!Number.isInteger(chunks)) {
    job.reject(
      `--num-layers-per-virtual-pipeline-stage ${perChunk}`,
      `${layers + extra} layers over ${stages} stages are no multiple of it`,
      "choose a divisor of the layers of a stage",
    );
    return;
  }
  const remark = perChunk === undefined ? undefined : `${layers + extra} layers / ${stages} stages / ${perChunk}`;
  job.put("parallel.virtual_pipeline", chunks, from, remark);
  const counts = unevenCounts({ args, job }, layers, stages, chunks);
  if (!counts) return;
  const depths = args.numberIfGiven("mtp-num-layers") ?? 0;
  job.put("parallel.layout", layoutText(counts, depths), [...COUNTS, ...ACCOUNTS]);
}

/** The layers of each part, part i on stage i mod stages; undefined where they are even. */
function unevenCounts({ args, job }: Importing, layers: number, stages: number, chunks: number): readonly number[] | undefined {
  const [first, last] = COUNTS.map((name) => args.numberIfGiven(name));
  const parts = stages * chunks;
  if (first === undefined && last === undefined) {
    const [embedding = 0, loss = 0] = ACCOUNTS.map((name) => (args.has(name) ? 1 : 0));
    if (embedding + loss === 0) return undefined;
    const each = (layers + embedding + loss) / parts;
    if (Number.isInteger(each))
      return Array.from({ length: parts }, (_, i) => each - (i === 0 ? embedding : 0) - (i === parts - 1 ? loss : 0));
    job.reject(
      "--account-for-… in the pipeline split",
      `${layers + embedding + loss} layers are no multiple of ${parts} parts`,
      "choose another number of stages",
    );
    return undefined;
  }
  const between = stages - (first === undefined ? 0 : 1) - (last === undefined ? 0 : 1);
  const rest = layers - (first ?? 0) - (last ?? 0);
  const each = between === 0 ? 0 : rest / between;
  const counts = Array.from({ length: parts }, (_, i) => {
    const stage = i % stages;
    return (stage === 0 ? (first ?? each) : stage === stages - 1 ? (last ?? each) : each) / chunks;
  });
  if (counts.every((count) => Number.isInteger(count) && count >= 0) && between > 0 === rest > 0) return counts;
  const given = COUNTS.flatMap((name) => args.given.get(name)?.shown ?? []).join(" ");
  job.reject(
    given,
    `the other ${rest} layers do not spread evenly over ${between} stages of ${chunks} chunks`,
    "choose other numbers of layers",
  );
  return undefined;
}

/** Returns the number of parts of a layout. */
export function partCount(text: string): number {
  const unrolled = text
    .replace(/\(([^()]*)\)\*(\d+)/g, (_, inner: string, times: string) => inner.repeat(Math.min(Number(times), 10_000)))
    .replace(/(.)\*(\d+)/g, (_, letter: string, times: string) => letter.repeat(Math.min(Number(times), 10_000)));
  return unrolled.split("|").length;
}
