/**
 * The data of the page that `rankc view` writes. The compiler writes it (readPlanView.ts) and the page reads it (src/page/): this module is
 * the only one that both know. It has roles and not ranks, and equal layers once, so its size does not grow with the number of ranks.
 */
import type { BlockRun, BufferKind, CollectiveKind, Instruction, Pair, StreamName } from "../../../schemas/plan.ts";
import type { MeshData } from "../../../schemas/sharding.ts";
import type { PlanDiff } from "../diff.ts";
import type { Inspection } from "../inspect.ts";
import type { AxisTraffic, Warning } from "../overview.ts";
import type { BlockPhase } from "../programText.ts";
import type { KernelWork } from "../sections.ts";
import type { Why } from "../why.ts";

/** The version of the data. */
export const VIEW_VERSION = 1;

/** All that a page shows: one plan, or two and what differs. */
export interface ViewData {
  readonly version: typeof VIEW_VERSION;
  readonly plans: readonly PlanView[];
  readonly diff?: PlanDiff;
}

/** One plan. */
export interface PlanView {
  readonly inspection: Inspection;
  readonly mesh: MeshData;
  readonly job: JobView;
  readonly warnings: readonly Warning[];
  readonly timeline: TimelineView;
  /** The instructions of one layer, or of what stands between layers; stages and chunks share them. */
  readonly parts: readonly PartView[];
  readonly forms: readonly BlockForm[];
  readonly stages: readonly StageView[];
  readonly kernels: readonly KernelView[];
  /** What a rank sends to others in a step. */
  readonly flows: readonly TrafficFlow[];
  /** Per stage, what a rank sends in a step by axes and links. */
  readonly traffic: readonly (readonly AxisTraffic[])[];
}

/** The job, and the lines of keys that decide about collectives. */
export interface JobView {
  /** The file as it was written; else the complete job as YAML. */
  readonly text: string;
  /** The name of the file; absent if the text is the complete job. */
  readonly file?: string;
  /** The line of a key, from 1 on; of `--set`, the option. */
  readonly places: Readonly<Record<string, KeyLine>>;
}

/** Where a key is written; `elsewhere`: the line of a file that the job builds on. */
export type KeyLine = { readonly line: number } | { readonly elsewhere: string } | { readonly set: string } | { readonly isDefault: true };

/** The block runs of a step over time. */
export interface TimelineView {
  readonly unit: "units" | "seconds";
  readonly end: number;
  readonly bubble: number;
  /** Per stage, in the order of its program. */
  readonly stages: readonly RunTimes[];
  /** Per stage, when the instructions of its blocks run; without it each has an equal share of its block. */
  readonly slots: readonly (readonly BlockSlots[])[];
}

/** Start and end of each instruction of a block, as shares of its time. Communication may end after its block. */
export interface BlockSlots {
  readonly kind: string;
  readonly chunk: number;
  readonly times: readonly number[];
}

/** The block runs of a stage: parallel lists. */
export interface RunTimes {
  /** An index of `runKinds`. */
  readonly kind: readonly number[];
  readonly microbatch: readonly number[];
  readonly chunk: readonly number[];
  readonly start: readonly number[];
  readonly end: readonly number[];
  /** The numbers of the forwards that alternate with the run behind them. */
  readonly paired?: readonly number[];
}
/** The kinds of block runs by number; the step block has times in seconds only. */
export const runKinds = ["forward", "backward", "weights", "step"] as const satisfies readonly (BlockRun["kind"] | "step")[];

/** The instructions of a part. Layers in ids are relative to the layer of the part: `layers.+0.wq`. */
export interface PartView {
  readonly instructions: readonly InstructionView[];
}

/** One instruction. */
export interface InstructionView {
  readonly id: string;
  readonly kind: "compute" | "collective" | "send" | "recv";
  /** The op, or the name of the collective. */
  readonly does: string;
  readonly reads: readonly string[];
  readonly writes: readonly string[];
  /** Types and local shapes. */
  readonly shapes: string;
  readonly flops: number;
  /** Bytes read and written, or sent. */
  readonly bytes: number;
  readonly kernel?: string;
  readonly how?: CollectiveKind;
  readonly axes?: string;
  readonly subAxes?: readonly number[];
  /** A collective of all stages. */
  readonly world?: true;
  /** Stages from this one to the peer of a transfer. */
  readonly peer?: number;
  /** The stream on which an asynchronous collective runs beside compute; absent: in order. */
  readonly stream?: StreamName;
  /** Collectives of streams that it waits for. */
  readonly waits?: readonly string[];
  /** It runs in the last microbatch of a step only, or in steps only whose numbers are logged. */
  readonly only?: NonNullable<Instruction["only"]>;
  /** The job key that decided it. */
  readonly path: string;
  readonly because: string;
  /** Of a collective or a transfer, for the first place where the part occurs. */
  readonly why?: InstructionWhy;
}

/** The parts of an answer to `--why` that an instruction of the page lacks. */
export type InstructionWhy = Pick<Why, "because" | "sharding" | "link" | "share" | "seconds_per_step" | "removed_by"> & {
  readonly value: unknown;
};

/** A block without the layers and the chunk that it is for. */
export interface BlockForm {
  /** The parts in order; layers are relative to the first layer of the chunk; null: no layer. */
  readonly parts: readonly { readonly part: number; readonly layer: number | null }[];
  /** The buffers of the workspace and the activations that the block touches; instructions are counted over the block. */
  readonly lives: readonly BufferLife[];
}

/** When a buffer is alive in a block. */
export interface BufferLife {
  readonly id: string;
  readonly kind: BufferKind;
  readonly bytes: number;
  /** The first and the last instruction that need it; -1: alive before, the number of instructions: alive after. */
  readonly from: number;
  readonly to: number;
}

/** A block of a stage. */
export interface BlockView {
  readonly kind: BlockPhase;
  readonly chunk: number;
  readonly form: number;
  /** The layer that the layers of the form are relative to. */
  readonly base: number;
}

/** What differs between stages. */
export interface StageView {
  readonly blocks: readonly BlockView[];
  /** How the forwards and backwards of pairs alternate. */
  readonly pairs?: readonly Pair[];
  /** The largest tensors that live for the whole run. */
  readonly state: readonly HeldTensor[];
}

/** Parameters, gradients or optimizer state of a form, over all layers. */
export interface HeldTensor {
  readonly id: string;
  readonly kind: BufferKind;
  readonly shape: string;
  readonly count: number;
  readonly bytes: number;
}

/** A kernel, and the file of its source; the sources are a section of their own. */
export interface KernelView extends KernelWork {
  readonly file?: string;
  readonly attrs: Readonly<Record<string, number>>;
  readonly threads: readonly number[];
}

/** Per plan, the sources of its kernels by file name. */
export type KernelSources = readonly Readonly<Record<string, string>>[];

/** Collectives of a stage over the same groups, or sends to another stage. */
export interface TrafficFlow {
  readonly stage: number;
  readonly axes: string;
  /** Around a ring of the group, to each of the others, or to the same rank of another stage. */
  readonly pattern: "ring" | "exchange" | "send";
  readonly subAxes: readonly number[];
  /** Over all ranks of all stages. */
  readonly world?: true;
  readonly peer?: number;
  readonly bytes: number;
}
