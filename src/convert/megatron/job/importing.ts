/** The input and output of the functions that write the sections of a job. */

import type { JobBuilder } from "../../jobBuilder.ts";
import type { Arguments } from "../arguments/read.ts";
import type { MappedName } from "../arguments/spec.ts";

/** The arguments of a launch, and the job under construction. */
export interface Importing {
  readonly args: Arguments;
  readonly job: JobBuilder<MappedName>;
}
