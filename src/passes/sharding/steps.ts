/** The result of the sharding pass: instructions on sharded values, reshard steps, and the origin of each collective. */
import type { Node, Value } from "../../ops/op.ts";
import type { Layout, ReshardKind, ShardedValue } from "../layout.ts";

/** The origin of a collective: the use, the sharding decision and the job key. */
export interface Reason {
  readonly op: string;
  readonly because: string;
  readonly path: string;
  /** The position of the model whose name `op` has. */
  readonly position: number | undefined;
}
/** An op on sharded values. */
export interface ComputeStep {
  readonly kind: "compute";
  readonly stage: number;
  readonly node: Node;
  readonly ins: readonly ShardedValue[];
  readonly outs: readonly ShardedValue[];
  /** Per dim of the op, the sub-axes that shard it, outermost first. */
  readonly dims: ReadonlyMap<string, readonly number[]>;
}
/** A reshard step of one value. */
export interface CollectiveStep {
  readonly kind: "collective";
  readonly stage: number;
  readonly how: ReshardKind;
  readonly subAxes: readonly number[];
  readonly from: ShardedValue;
  readonly to: ShardedValue;
  /** Per dim, the sub-axes that number the blocks on both sides. */
  readonly blockAxes: Layout["shardedBy"];
  readonly backward: boolean;
  readonly why: Reason;
}
/** A transfer to a neighbouring virtual stage; `received` is the copy there. */
export interface SendStep {
  readonly kind: "send";
  readonly stage: number;
  readonly to: number;
  readonly shardedValue: ShardedValue;
  readonly received: ShardedValue;
  readonly backward: boolean;
  readonly why: Reason;
}
/** Adds an addend of a parameter's gradient to its accumulator. */
export interface AccumulateStep {
  readonly kind: "accumulate";
  readonly stage: number;
  readonly parameter: Value;
  readonly shardedValue: ShardedValue;
}
/** One instruction of the sharded graph. `stage` is a virtual stage. */
export type ShardStep = ComputeStep | CollectiveStep | SendStep | AccumulateStep;

/** A value in its layout, and the virtual stage in which it is first produced. */
export interface Placement extends ShardedValue {
  readonly stage: number;
}
/** The result of the sharding pass. */
export interface ShardedGraph {
  /** Instructions of one microbatch, in order. */
  readonly steps: readonly ShardStep[];
  /** After all microbatches: the pending reductions of gradients and losses. */
  readonly deferred: readonly ShardStep[];
  /** The updates of parameters, after the gradients are reduced. Their values are those of `TrainingGraph.updates`. */
  readonly updates: readonly ShardStep[];
  readonly placement: ReadonlyMap<Value, Placement>;
  /** The number of distinct forms of nodes, each of which was decided once. */
  readonly forms: number;
}
