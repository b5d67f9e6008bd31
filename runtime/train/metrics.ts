/** Reads the metrics of a step from the device, once, after the step. */

import type { Buffer, MetricName, Plan, Program } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import type { HostData, LocalRanks } from "../backend.ts";

/** Sums over the stages; a metric that no stage has is missing. */
export interface StepNumbers {
  readonly loss: number;
  /** The sum of the balancing losses, without the z loss. */
  readonly aux_loss?: number;
  readonly z_loss?: number;
  readonly mtp_loss?: number;
  /** The parts of mtp_loss of each depth, if there are several. */
  readonly mtp_losses?: readonly number[];
  /** Rows dropped because of a capacity, summed over layers. */
  readonly dropped_rows?: number;
  readonly router_entropy?: number;
  readonly grad_norm: number;
  /** Of a detailed step: the norm of all weights after it. */
  readonly parameter_norm?: number;
  /** Tokens of the busiest expert over the mean of its layer; the maximum over layers. */
  readonly expert_load?: number;
  /** Of a detailed step: tokens of each expert by layer; the range of expert biases. */
  readonly expert_loads?: readonly (readonly number[])[];
  readonly expert_bias?: readonly [number, number];
}

const summed = ["loss", "aux_loss", "z_loss", "mtp_loss", "dropped_rows", "router_entropy"] as const;

/** The numbers of one stage. Stages are combined by sums, so a number that is not summed has a place of its own for each stage. */
interface StageNumbers {
  norm: number;
  /** The sum of the squares of all weights; of the first stage only, because all stages have the same. */
  squares: number;
  readonly sums: Map<MetricName, number>;
  largestLoad: number;
  /** Losses by depth; 0 where another stage has them. */
  depths: readonly number[];
  /** [layers with experts, experts], the rows of other stages are 0. */
  expertTable: readonly number[];
  bias: readonly [number, number];
}

/**
 * Issues the reads of the metrics of stages whose first rank is a local rank. Returns a function that awaits them, and combines them with
 * those of other processes. `detailed`: also the table of expert loads, and the range of expert biases.
 */
export function issueReads(
  plan: Plan,
  { ranks, rankDevice, combine = async (values) => [...values] }: Pick<LocalRanks, "ranks" | "rankDevice" | "combine">,
  bufferOf: (rank: number, id: string) => Buffer,
  detailed = false,
): () => Promise<StepNumbers> {
  const { programs, mesh } = plan;
  const sizes = sizesIn(programs);
  const stages = Promise.all(
    programs.map((program) => {
      const rank = rankAt(mesh, program.stage, 0);
      if (!ranks.includes(rank)) return emptyStage(sizes.depths);
      return readStage(program, (id) => rankDevice(rank).read(bufferOf(rank, id), 0), { ...sizes, detailed });
    }),
  );
  // a failure is thrown where the numbers are awaited
  stages.catch(() => undefined);
  return async () => combined(programs, await stages, { ...sizes, detailed, combine });
}

/** Sizes that the metrics of a plan have: layers with experts, experts of a layer, depths of multi-token prediction. */
interface MetricSizes {
  readonly layers: number;
  readonly experts: number;
  readonly depths: number;
}

function sizesIn(programs: Plan["programs"]): MetricSizes {
  const [layers = 0, experts = 1] = programs.flatMap(({ metrics, buffers }) => sizesOf(metrics.expert_loads, buffers))[0] ?? [];
  return { layers, experts, depths: Math.max(0, ...programs.map(({ mtp_losses = [] }) => mtp_losses.length)) };
}

/** Reads the numbers of one stage. All reads are issued before the first is awaited. */
async function readStage(
  { stage, metrics, mtp_losses = [], parameters }: Program,
  read: (id: string) => Promise<HostData>,
  { layers, experts, depths, detailed }: MetricSizes & { readonly detailed: boolean },
): Promise<StageNumbers> {
  const readAll = (ids: readonly string[]): Promise<HostData[]> => Promise.all(ids.map(read));
  const readMetric = (name: MetricName): Promise<HostData[]> => readAll(metrics[name] ?? []);
  const hasExperts = metrics.expert_loads !== undefined;
  const biasIds = detailed && hasExperts ? parameters.flatMap(({ rule, buffer }) => (rule === "expert_bias" ? [buffer] : [])) : [];
  const own = emptyStage(depths);
  const [sums, depthLosses, norms, squares, tables, biases] = await Promise.all([
    Promise.all(summed.map(readMetric)),
    Promise.all(own.depths.map((_, k) => readAll(mtp_losses[k] ?? []))),
    // the norms are equal on all ranks
    stage === 0 ? readMetric("grad_norm") : [],
    stage === 0 ? readMetric("parameter_squares") : [],
    readMetric("expert_loads"),
    readAll(biasIds),
  ]);
  for (const [n, name] of summed.entries()) for (const [value = 0] of sums[n] ?? []) own.sums.set(name, (own.sums.get(name) ?? 0) + value);
  own.depths = depthLosses.map((losses) => total(losses.map(([value = 0]) => value)));
  for (const [value = 0] of norms) own.norm = value;
  for (const [value = 0] of squares) own.squares = value;
  if (!hasExperts) return own;
  own.expertTable = addUp(tables, layers * experts);
  own.largestLoad = largestLoad(own.expertTable, experts);
  if (biases.length > 0) own.bias = [Math.min(...biases.flatMap((b) => [...b])), Math.max(...biases.flatMap((b) => [...b]))];
  return own;
}

