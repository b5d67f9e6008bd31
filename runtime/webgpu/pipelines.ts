/**
 * The kernels of the plan on a device: one pipeline per launch, all compiled together. The buffers of a launch are bound as storage in the
 * order of its arguments; its numbers, `start(…)` and `attr(…)`, form one uniform after them.
 */
/// <reference types="@webgpu/types" />
import { sourceOf } from "../../schemas/lookup.ts";
import type { Arg, Kernel } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Gpu } from "./device.ts";

const COMPUTE_STAGE = 4;

/** A compiled entry of a shader. */
export interface ComputePipeline {
  readonly pipeline: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
}
/** A WGSL source with the name that errors show. */
export interface ShaderSource {
  /** The kernel's id and op, for error messages and debuggers. */
  readonly name: string;
  readonly code: string;
  readonly entries: readonly { readonly entry: string; readonly buffers: number; readonly uniform: boolean }[];
}
/** Compiles all entries of a source. */
export type Compile = (source: ShaderSource) => Promise<readonly ComputePipeline[]>;

/** Returns a function that compiles sources on a device; errors name kernel, file and line. */
export function compiler(gpu: Gpu): Compile {
  const { device, adapter } = gpu;
  const layouts = new Map<string, GPUBindGroupLayout>();
  const layoutOf = (buffers: number, uniform: boolean): GPUBindGroupLayout => {
    const key = `${buffers}${uniform}`;
    const known = layouts.get(key);
    if (known) return known;
    const types: GPUBufferBindingType[] = [
      ...Array.from({ length: buffers }, () => "storage" as const),
      ...(uniform ? (["uniform"] as const) : []),
    ];
    const made = device.createBindGroupLayout({
      entries: types.map((type, binding) => ({ binding, visibility: COMPUTE_STAGE, buffer: { type } })),
    });
    layouts.set(key, made);
    return made;
  };
  return async ({ name, code, entries }) => {
    const refused = (why: string): Trouble =>
      new Trouble(
        `${name} does not compile on ${adapter}: ${why}`,
        "compile the plan again with this version of rankc; if that does not help, compile it for webgpu:baseline",
        3,
      );
    // handle the error here: otherwise it becomes an error of the device
    device.pushErrorScope("validation");
    const module = device.createShaderModule({ label: name, code });
    await gpu.done(device.popErrorScope());
    const { messages } = await gpu.done(module.getCompilationInfo());
    const errors = messages.filter(({ type }) => type === "error");
    if (errors.length) {
      const lines = code.split("\n");
      throw refused(
        errors.map((m) => `line ${m.lineNum}:${m.linePos}: ${m.message}\n    ${lines[m.lineNum - 1]?.trim() ?? ""}`).join("\n  "),
      );
    }
    return Promise.all(
      entries.map(async ({ entry, buffers, uniform }) => {
        const layout = layoutOf(buffers, uniform);
        const making = device.createComputePipelineAsync({
          label: name,
          layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
          compute: { module, entryPoint: entry },
        });
        const pipeline = await gpu.done(making).catch((error: unknown) => {
          throw error instanceof Trouble ? error : refused(`${entry}: ${error instanceof Error ? error.message.split("\n\n")[0] : error}`);
        });
        return { pipeline, layout };
      }),
    );
  };
}

/** A number as an argument. */
export type NumberArg = Extract<Arg, { readonly kind: "start" | "block" | "attribute" }>;
/** Returns whether an argument is a number: the start of a shard or of a block, or an attribute. */
export const isNumber = (arg: Arg): arg is NumberArg => arg.kind === "start" || arg.kind === "block" || arg.kind === "attribute";

/** Returns the uniform of the arguments, if they have one: four places for starts of shards and blocks, then the attributes. */
export function uniformOf(args: readonly Arg[], integerOf: (arg: NumberArg) => number): number[] | undefined {
  const numbers = args.filter(isNumber);
  const isAttribute = ({ kind }: NumberArg): boolean => kind === "attribute";
  const starts = numbers.filter((arg) => !isAttribute(arg)).map(integerOf);
  const attrs = numbers.filter(isAttribute).map(integerOf);
  if (attrs.length) return [0, 1, 2, 3].map((n) => starts[n] ?? 0).concat(attrs);
  return starts.length ? starts : undefined;
}

/** The pipelines of the launches, by kernel id. */
export async function compileKernels(
  compile: Compile,
  kernels: readonly Kernel[],
  text: (file: string) => string,
): Promise<Map<string, readonly ComputePipeline[]>> {
  const made = kernels.map(async (k) => {
    const { file } = sourceOf(k);
    const entries = k.launches.map(({ entry, args }) => ({
      entry,
      buffers: args.filter((a) => !isNumber(a)).length,
      uniform: args.some(isNumber),
    }));
    return [k.id, await compile({ name: `kernel ${k.id} of ${k.op} (kernels/${file})`, code: text(file), entries })] as const;
  });
  return new Map(await Promise.all(made));
}
