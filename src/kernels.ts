/**
 * kernels: which specialised kernels a program needs: an op, its local sizes and types. A kernel's id says all of it, so
 * equal work over layers and stages is one kernel. The target `cpu` calls each op's reference and generates no source.
 */

import { parts } from "../schemas/layout.ts";
import type { Kernel, Program } from "../schemas/plan.ts";
import type { Mesh } from "./mesh.ts";

export function kernelsOf(programs: readonly Program[], mesh: Mesh): Kernel[] {
  const kernels = new Map<string, Kernel>();
  for (const p of programs) {
    const types = new Map(p.buffers.map((b) => [b.id, b.dtype]));
    const microbatches = p.order.length / 2;
    for (const block of ["forward", "backward", "step"] as const)
      for (const i of p[block]) {
        if (i.kind !== "compute") continue;
        const dims = Object.fromEntries(Object.entries(i.dims).map(([d, [size, cut]]) => [d, size / parts(mesh, cut)]));
        const dtypes = [...Object.values(i.reads), ...Object.values(i.writes)].map((id) => types.get(id)).join(".");
        const id = [i.op, dtypes, ...Object.entries(dims).map(([d, n]) => `${d}=${n}`)].join(".");
        const uses = (kernels.get(id)?.uses ?? 0) + (block === "step" ? 1 : microbatches);
        kernels.set(id, { id, op: i.op, dtypes, dims, uses });
      }
  }
  return [...kernels.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
}

export const printKernels = (kernels: readonly Kernel[]): string =>
  kernels.map((k) => `${String(k.uses).padStart(8)} x ${k.id}\n`).join("");
