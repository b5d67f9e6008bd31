/** The spec of `arrange` (src/ops/rearrange.ts) for all targets: a copy along several dims, in vectors. */
import type { arrange } from "../ops/rearrange.ts";
import { numbered, type SpecOf } from "./kernelSpec.ts";

/** A copy of `vectors` vectors of `width` elements, over dims of these sizes (in vectors) and strides. */
export interface Arrangement {
  readonly width: number;
  readonly vectors: number;
  readonly dims: readonly { readonly size: number; readonly stride: number }[];
}

/**
 * Returns the copy of a spec. `widthOf` returns the vector width that divides all sizes; the vectors lie along the last dim if its elements
 * are contiguous. Strides are in elements or in vectors.
 */
export function arrangementOf(
  spec: SpecOf<typeof arrange>,
  widthOf: (...sizes: number[]) => number,
  unit: "elements" | "vectors",
): Arrangement {
  const [sizes, strides] = [numbered(spec, "n"), numbered(spec, "s")];
  const [innerSize, innerStride] = [sizes.at(-1), strides.at(-1)];
  const isVector = innerSize !== undefined && innerStride === 1;
  const width = isVector ? widthOf(innerSize, ...strides.slice(0, -1), ...(spec.blocks ?? [])) : 1;
  const dims = sizes.map((size, i) => {
    const stride = strides[i] ?? 1;
    const isInner = i === sizes.length - 1;
    if (unit === "elements") return isInner ? { size: size / width, stride: stride * width } : { size, stride };
    return isInner ? { size: size / width, stride } : { size, stride: stride / width };
  });
  return { width, vectors: spec.size.y / width, dims };
}
