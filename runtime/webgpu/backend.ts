/**
 * The WebGPU backend: all ranks of a plan on one device. Kernels are part of the plan; a dispatch is bound once and recorded for every use.
 */
/// <reference types="@webgpu/types" />

import { encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import { neededOf, rowIndexOf } from "../../schemas/effects.ts";
import { entryOf, itemOf } from "../../schemas/lookup.ts";
import type { Arg, Buffer, Compute, Launch, Plan, Program } from "../../schemas/plan.ts";
import { blockStart, elementsOf, globalStart, numberInStage } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { LocalRanks, NormalDraw, RankDevice } from "../backend.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import { RankPrograms } from "../rankPrograms.ts";
import { type BufferRange, type GpuArenas, type Limits, makeArenas } from "./arenas.ts";
import { type Bind, binder } from "./bindings.ts";
import { webgpuComm } from "./comm.ts";
import { type Commands, commandsOn, type Dispatch, type DispatchTiming } from "./commands.ts";
import { type Host, openDevice } from "./device.ts";
import { type DrawWeights, openWeights } from "./initialWeights.ts";
import { type ComputePipeline, compileKernels, compiler, isNumber, type NumberArg, uniformOf } from "./pipelines.ts";

/** The local ranks on a WebGPU device. */
export interface WebgpuRanks extends LocalRanks {
  /** The name of the adapter; software adapters are marked. */
  readonly adapter: string;
  readonly device: GPUDevice;
  /** Returns the times since the last call; empty without `profile`, or if the adapter has no timestamps. */
  profile(): Promise<readonly DispatchTiming[]>;
}
/** Settings of the backend. */
export interface WebgpuSettings {
  /** Records the time of every dispatch; dispatches then run one after another. */
  readonly profile?: boolean;
  /** Smaller limits than the device's, for tests. */
  readonly limits?: Partial<Limits>;
}
/** The kernel files of the plan. */
export interface Sources {
  kernel(file: string): string;
}

/** Opens all ranks of a plan on a WebGPU device. Throws a Trouble if the device is not suitable. */
export async function webgpuOn(
  host: Host,
  plan: Plan,
  sources: Sources,
  { profile = false, limits = {} }: WebgpuSettings = {},
): Promise<WebgpuRanks> {
  const [kind, detail = "baseline"] = plan.toolchain.target.split(":");
  if (kind !== "webgpu")
    throw new Trouble(`the plan is for ${plan.toolchain.target}, and WebGPU cannot run it`, "compile the job for the target webgpu");
  const gpu = await openDevice(host, detail, { timestamps: profile });
  try {
    const { device, adapter } = gpu;
    const { mesh } = plan;
    const ranks = Array.from({ length: mesh.world }, (_, r) => r);
    const compile = compiler(gpu);
    const bind = binder(gpu);
    const kernels = await compileKernels(compile, plan.kernels, sources.kernel);
    const commands = commandsOn(gpu, { timed: profile });
    const own = { buffer: device.limits.maxBufferSize, binding: device.limits.maxStorageBufferBindingSize };
    const programs = new RankPrograms(plan);
    const arenas = ranks.map((r) => makeArenas(gpu, programs.of(r), r, { ...own, ...limits }));
    const place = (rank: number, b: Buffer, copy: number) => itemOf(arenas, rank, "rank").place(b, copy);
    const comm = await webgpuComm(plan, { gpu, commands, compile, bind, place });
    const drawn = programs.stages.flatMap((s) => s.program.parameters.flatMap((p) => [s.buffer(p.buffer).dtype, s.buffer(p.master).dtype]));
    const drawWeights = await openWeights({ gpu, commands, compile, bind }, new Set(drawn));
    // throws if an allocation failed
    await commands.finish();
    const backends = arenas.map((own, r) =>
      backendOf(plan, r, { program: programs.of(r).program, arenas: own, commands, kernels, bind, drawWeights }),
    );
    const bounds = ranks.flatMap((rank) =>
      programs.of(rank).program.bounds.map((limit) => ({ rank, limit, at: place(rank, programs.buffer(rank, limit.needed), 0) })),
    );
    return {
      ranks,
      rankDevice: (rank) => itemOf(backends, rank, "rank"),
      comm,
      adapter,
      device,
      async finish() {
        await commands.finish();
        const found = await commands.read(bounds.map(({ at }) => at));
        for (const [k, { rank, limit }] of bounds.entries()) {
          const [needed = 0] = new Int32Array(itemOf(found, k, "row count"));
          if (needed > limit.bound) throw capacityExceeded(limit, rank, needed);
        }
      },
      profile: () => commands.timings(),
      async close() {
        gpu.close();
      },
    };
  } catch (error) {
    gpu.close();
    throw error;
  }
}

interface Own {
  readonly program: Program;
  readonly arenas: GpuArenas;
  readonly commands: Commands;
  readonly kernels: ReadonlyMap<string, readonly ComputePipeline[]>;
  readonly bind: Bind;
  readonly drawWeights: DrawWeights;
}

function backendOf(plan: Plan, rank: number, { program, arenas, commands, kernels, bind, drawWeights }: Own): RankDevice {
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const launches = new Map(plan.kernels.map((k) => [k.id, k]));

  /** Binds an op to its buffers in one activation copy: one dispatch per launch of its kernel. */
  function bound(i: Compute, copy: number): Dispatch[] {
    const kernel = entryOf(launches, i.kernel, "kernel");
    // launches with equal buffers share a bind group
    const groups = new Map<string, GPUBindGroup>();
    return kernel.launches.map((launch, n) => {
      const { pipeline, layout } = itemOf(entryOf(kernels, i.kernel, "kernel"), n, `launch of ${i.kernel}`);
      const seen = JSON.stringify(launch.args);
      let group = groups.get(seen);
      if (!group) {
        const places = launch.args.filter((a) => !isNumber(a)).map((a) => placeOf(i, copy, a, launch, kernel.scratch));
        const numbers = uniformOf(launch.args, (arg) => numberOf(i, arg));
        group = bind(`${i.id}, rank ${rank}, ${launch.entry}`, layout, places, numbers);
        groups.set(seen, group);
      }
      return { pipeline, group, grid: launch.grid, of: { rank, id: i.id, op: i.op, kernel: i.kernel } };
    });
  }
  function placeOf(i: Compute, copy: number, arg: Arg, { args }: Launch, scratch: number): BufferRange {
    if (arg.kind === "scratch") {
      // bindings of the scratch arena in one launch must not overlap: each ends where the next begins
      const next = args.flatMap((a) => (a.kind === "scratch" && a.offset > arg.offset ? [a.offset] : []));
      return { ...arenas.scratch, offset: arenas.scratch.offset + arg.offset, bytes: Math.min(scratch, ...next) - arg.offset };
    }
    const buffer = buffers.get(bufferOf(i, arg, buffers) ?? "");
    if (!buffer) throw new Error(`rankc: ${i.id}: the kernel ${i.kernel} takes ${JSON.stringify(arg)}, which the plan does not provide`);
    return arenas.place(buffer, copy);
  }
  function numberOf(i: Compute, arg: NumberArg): number {
    const inStage = numberInStage(plan.mesh, rank);
    switch (arg.kind) {
      case "start":
        return globalStart(plan.mesh, i, arg.dim, inStage);
      case "block":
        return blockStart(plan.mesh, i, inStage);
      case "attribute":
        return i.attrs[arg.name] ?? 0;
      default:
        return arg satisfies never;
    }
  }

  const made = new Map<Compute, Dispatch[][]>();
  return {
    zeroGradients() {
      for (const place of arenas.gradients) commands.clear(place);
    },
    compute(i, copy) {
      let copies = made.get(i);
      if (!copies) made.set(i, (copies = []));
      for (const d of (copies[copy] ??= bound(i, copy))) commands.dispatch(d);
    },
    write(b, copy, data) {
      commands.write(arenas.place(b, copy), encoded(b.dtype, data).words);
    },
    draw(own: readonly Buffer[], draw: NormalDraw) {
      drawWeights(rank, own, draw, (b) => arenas.place(b, 0));
    },
    async read(b, copy) {
      const bytes = itemOf(await commands.read([arenas.place(b, copy)]), 0, "buffer that was read");
      return valuesIn(typedMemory(b.dtype, bytes, 0, elementsOf(b.shape)));
    },
  };
}

/** Returns the buffer of an argument; undefined for an argument that is none. WebGPU has no tensor maps. */
function bufferOf(i: Compute, arg: Arg, buffers: ReadonlyMap<string, Buffer>): string | undefined {
  if (arg.kind === "operand") return i.reads[arg.name] ?? i.writes[arg.name];
  if (arg.kind === "rows") return rowIndexOf(i, buffers);
  return arg.kind === "needed" ? neededOf(i) : undefined;
}
