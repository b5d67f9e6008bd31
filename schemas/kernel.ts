/** The schema of a plan's kernels: sources, launches and the arguments of launches. */
import { z } from "zod";
import { dtypeNames } from "./dtypes.ts";
import { opNames } from "./opNames.ts";
import { WEIGHTS } from "./weightsKernel.ts";

/** A number of things in a plan, or an index. */
export const count = z.int().min(0);
/** The id of a buffer, an instruction or a function. */
export const id = z.string().min(1);
/** A file name without separators and `..`. */
const plainName = z.string().regex(/^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$/);
/** The name of an element type. */
export const DtypeText = z.enum(dtypeNames);

/** The arguments of cuTensorMapEncodeTiled for an operand, innermost dim first. Elements out of bounds read as zero. */
export const TensorMap = z.strictObject({
  kind: z.literal("tensor_map"),
  tensor: z.string().describe("the operand"),
  dtype: DtypeText,
  sizes: z.array(count),
  strides: z.array(count).describe("bytes; of every dim but the innermost"),
  box: z.array(count).describe("elements copied at once"),
  swizzle: z.enum(["none", "32B", "64B", "128B"]),
});
/** A value of the schema `TensorMap`. */
export type TensorMap = z.infer<typeof TensorMap>;

/** An argument of a launch. */
export const Arg = z.discriminatedUnion("kind", [
  z.strictObject({ kind: z.literal("operand"), name: z.string() }).describe("the address of an operand of the op"),
  z
    .strictObject({ kind: z.literal("tensors"), name: z.string(), count: count.min(2) })
    .describe("the addresses of an operand of all tensors of the instruction, one after another"),
  z.strictObject({ kind: z.literal("rows") }).describe("the address of the index buffer of the ragged operands"),
  z.strictObject({ kind: z.literal("needed") }).describe("the address of the i32 that receives the number of rows an index needed"),
  z.strictObject({ kind: z.literal("scratch"), offset: count }).describe("the address of a byte of the scratch arena"),
  z.strictObject({ kind: z.literal("start"), dim: z.string() }).describe("the global index of this rank's first element of a dim"),
  z
    .strictObject({ kind: z.literal("block") })
    .describe("the first element of this rank's block of the input (`blocks` of the instruction)"),
  z.strictObject({ kind: z.literal("attribute"), name: z.string() }).describe("an attribute of the instruction, as 32 bits"),
  TensorMap,
]);
/** An argument of a launch. */
export type Arg = z.infer<typeof Arg>;

/** One launch of a kernel. A kernel with several runs them in order. */
export const Launch = z.strictObject({
  entry: id.describe("the function in the source"),
  grid: z.tuple([count, count, count]).describe("thread blocks (workgroups)"),
  threads: count.describe("per block"),
  shared: count.describe("bytes of dynamic shared memory (CUDA)"),
  args: z.array(Arg),
});
/** A value of the schema `Launch`. */
export type Launch = z.infer<typeof Launch>;

/** One kernel: op, local sizes, types, sources and launches, and the number of instructions that use it. */
export const Kernel = z.strictObject({
  id: plainName,
  op: z.enum([...opNames, WEIGHTS]),
  dtypes: z.string().describe("of its operands, in the order of the op's signature"),
  sizes: z.record(z.string(), z.number()).describe("local size of each dim"),
  attrs: z.record(z.string(), z.number()).describe("attributes that the source depends on"),
  blocks: z.array(count).optional().describe("strides of the blocks of the input, where the instruction has `blocks`"),
  accumulates: z.array(z.string()).optional().describe("outputs that it adds to or updates"),
  uses: count,
  source: z
    .strictObject({ file: plainName, sha256: z.string().regex(/^[0-9a-f]{64}$/) })
    .optional()
    .describe("below kernels/; the target cpu has none"),
  cubin: z
    .strictObject({ file: plainName, sha256: z.string().regex(/^[0-9a-f]{64}$/) })
    .optional()
    .describe("below kernels/, where nvcc compiled the source with the plan"),
  scratch: count.describe("bytes of the scratch arena it uses"),
  launches: z.array(Launch),
});
/** A value of the schema `Kernel`. */
export type Kernel = z.infer<typeof Kernel>;
