/** Checks of the kernels section: kernels match the instructions that use them, and launches stay inside their buffers. */

import { bytesOf } from "../../schemas/dtypes.ts";
import { neededOf, rowIndexOf } from "../../schemas/effects.ts";
import type { Arg, Buffer, Compute, Kernel, Launch, Plan, TensorMap } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import { listedName } from "../../schemas/tensorLists.ts";
import { WEIGHTS } from "../../schemas/weightsKernel.ts";
import { ops } from "../ops/index.ts";
import { invariant } from "../ops/op.ts";
import type { Mesh } from "../passes/mesh.ts";

/** Throws a BrokenInvariant that names the kernel if kernels and instructions of a plan do not match. */
export function verifyKernels({ programs, kernels, mesh, toolchain }: Plan): void {
  const byId = new Map(kernels.map((k) => [k.id, k]));
  const isCuda = toolchain.target.startsWith("cuda:");
  invariant(byId.has(WEIGHTS) === isCuda, () => `a plan for ${toolchain.target} has ${isCuda ? "the" : "no"} kernel ${WEIGHTS}`);
  invariant(byId.size === kernels.length, () => "two kernels have the same id");
  for (const k of kernels) verifyKernel(k, toolchain.target);
  const seen = new Set<string>();
  for (const p of programs) {
    const buffers = new Map(p.buffers.map((b) => [b.id, b]));
    for (const i of instructionsOf(p)) {
      if (i.kind !== "compute") continue;
      for (const id of i.first_kernel === undefined ? [i.kernel] : [i.kernel, i.first_kernel]) {
        const kernel = byId.get(id);
        invariant(kernel !== undefined, () => `stage ${p.stage}: ${i.id} runs kernel ${id}, which does not exist`);
        verifyUse(kernel, i, { mesh, buffers });
        // all uses of one kernel agree in everything that its launches depend on
        if (!seen.has(kernel.id)) for (const launch of kernel.launches) verifyArgs(kernel, launch, i, buffers);
        seen.add(kernel.id);
      }
    }
  }
}

type Buffers = ReadonlyMap<string, Buffer>;

/** Limits of CUDA: blocks along x; blocks along y and z; threads of a block; the largest shared memory of any device, in bytes. */
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
  must(k.source === undefined || k.launches.length > 0, () => "it has a source but no launches");
  for (const { entry, grid, threads, shared } of k.launches) {
    must(/^\w{1,200}$/.test(entry), () => `${JSON.stringify(entry)} is not a function name`);
    must(
      grid.every((n, axis) => n >= 1 && n <= (axis === 0 ? BLOCKS : BLOCKS_YZ)),
      () => `no device launches ${grid.join("x")} blocks`,
    );
    must(threads >= 1 && threads <= THREADS && shared <= SHARED, () => `no device runs blocks of ${threads} threads and ${shared} bytes`);
  }
}

/** Checks that an instruction has the op, types and local sizes of its kernel. */
function verifyUse(k: Kernel, i: Compute, { mesh, buffers }: { readonly mesh: Mesh; readonly buffers: Buffers }): void {
  const must = (ok: boolean, what: () => string): void => invariant(ok, () => `${i.id}: its kernel ${k.id} ${what()}`);
  must(k.op === i.op, () => `is of op ${k.op}, not ${i.op}`);
  const { inputs, outputs } = ops[i.op];
  let types = "";
  const addType = (id: string | undefined): void => {
    const b = id === undefined ? undefined : buffers.get(id);
    if (b) types += types === "" ? b.dtype : `.${b.dtype}`;
  };
  for (const { name } of inputs) addType(i.reads[name]);
  for (const { name } of outputs) addType(i.writes[name]);
  must(k.dtypes === types, () => `is of types ${k.dtypes}, not ${types}`);
  for (const dim in i.dims) {
    const [size, cut] = i.dims[dim]!;
    const local = size / shardCount(mesh, cut);
    must(k.sizes[dim] === local, () => `has ${dim} ${k.sizes[dim]}, not ${local}`);
  }
  const strides = i.blocks?.map(({ stride }) => stride);
  must(k.blocks?.join() === strides?.join(), () => `has blocks of strides ${k.blocks}, not ${strides}`);
}

/** Checks that every argument of a launch exists in the instruction and stays inside its buffer. */
function verifyArgs(k: Kernel, { entry, args }: Launch, i: Compute, buffers: Buffers): void {
  const must = (ok: boolean, arg: Arg): void =>
    invariant(ok, () => `kernel ${k.id}: ${entry} takes ${argText(arg)}, which ${i.id} does not provide`);
  const operands = new Map(Object.entries({ ...i.reads, ...i.writes }));
  const rows = rowIndexOf(i, buffers);
  const needed = neededOf(i);
  const provides = (arg: Arg): boolean => {
    switch (arg.kind) {
      case "operand":
        return operands.has(arg.name);
      case "tensors":
        return i.tensors === arg.count && operands.has(arg.name) && operands.has(listedName(arg.name, arg.count - 1));
      case "rows":
        return rows !== undefined;
      case "needed":
        return needed !== undefined && buffers.has(needed);
      case "scratch":
        return arg.offset <= k.scratch;
      case "start":
        return Object.hasOwn(i.dims, arg.dim);
      case "block":
        return i.blocks !== undefined;
      case "attribute":
        return Object.hasOwn(i.attrs, arg.name);
      case "tensor_map":
        return isInside(arg, buffers.get(operands.get(arg.tensor) ?? ""));
      default:
        return arg satisfies never;
    }
  };
  for (const arg of args) must(provides(arg), arg);
}

function argText(arg: Arg): string {
  if (arg.kind === "operand") return arg.name;
  if (arg.kind === "tensors") return `${arg.name} of ${arg.count} tensors`;
  return arg.kind === "tensor_map" ? `a map of ${arg.tensor}` : Object.values(arg).join(" ");
}

/** Returns whether every element of a tensor map lies in the buffer. */
function isInside({ dtype, sizes, strides, box }: TensorMap, b: Buffer | undefined): boolean {
  if (!b || sizes.length < 1 || strides.length !== sizes.length - 1 || box.length !== sizes.length) return false;
  const steps = [bytesOf[dtype], ...strides];
  const last = sizes.reduce((sum, n, dim) => sum + (n - 1) * (steps[dim] ?? 0), bytesOf[dtype]);
  return sizes.every((n) => n >= 1) && last <= bytesOf[b.dtype] * elementsOf(b.shape);
}
