/** The norms of a model, of the type and with the gains that the job asks for. */
import { headLayernorm, headNorm, layernorm, rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import type { ModuleBuilder } from "./builder.ts";

/** What a norm is called: its gain (a layer norm's bias is `<gain>_bias`) and its node. */
interface Named {
  readonly gain: string;
  readonly id: string;
  /** Added to the mean square; default: that of the model's norms. */
  readonly eps?: number;
}

/** Normalises rows of the width `dim`, a letter of builder.ts. */
export function normed(module: ModuleBuilder, x: Value, dim: string, { gain, id, eps }: Named): Value {
  const { type } = module.job.model.norm;
  const [gains, attrs] = gainsOf(module, dim, gain, eps);
  if (type === "rmsnorm") return rmsnorm.of({ x, gain: gains }, attrs, id);
  return layernorm.of({ x, gain: gains, bias: module.bias(`${gain}_bias`, dim) }, attrs, id);
}

/** Normalises each head of C channels; all heads share the gain. */
export function headsNormed(module: ModuleBuilder, x: Value, { gain, id }: Named): Value {
  const { norm, head_dim: C } = module.job.model;
  const [gains, attrs] = gainsOf(module, "C", gain);
  if (norm.type === "rmsnorm") return headNorm.of({ x, gain: gains }, { C, ...attrs }, id);
  return headLayernorm.of({ x, gain: gains, bias: module.bias(`${gain}_bias`, "C") }, { C, ...attrs }, id);
}

/** Returns the gain and the attributes of a norm. A gain that is stored less 1 starts at 0. */
function gainsOf(module: ModuleBuilder, dim: string, name: string, own?: number) {
  const { zero_centered, eps } = module.job.model.norm;
  const gain = zero_centered ? module.bias(name, dim) : module.gain(name, dim);
  return [gain, { eps: own ?? eps, ...(zero_centered && { offset: 1 }) }] as const;
}
