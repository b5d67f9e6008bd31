/** Plans made by hand, for tests of a runtime alone: every rank runs the one program, its buffers one behind the other. */

import { bytesOf, type Dtype } from "../../schemas/dtypes.ts";
import type { Buffer, BufferKind, Instruction, Kernel, Plan, Program } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { blockRuns } from "./blockRuns.ts";

const noAxes = { tp: 1, cp: 1, dp: 1, etp: 1, ep: 1, edp: 1, kv: 1, copies: 1 };

interface HandBuffer {
  readonly kind?: BufferKind;
  readonly dtype?: Dtype;
  readonly shape: readonly number[];
  /** Begins where that one begins. */
  readonly within?: string;
  /** Leading slots that share the first dim, and their index buffer. */
  readonly ragged?: number;
  readonly rows?: string;
}
export interface Hand {
  readonly world?: number;
  readonly stages?: number;
  readonly copies?: number;
  readonly target?: string;
  readonly buffers: Readonly<Record<string, HandBuffer>>;
  readonly forward?: readonly Instruction[];
  readonly bounds?: readonly { needed: string; bound: number }[];
  readonly kernels?: readonly Kernel[];
}

export function handPlan(hand: Hand): Plan {
  const { world = 1, stages = 1, copies = 1, target = "webgpu:baseline", forward = [], bounds = [], kernels = [] } = hand;
  const buffers = Object.entries(hand.buffers).map(([id, { kind = "workspace", dtype = "f32", shape, ...rest }]): Buffer => {
    const { within, rows, ragged = 0 } = rest;
    const shardedBy = shape.map(() => []);
    return {
      id,
      kind,
      dtype,
      shape: [...shape],
      sizes: [...shape],
      ragged,
      shardedBy,
      ...(within ? { within } : {}),
      ...(rows ? { rows } : {}),
    };
  });
  const total: Record<BufferKind, number> = { parameter: 0, gradient: 0, optimizer: 0, activation: 0, workspace: 0 };
  const offsets: Record<string, number> = {};
  for (const b of buffers) {
    offsets[b.id] = b.within ? offsets[b.within]! : total[b.kind];
    if (!b.within) total[b.kind] += Math.max(256, Math.ceil((bytesOf[b.dtype] * elementsOf(b.shape)) / 256) * 256);
  }
  const scratch = Math.max(0, ...kernels.map((k) => k.scratch));
  const perStage = world / stages;
  const subAxes = [{ stride: 1, size: perStage }];
  const plan: Pick<Plan, "mesh" | "programs" | "memory" | "kernels" | "toolchain"> = {
    mesh: {
      world,
      per_stage: perStage,
      stage_stride: perStage,
      subAxes,
      axes: { tp: [], cp: [], dp: [], etp: [], ep: [], edp: [], kv: [], copies: [] },
      sizes: { ...noAxes, pp: stages },
      gpus_per_node: world,
    },
    programs: Array.from({ length: stages }, (_, stage) => ({
      chunks: [{ layers: [0, 1], copies, forward: [...forward], backward: [], weights: [] }],
      ...{ stage, buffers, bounds: bounds.map((b) => ({ ...b, of: "rows" })), step: [], order: blockRuns("F0") },
      ...{ parameters: [], inputs: [], metrics: {} },
    })),
    memory: Array.from({ length: stages }, (_, stage) => ({ stage, ...total, activation: [total.activation], scratch, peak: 0, offsets })),
    kernels: [...kernels],
    toolchain: { rankc: "test", target },
  };
  // the runtime reads no other part
  return plan as Plan;
}

/** The program with another forward block. */
export const withForward = (p: Program, forward: readonly Instruction[]): Program => ({
  ...p,
  chunks: [{ ...p.chunks[0]!, forward: [...forward] }],
});

/** A buffer of a plan whose stages are alike. */
export const bufferIn = (plan: Plan, id: string): Buffer => plan.programs[0]!.buffers.find((b) => b.id === id)!;
