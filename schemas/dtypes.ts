/**
 * The table of element types. Everything that depends on a dtype reads its row: a new type is a new row, and the compiler lists the tables
 * that need an entry for it.
 */
import { bf16Codec, type Codes, type FloatCodec, f8e4m3Codec, f16Codec } from "./floatCodec.ts";
import { Trouble } from "./trouble.ts";

/** The elements in memory have the values themselves, or codes that a codec converts to float32. */
type InMemory =
  | { readonly array: Float32ArrayConstructor | Int32ArrayConstructor; readonly codec: null }
  | { readonly array: Uint16ArrayConstructor | Uint8ArrayConstructor; readonly codec: FloatCodec };

/** Names of a 16-bit float in templates of CUDA: the type, the suffix of helpers, and the function of a matrix product. */
export interface Float16Names {
  readonly half: string;
  readonly suffix: string;
  readonly mma: string;
}

/** The row of a dtype. Null where no kernel handles the type. */
export type DtypeRow = InMemory & {
  readonly kind: "float" | "integer";
  readonly bytes: 1 | 2 | 4;
  /** The type in CUDA; `helpers`: the template that declares it, if the prelude does not. */
  readonly cuda: {
    readonly type: string;
    readonly helpers: "cuda/f16.cuh" | null;
    readonly float16: Float16Names | null;
  } | null;
  /** The type in WGSL, and the feature that a source enables for it. */
  readonly wgsl: { readonly type: "f32" | "f16" | "i32"; readonly feature: "f16" | null } | null;
  /** ncclDataType_t in nccl.h. */
  readonly nccl: number;
  /** CUtensorMapDataType in cuda.h. */
  readonly tensorMap: number;
  /** The name in a header of safetensors. */
  readonly safetensors: string;
};

const rows = {
  f32: {
    ...{ kind: "float", bytes: 4, array: Float32Array, codec: null },
    cuda: { type: "float", helpers: null, float16: null },
    wgsl: { type: "f32", feature: null },
    ...{ nccl: 7, tensorMap: 7, safetensors: "F32" },
  },
  bf16: {
    ...{ kind: "float", bytes: 2, array: Uint16Array, codec: bf16Codec },
    cuda: { type: "bf16", helpers: null, float16: { half: "bf16", suffix: "", mma: "mmaBf16" } },
    wgsl: null,
    ...{ nccl: 9, tensorMap: 9, safetensors: "BF16" },
  },
  f16: {
    ...{ kind: "float", bytes: 2, array: Uint16Array, codec: f16Codec },
    cuda: { type: "f16", helpers: "cuda/f16.cuh", float16: { half: "f16", suffix: "F16", mma: "mmaF16" } },
    wgsl: { type: "f16", feature: "f16" },
    ...{ nccl: 6, tensorMap: 6, safetensors: "F16" },
  },
  f8e4m3: {
    ...{ kind: "float", bytes: 1, array: Uint8Array, codec: f8e4m3Codec },
    ...{ cuda: null, wgsl: null },
    // a tensor map copies the codes as unsigned bytes
    ...{ nccl: 10, tensorMap: 0, safetensors: "F8_E4M3" },
  },
  i32: {
    ...{ kind: "integer", bytes: 4, array: Int32Array, codec: null },
    cuda: { type: "int", helpers: null, float16: null },
    wgsl: { type: "i32", feature: null },
    ...{ nccl: 2, tensorMap: 3, safetensors: "I32" },
  },
} as const satisfies Record<string, DtypeRow>;

/** The name of an element type. */
export type Dtype = keyof typeof rows;

/** All element types by name. */
export const dtypes: Readonly<Record<Dtype, DtypeRow>> = rows;

/** Bytes of an element of each type. */
export const bytesOf = Object.fromEntries(Object.entries(rows).map(([name, { bytes }]) => [name, bytes])) as Readonly<
  Record<Dtype, number>
