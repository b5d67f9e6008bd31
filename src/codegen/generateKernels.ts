/**
 * Pass `kernels`: finds the kernel specs (op, local sizes, attributes, types) that the programs need, and generates their sources for a target.
 * Layers and stages with equal specs share one kernel. The target `cpu` runs the reference of each op and has no sources.
 */

import { raggedOperandOf, touchedBy } from "../../schemas/effects.ts";
import { entryOf } from "../../schemas/lookup.ts";
import type { Buffer, Compute, Instruction, Kernel, Program } from "../../schemas/plan.ts";
import { microbatchBlocks, microbatchesIn } from "../../schemas/program.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import { isOfFirst } from "../../schemas/tensorLists.ts";
import { WEIGHTS } from "../../schemas/weightsKernel.ts";
import { bufferForm, computeForm } from "../analysis/instructionForms.ts";
import { ops } from "../ops/index.ts";
import type { Mesh } from "../passes/mesh.ts";
import { canonical } from "../plan/canonical.ts";
import { sha256 } from "../plan/seal.ts";
import { Repeats } from "../repeats.ts";
import type { GeneratedKernel, KernelSpec } from "./kernelSpec.ts";
import { planLaunch } from "./launchArgs.ts";
import type { Target } from "./targets.ts";

/** The result of the pass. */
export interface GeneratedKernels {
  /** The programs; each compute instruction has the name of its kernel. */
  readonly programs: Program[];
  readonly kernels: Kernel[];
  /** Contents of the folder kernels/ of the plan, by file name. */
  readonly sources: ReadonlyMap<string, string>;
}

/** Generates the kernels of all programs and names them in the compute instructions. */
export function generateKernels(programs: readonly Program[], mesh: Mesh, target: Target): GeneratedKernels {
  const kernels = new Map<string, Kernel>();
  const sources = new Map<string, string>();
  /** Names of the kernels of instructions, and numbers of buffers, by form. */
  const [names, numbers] = [new Repeats<string>(), new Repeats<number>()];
  const totals = new Map<string, number>();
  const named = programs.map((p): Program => {
    const buffers = new Map(p.buffers.map((b) => [b.id, b]));
    const forms = new Map(p.buffers.map((b) => [b.id, numbers.of(bufferForm(b), () => numbers.forms)]));
    const microbatches = microbatchesIn(p);
    const use = (i: Compute, uses: number, isBeside: boolean): string => {
      const index = i.rows === undefined ? "" : mayOverflow(i, buffers) ? "bounded" : "index";
      const sharesDevice = isBeside && target.dividesGrids === true && ops[i.op].flops !== undefined;
      const form = computeForm(i, (id) => forms.get(id), kernelAttrs(i)) + index + sharesDevice;
      const name = names.of(form, () => {
        const spec = kernelSpecOf(i, mesh, buffers, sharesDevice);
        if (!kernels.has(spec.name)) kernels.set(spec.name, generateKernel(spec, Object.keys(i.dims), target, sources));
        return spec.name;
      });
      totals.set(name, (totals.get(name) ?? 0) + uses);
      return name;
    };
    const soleWriters = target.writesFirst ? soleWritersOf(p, buffers) : new Set<Instruction>();
    const name = (i: Compute, uses: number, isBeside: boolean): Compute => {
      if (!soleWriters.has(i)) return { ...i, kernel: use(i, uses, isBeside) };
      const { accumulates: _, ...writing } = i;
      const first_kernel = use(writing, 1, isBeside);
      return { ...i, kernel: uses > 1 ? use(i, uses - 1, isBeside) : first_kernel, first_kernel };
    };
    const besideOf = partnersOf(p);
    const block = (instructions: readonly Instruction[], times: number) => {
      const all = [instructions, ...(besideOf.get(instructions) ?? [])];
      const isBeside = all.some((some) => some.some((i) => i.kind === "collective" && i.stream !== undefined));
      return instructions.map((i) => (i.kind === "compute" ? name(i, times, isBeside) : i));
    };
    const chunks = p.chunks.map((c) => ({
      ...c,
      forward: block(c.forward, microbatches),
      backward: block(c.backward, microbatches),
      weights: block(c.weights, microbatches),
    }));
    const { evaluation } = p;
    // blocks of an evaluation are not part of a step, so their uses do not count
    const evaluated = evaluation && { ...evaluation, chunks: evaluation.chunks.map((c) => block(c, 0)), step: block(evaluation.step, 0) };
    return { ...p, chunks, step: block(p.step, 1), ...(evaluated && { evaluation: evaluated }) };
  });
  const made = target.weights?.(WEIGHTS);
  if (made) {
    const source = sourceFile(WEIGHTS, made, target, sources);
    const launches = made.launches.map(planLaunch);
    kernels.set(WEIGHTS, { ...{ id: WEIGHTS, op: WEIGHTS, dtypes: "", sizes: {}, attrs: {}, uses: 1, scratch: 0 }, source, launches });
  }
  const counted = Array.from(kernels.values(), (kernel) => ({ ...kernel, uses: totals.get(kernel.id) ?? kernel.uses }));
  return { programs: named, kernels: counted.sort((a, b) => (a.id < b.id ? -1 : 1)), sources };
}

/** Stores the source of a kernel, and returns its file and digest. */
function sourceFile(
  name: string,
  { source }: GeneratedKernel,
  target: Target,
  sources: Map<string, string>,
): NonNullable<Kernel["source"]> {
  const file = `${name}.${target.suffix}`;
  sources.set(file, source);
  return { file, sha256: sha256(source) };
}

