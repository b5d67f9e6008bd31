/** What the sections of a job read and write. */

import type { JobBuilder } from "../../jobBuilder.ts";
import type { Arguments } from "../arguments/read.ts";
import type { MappedName } from "../arguments/spec.ts";

/** The arguments of a launch, and the job that is made of them. */
export interface Importing {
  readonly args: Arguments;
  readonly job: JobBuilder<MappedName>;
}
