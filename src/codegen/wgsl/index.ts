/** The WGSL kernel of every op, by the op's name. */
import type { WgslGenerator } from "../kernelSpec.ts";
import { attention } from "./attention.ts";
import { balance } from "./balance.ts";
import { choice } from "./choice.ts";
import { elementwise } from "./elementwise.ts";
import { latent } from "./latent.ts";
import { linear } from "./linear.ts";
import { moe } from "./moe.ts";
import { norms } from "./norm.ts";
import { optimizer } from "./optimizer.ts";
import { rope } from "./rope.ts";
import { router } from "./router.ts";
import { messages } from "./transport.ts";
import { vocab } from "./vocab.ts";

export const wgslKernels: Readonly<Record<string, WgslGenerator>> = {
  ...attention,
  ...elementwise,
  ...latent,
  ...linear,
  ...norms,
  ...optimizer,
  ...rope,
  ...vocab,
  ...messages,
  ...moe,
  ...router,
  ...balance,
  ...choice,
};
