/** verifyKernels: the kernels of a plan are those that its instructions use, at their sizes; and their launches reach no byte beyond. */

import type { Arg, Compute, Kernel, Launch, Plan, Program } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { bytesOf, elementsOf, shardCount } from "../../schemas/sharding.ts";
import { ops } from "../ops/index.ts";
import { invariant } from "../ops/op.ts";
import type { Mesh } from "../passes/mesh.ts";

/** Throws a BrokenInvariant that names the kernel. */
export function verifyKernels({ programs, kernels, mesh, toolchain }: Plan): void {
  const byId = new Map(kernels.map((k) => [k.id, k]));
  invariant(byId.size === kernels.length, () => "two kernels have one name");
  for (const k of kernels) verifyKernel(k, toolchain.target);
  const seen = new Set<string>();
  for (const p of programs) {
    const buffers = new Map(p.buffers.map((b) => [b.id, b]));
    for (const i of instructionsOf(p)) {
      if (i.kind !== "compute") continue;
      const kernel = byId.get(i.kernel);
      invariant(kernel !== undefined, () => `stage ${p.stage}: ${i.id} runs kernel ${i.kernel}, which is not there`);
      verifyUse(kernel, i, { mesh, buffers });
      // uses of one kernel are alike in all that its launches depend on
      if (!seen.has(kernel.id)) for (const launch of kernel.launches) verifyArgs(kernel, launch, i, buffers);
      seen.add(kernel.id);
    }
  }
}

type Buffers = ReadonlyMap<string, Program["buffers"][number]>;

/** Limits of CUDA: blocks along x, and along y and z; threads of a block; bytes of shared memory that any device has. */
const [BLOCKS, BLOCKS_YZ, THREADS, SHARED] = [2 ** 31 - 1, 65_535, 1024, 2 ** 18];

function verifyKernel(k: Kernel, target: string): void {
  const must = (ok: boolean, what: () => string): void => invariant(ok, () => `kernel ${k.id}: ${what()}`);
  const suffix = { cpu: undefined, webgpu: "wgsl", cuda: "cu" }[target.split(":")[0]!];
  must((k.source !== undefined) === (suffix !== undefined), () => `a plan for ${target} ${suffix ? "needs a source" : "has no sources"}`);
  must(k.source === undefined || k.source.file === `${k.id}.${suffix}`, () => `its source is ${k.source?.file}, not ${k.id}.${suffix}`);
  must(
    k.cubin === undefined || (suffix === "cu" && /^\.\w+\.\w+\.cubin$/.test(k.cubin.file.slice(k.id.length))),
    () => `its cubin is ${k.cubin?.file}`,
  );
  must(k.cubin === undefined || k.cubin.file.startsWith(`${k.id}.`), () => `its cubin is ${k.cubin?.file}`);
  must(k.source === undefined || k.launches.length > 0, () => "nothing launches it");
  for (const { entry, grid, threads, shared } of k.launches) {
    must(/^\w{1,200}$/.test(entry), () => `${JSON.stringify(entry)} names no function`);
    must(
      grid.every((n, axis) => n >= 1 && n <= (axis === 0 ? BLOCKS : BLOCKS_YZ)),
      () => `no device launches ${grid.join("x")} blocks`,
    );
    must(threads >= 1 && threads <= THREADS && shared <= SHARED, () => `no device runs blocks of ${threads} threads and ${shared} bytes`);
  }
}

/** The instruction has the kernel's op, types and local sizes. */
function verifyUse(k: Kernel, i: Compute, { mesh, buffers }: { readonly mesh: Mesh; readonly buffers: Buffers }): void {
  const must = (ok: boolean, what: () => string): void => invariant(ok, () => `${i.id}: its kernel ${k.id} ${what()}`);
  must(k.op === i.op, () => `is of op ${k.op}, not ${i.op}`);
  const { inputs, outputs } = ops[i.op]!;
  const operands = [...inputs.map(({ name }) => i.reads[name]), ...outputs.map(({ name }) => i.writes[name])];
  const types = operands.flatMap((id) => (id === undefined ? [] : buffers.get(id)!.dtype)).join(".");
  must(k.dtypes === types, () => `is of types ${k.dtypes}, not ${types}`);
  for (const [dim, [size, cut]] of Object.entries(i.dims))
    must(
      dim.startsWith("#") || k.dims[dim] === size / shardCount(mesh, cut),
      () => `has ${dim} ${k.dims[dim]}, not ${size / shardCount(mesh, cut)}`,
    );
}

/** Every argument of a launch is something that the instruction has, and lies within it. */
function verifyArgs(k: Kernel, { entry, args }: Launch, i: Compute, buffers: Buffers): void {
  const must = (ok: boolean, arg: Arg): void =>
    invariant(
      ok,
      () => `kernel ${k.id}: ${entry} takes ${typeof arg === "string" ? arg : `a map of ${arg.tensor}`}, which ${i.id} has not`,
    );
  const operands = new Map(Object.entries({ ...i.reads, ...i.writes }));
  const rows = i.rows ?? [...operands.values()].map((id) => buffers.get(id)!.rows).find((id) => id !== undefined);
  const needed = i.rows === undefined ? undefined : `${i.rows}.needed`;
  for (const arg of args) {
    if (typeof arg !== "string") {
      const b = buffers.get(operands.get(arg.tensor) ?? "");
      const { sizes, strides } = arg;
      must(b !== undefined && sizes.length >= 1 && strides.length === sizes.length - 1 && arg.box.length === sizes.length, arg);
      const last = sizes.reduce((sum, n, dim) => sum + (n - 1) * (dim === 0 ? bytesOf[arg.dtype] : strides[dim - 1]!), bytesOf[arg.dtype]);
      must(b !== undefined && sizes.every((n) => n >= 1) && last <= bytesOf[b.dtype] * elementsOf(b.shape), arg);
      continue;
    }
    const [, what, of = ""] = /^(scratch\+|start\(|attr\()([^)]*)\)?$/.exec(arg) ?? [];
    if (what === "scratch+") must(/^\d{1,15}$/.test(of) && Number(of) <= k.scratch, arg);
    else if (what === "start(") must(Object.hasOwn(i.dims, of), arg);
    else if (what === "attr(") must(Object.hasOwn(i.attrs, of), arg);
    else
      must(
        operands.has(arg) || (arg === "rows" && rows !== undefined) || (arg === "needed" && needed !== undefined && buffers.has(needed)),
        arg,
      );
  }
}