/** The sizes, and the sum over processes, for `combined`. */
interface Combining extends MetricSizes {
  readonly detailed: boolean;
  readonly combine: NonNullable<LocalRanks["combine"]>;
}

/** Combines the numbers of all stages, those of other processes included. */
async function combined(
  programs: Plan["programs"],
  all: readonly StageNumbers[],
  { layers, experts, depths, detailed, combine }: Combining,
): Promise<StepNumbers> {
  const biased = detailed ? programs.filter(({ parameters }) => parameters.some(({ rule }) => rule === "expert_bias")) : [];
  const table = detailed
    ? addUp(
        all.map(({ expertTable }) => Float32Array.from(expertTable)),
        layers * experts,
      )
    : [];
  const flat = await combine([
    total(all.map(({ norm }) => norm)),
    total(all.map(({ squares }) => squares)),
    ...summed.map((name) => total(all.map(({ sums }) => sums.get(name) ?? 0))),
    ...Array.from({ length: depths }, (_, k) => total(all.map((own) => own.depths[k] ?? 0))),
    ...all.map((s) => s.largestLoad),
    ...biased.flatMap(({ stage }) => all[stage]?.bias ?? []),
    ...table,
  ]);
  const [grad_norm = 0, squares = 0, loss = 0] = flat;
  const afterDepths = 2 + summed.length;
  const afterSums = afterDepths + depths;
  const afterLoads = afterSums + all.length;
  const biases = flat.slice(afterLoads, afterLoads + 2 * biased.length);
  const expertTable = flat.slice(afterLoads + biases.length);
  const has = (name: MetricName): boolean => programs.some(({ metrics }) => metrics[name] !== undefined);
  return {
    ...Object.fromEntries(summed.flatMap((name, i) => (has(name) ? [[name, flat[2 + i] ?? 0]] : []))),
    ...{ loss, grad_norm },
    ...(detailed && has("parameter_squares") && { parameter_norm: Math.sqrt(squares) }),
    ...(depths > 0 && { mtp_losses: flat.slice(afterDepths, afterSums) }),
    ...(has("expert_loads") && { expert_load: Math.max(...flat.slice(afterSums, afterLoads)) }),
    ...(detailed &&
      has("expert_loads") && { expert_loads: Array.from({ length: layers }, (_, l) => expertTable.slice(l * experts, (l + 1) * experts)) }),
    ...(biased.length > 0 && { expert_bias: [Math.min(...biases), Math.max(...biases)] as const }),
  };
}

const emptyStage = (depths: number): StageNumbers => ({
  ...{ norm: 0, squares: 0, sums: new Map(), largestLoad: 0, expertTable: [], bias: [0, 0] },
  depths: new Array<number>(depths).fill(0),
});
const total = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

/** Returns the global sizes of the first of some buffers. */
const sizesOf = (ids: readonly string[] = [], buffers: readonly Buffer[]): (readonly number[])[] =>
  ids.slice(0, 1).flatMap((id) => buffers.flatMap((b) => (b.id === id ? [b.sizes] : [])));

/** Adds tables of one size. */
const addUp = (parts: readonly HostData[], length: number): number[] =>
  Array.from({ length }, (_, i) => parts.reduce((sum, part) => sum + (part[i] ?? 0), 0));

/** Returns the maximum over rows (layers) of the largest count over the mean; 0 if all counts are 0. */
function largestLoad(table: readonly number[], experts: number): number {
  let largest = 0;
  for (let row = 0; row < table.length; row += experts) {
    const counts = table.slice(row, row + experts);
    const total = counts.reduce((a, b) => a + b, 0);
    if (total > 0) largest = Math.max(largest, (Math.max(...counts) * experts) / total);
  }
  return largest;
}

/** Factors of the metrics to report. */
interface ReportFactors {
  /** global_batch / batch. */
  readonly upscale: number;
  /** The weight of balancing and z losses. */
  readonly aux: number;
  /** Factors of `meanOverLearnt`: of the loss, of all depths together, and of each depth. */
  readonly loss: number;
  readonly mtp: number;
  readonly depths?: readonly number[] | undefined;
}
/** Returns the metrics to report. */
export function reported({ loss, mtp_loss, mtp_losses, aux_loss = 0, z_loss, router_entropy, ...counts }: StepNumbers, by: ReportFactors) {
  const added = by.upscale * by.aux;
  return {
    loss: loss * by.upscale * by.loss,
    ...(mtp_loss !== undefined && { mtp_loss: mtp_loss * by.upscale * by.mtp }),
    // mtp_loss is the mean over depths, so each part is a share of it
    ...(mtp_losses && { mtp_losses: mtp_losses.map((part, k) => part * mtp_losses.length * by.upscale * (by.depths?.[k] ?? 1)) }),
    aux_loss: (aux_loss + (z_loss ?? 0)) * added,
    ...(z_loss !== undefined && { z_loss: z_loss * added }),
    ...(router_entropy !== undefined && { router_entropy: router_entropy * by.upscale }),
    ...counts,
  };
}
