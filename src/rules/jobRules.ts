/** The rules that need no compiled program. They read a whole job, and load no schema. */
import { balance } from "./balance.ts";
import { batch } from "./batch.ts";
import { cluster } from "./cluster.ts";
import { data } from "./data.ts";
import { dropout } from "./dropout.ts";
import { efficiency } from "./efficiency.ts";
import { mesh } from "./mesh.ts";
import { model } from "./model.ts";
import { moe } from "./moe.ts";
import { mtp } from "./mtp.ts";
import { overlap } from "./overlap.ts";
import { precision } from "./precision.ts";
import { rampup } from "./rampup.ts";
import { recompute } from "./recompute.ts";
import { router } from "./router.ts";
import type { Rule } from "./rule.ts";
import { trainingSchedule } from "./trainingSchedule.ts";

/** Rules without compiled programs; they are applied again to every candidate change. */
export const jobRules: readonly Rule[] = [
  ...mesh,
  ...overlap,
  ...batch,
  ...data,
  ...trainingSchedule,
  ...precision,
  ...rampup,
  ...recompute,
  ...model,
  ...dropout,
  ...mtp,
  ...moe,
  ...router,
  ...balance,
  ...cluster,
  ...efficiency,
];