>;

/** The names of all element types, for schemas. */
export const dtypeNames = Object.keys(rows) as [Dtype, ...Dtype[]];

/** The 16-bit floats that CUDA kernels multiply on matrix units. */
export type Float16 = { [D in Dtype]: (typeof rows)[D]["cuda"] extends { readonly float16: Float16Names } ? D : never }[Dtype];

/** Names of the 16-bit floats in templates of CUDA. */
export const float16Types: Readonly<Record<Float16, Float16Names>> = { bf16: rows.bf16.cuda.float16, f16: rows.f16.cuda.float16 };

/** Returns whether a type is a 16-bit float that CUDA kernels multiply on matrix units. */
export const isFloat16 = (dtype: Dtype): dtype is Float16 => Object.hasOwn(float16Types, dtype);

/** Returns the CUDA type of an element. Throws a Trouble for a type that no CUDA kernel handles. */
export function cudaType(dtype: Dtype): string {
  const { cuda } = dtypes[dtype];
  if (cuda === null) throw new Trouble(`no CUDA kernel handles ${dtype}`, "write train.precision: bf16, fp16 or fp32");
  return cuda.type;
}

/** Returns the WGSL type of an element. Throws a Trouble for a type that WGSL does not have. */
export function wgslType(dtype: Dtype): "f32" | "f16" | "i32" {
  const { wgsl } = dtypes[dtype];
  if (wgsl === null)
    throw new Trouble(
      `the job has values in ${dtype}, which WebGPU does not have`,
      "write train.precision: fp32, without train.gradient_reduction: bf16, or compile for cuda",
    );
  return wgsl.type;
}

/** Returns the feature that WGSL needs for elements of these types; undefined if WebGPU's core has all of them. */
export const wgslFeature = (types: readonly Dtype[]): "f16" | undefined =>
  types.map((dtype) => dtypes[dtype].wgsl?.feature).find((feature) => feature !== null && feature !== undefined) ?? undefined;

/** Returns the directives of a WGSL source with elements of these types. */
export function wgslDirectives(types: readonly Dtype[]): string {
  const feature = wgslFeature(types);
  return feature === undefined ? "" : `enable ${feature};\n`;
}

/** Elements in memory: their values, or codes with the codec that converts them. */
export type TypedMemory =
  | { readonly codec: null; readonly words: Float32Array | Int32Array }
  | { readonly codec: FloatCodec; readonly words: Codes };

/** Returns a view of elements in memory. `offset`: bytes; `count`: elements, by default all that fit. */
export function typedMemory(dtype: Dtype, memory: ArrayBuffer, offset = 0, count?: number): TypedMemory {
  const row = dtypes[dtype];
  return row.codec === null
    ? { codec: null, words: new row.array(memory, offset, count) }
    : { codec: row.codec, words: new row.array(memory, offset, count) };
}

/** Returns the values of elements: the memory itself if it has values, otherwise a decoded copy. */
export function valuesIn(memory: TypedMemory): Float32Array | Int32Array {
  if (memory.codec === null) return memory.words;
  const values = new Float32Array(memory.words.length);
  memory.codec.decode(values, memory.words);
  return values;
}

/** Stores values; a codec rounds them. */
export function storeValues(memory: TypedMemory, values: Float32Array | Int32Array): void {
  if (memory.codec === null) memory.words.set(values);
  else memory.codec.encode(memory.words, values instanceof Float32Array ? values : Float32Array.from(values));
}

/** Returns values as elements: in new memory, or the given array if it has the elements of this type. */
export function encoded(dtype: Dtype, values: Float32Array | Int32Array): TypedMemory {
  const row = dtypes[dtype];
  if (row.codec === null && values instanceof row.array) return { codec: null, words: values };
  const memory = typedMemory(dtype, new ArrayBuffer(values.length * dtypes[dtype].bytes));
  storeValues(memory, values);
  return memory;
}
