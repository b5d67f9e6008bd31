/**
 * Binds compute instructions to a device: kernel launches with packed parameters, and the memory that they access. Each instruction is
 * bound once per activation copy; a launch is then one driver call.
 */

import { neededOf, readsOf, rowIndexOf, writesOf } from "../../schemas/effects.ts";
import { entryOf, itemOf } from "../../schemas/lookup.ts";
import type { Arg, Compute, Kernel, Plan, Program } from "../../schemas/plan.ts";
import { blockStart, globalStart, numberInStage } from "../../schemas/sharding.ts";
import { listedName } from "../../schemas/tensorLists.ts";
import type { CudaArenas, DeviceRange } from "./arenas.ts";
import { type Context, type DevicePointer, packParams, type Stream } from "./driver.ts";
import { type LoadedKernels, named } from "./kernels.ts";
import type { Touch } from "./streams.ts";

/** A bound instruction. */
export interface Bound {
  /** The id of its kernel. */
  readonly kernel: string;
  readonly touch: Touch;
  readonly issue: (stream: Stream) => void;
}

/** What the binder needs of a rank. */
export interface Ground {
  readonly plan: Plan;
  readonly rank: number;
  readonly program: Program;
  readonly context: Context;
  readonly arenas: CudaArenas;
  readonly kernels: LoadedKernels;
}

/** Returns a function that binds instructions to the memory of a rank. `first`: for the first microbatch of a step. */
export function binder({ plan, rank, program, context, arenas, kernels }: Ground): (i: Compute, copy: number, first: boolean) => Bound {
  const byId = new Map(plan.kernels.map((k) => [k.id, k]));
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));

  return (i, copy, first) => {
    const kernel = entryOf(byId, (first ? i.first_kernel : undefined) ?? i.kernel, "kernel");
    const place = (id: string): DeviceRange => arenas.place(id, copy);
    const operands = { ...i.reads, ...i.writes };
    const rows = rowIndexOf(i, buffers);
    const overflow = neededOf(i);

    const pointer = (name: string, id: string | undefined): DevicePointer => {
      if (id === undefined || !buffers.has(id)) throw new Error(`rankc: ${i.id}: its kernel takes ${name}, and there is no such operand`);
      return place(id).at;
    };
    const param = (arg: Arg): bigint | number | Uint8Array => {
      switch (arg.kind) {
        case "operand":
          return pointer(arg.name, operands[arg.name]);
        case "tensors": {
          const names = Array.from({ length: arg.count }, (_, n) => listedName(arg.name, n));
          return new Uint8Array(BigUint64Array.from(names, (name) => pointer(name, operands[name])).buffer);
        }
        case "rows":
          return pointer("rows", rows);
        case "needed":
          return pointer("needed", overflow);
        case "scratch":
          return arenas.scratch(arg.offset);
        case "start":
          return globalStart(plan.mesh, i, arg.dim, numberInStage(plan.mesh, rank));
        case "block":
          return blockStart(plan.mesh, i, numberInStage(plan.mesh, rank));
        case "attribute":
          return (i.attrs[arg.name] ?? 0) | 0;
        case "tensor_map":
          return context.encodeTiled({ ...arg, at: pointer(arg.tensor, operands[arg.tensor]) });
        default:
          return arg satisfies never;
      }
    };
    const launches = kernel.launches.map((l) => ({
      entry: kernels.entry(kernel, l),
      how: { grid: l.grid, block: [l.threads], shared: l.shared } as const,
      params: packParams(...l.args.map(param)),
    }));
    const made = [...writesOf(i, buffers), ...(overflow && buffers.has(overflow) ? [overflow] : [])];
    const read = [...readsOf(i), ...(rows ? [rows] : [])];
    return {
      kernel: kernel.id,
      touch: { reads: read.map((id) => place(id).span), writes: made.map((id) => place(id).span) },
      issue(stream) {
        for (const [n, { entry, how, params }] of launches.entries()) {
          try {
            context.launch(entry, { ...how, stream }, params);
          } catch (error) {
            throw named(kernel, complete(error, kernel, n));
          }
        }
      },
    };
  };
}

function complete(error: unknown, kernel: Kernel, n: number): unknown {
  const { entry, grid, threads, shared } = itemOf(kernel.launches, n, `launch of ${kernel.id}`);
  if (error instanceof Error) error.message = `${entry}, ${grid.join("x")} blocks of ${threads}, ${shared} bytes: ${error.message}`;
  return error;
}