/**
 * Returns the instructions that alone touch the gradients of weights which they accumulate, until the step block: in the first microbatch
 * they may write. Gradients of vectors are left out: zeroing them costs less than another kernel.
 */
function soleWritersOf({ chunks }: Program, buffers: ReadonlyMap<string, Buffer>): Set<Instruction> {
  const all = chunks.flatMap((c) => microbatchBlocks.flatMap((kind) => c[kind]));
  const users = new Map<string, number>();
  for (const i of all) for (const id of touchedBy(i, buffers)) users.set(id, (users.get(id) ?? 0) + 1);
  const isSole = (i: Compute): boolean => {
    const outputs = (i.accumulates ?? []).map((name) => i.writes[name]);
    return outputs.every((id) => {
      const b = id === undefined ? undefined : buffers.get(id);
      return b?.kind === "gradient" && b.shape.length > 1 && users.get(b.id) === 1;
    });
  };
  return new Set(all.filter((i) => i.kind === "compute" && i.accumulates !== undefined && !ops[i.op].inPlace && isSole(i)));
}

/** Returns the attributes that are part of a kernel: not those that it receives at launch. */
function kernelAttrs({ op, attrs }: Compute): Compute["attrs"] {
  const { runtimeAttrs } = ops[op];
  return runtimeAttrs ? Object.fromEntries(Object.entries(attrs).filter(([name]) => !runtimeAttrs.includes(name))) : attrs;
}

/** Returns whether an instruction makes rows whose number may exceed their bound. */
/** Returns per block those with which it is paired. */
function partnersOf({ chunks, pairs = [] }: Program): Map<readonly Instruction[], (readonly Instruction[])[]> {
  const partners = new Map<readonly Instruction[], (readonly Instruction[])[]>();
  const add = (block: readonly Instruction[], partner: readonly Instruction[]): void =>
    void partners.set(block, [...(partners.get(block) ?? []), partner]);
  for (const pair of pairs) {
    const [forward, backward] = [chunks[pair.forward]?.forward, chunks[pair.backward]?.backward];
    if (!forward || !backward) continue;
    add(forward, backward);
    add(backward, forward);
  }
  return partners;
}

const mayOverflow = ({ rows }: Compute, buffers: ReadonlyMap<string, Buffer>): boolean =>
  rows !== undefined && buffers.has(`${rows}.needed`);

/** Returns the kernel spec of an instruction. It contains nothing that differs between ranks or layers. */
function kernelSpecOf(i: Compute, mesh: Mesh, buffers: ReadonlyMap<string, Program["buffers"][number]>, sharesDevice: boolean): KernelSpec {
  const operands = [...Object.entries(i.reads), ...Object.entries(i.writes)].map(
    ([name, id]) => [name, entryOf(buffers, id, "buffer")] as const,
  );
  const ragged = raggedOperandOf(i, buffers);
  const spec = {
    op: i.op,
    d: {
      ...kernelAttrs(i),
      ...Object.fromEntries(Object.entries(i.dims).map(([dim, [size, subAxes]]) => [dim, size / shardCount(mesh, subAxes)])),
    },
    size: Object.fromEntries(operands.map(([name, b]) => [name, elementsOf(b.shape)])),
    // the tensors of a list have equal types
    dtype: Object.fromEntries(operands.flatMap(([name, b]) => (isOfFirst(name) ? [[name, b.dtype]] : []))),
    accumulates: new Set(i.accumulates?.filter(isOfFirst)),
    bound: ragged?.shape[0] ?? 0,
    ...(i.blocks && { blocks: i.blocks.map(({ stride }) => stride) }),
    makesRows: i.rows !== undefined,
    ...(i.tensors !== undefined && { tensors: i.tensors }),
    mayOverflow: mayOverflow(i, buffers),
    ...(sharesDevice && { sharesDevice }),
  };
  return { ...spec, name: `${spec.op}_${sha256(canonical({ ...spec, accumulates: [...spec.accumulates].sort() })).slice(0, 8)}` };
}

function generateKernel(spec: KernelSpec, dims: readonly string[], target: Target, sources: Map<string, string>): Kernel {
  const made = target.generate(spec);
  return {
    id: spec.name,
    op: spec.op,
    dtypes: Object.values(spec.dtype).join("."),
    sizes: Object.fromEntries(Object.entries(spec.d).filter(([name]) => dims.includes(name))),
    attrs: Object.fromEntries(Object.entries(spec.d).filter(([name]) => !dims.includes(name))),
    ...(spec.blocks && { blocks: [...spec.blocks] }),
    ...(spec.accumulates.size ? { accumulates: [...spec.accumulates] } : {}),
    uses: 0,
    ...(made ? { source: sourceFile(spec.name, made, target, sources) } : {}),
    scratch: made?.scratch ?? 0,
    launches: (made?.launches ?? []).map(planLaunch),
  };
}

/** Formats kernels for `--emit kernels`. */
export const printKernels = (kernels: readonly Kernel[]): string =>
  kernels
    .map((k) => {
      const dims = Object.entries({ ...k.attrs, ...k.sizes, ...(k.blocks && { blocks: k.blocks }) }).map(([d, n]) => `${d}=${n}`);
      return `${String(k.uses).padStart(8)} x ${[k.id, k.dtypes, ...dims].join(" ")}\n`;
    })
    .join("");
