/** The WGSL kernel of every op, by the op's name. */
import type { Profile } from "../../target.ts";
import type { Made, Use } from "../kernel.ts";
import { elementwise } from "./elementwise.ts";
import { linear } from "./linear.ts";

export type WgslMaker = (use: Use, profile: Profile) => Made;

export const wgslKernels: Readonly<Record<string, WgslMaker>> = {
  ...elementwise,
  ...linear,
};
