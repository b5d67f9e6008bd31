/** A job that was imported from another tool, with the treatment of each argument or setting of the source. */
import type { OpenJobBuilder } from "./jobBuilder.ts";
import { type WrittenJob, writeJob } from "./jobText.ts";
import { ImportTrouble, type Problem } from "./problems.ts";

/** The treatment of one argument or setting. */
export interface ArgumentReport {
  /** As in "--lr 1e-4". */
  readonly argument: string;
  /** The keys of the job that were derived from it; empty if it has no effect. */
  readonly keys: readonly string[];
  /** The reason why it has no effect or is omitted. */
  readonly why?: string;
}

/** An imported job. */
export interface ImportedJob extends WrittenJob {
  readonly mapped: readonly ArgumentReport[];
  readonly withoutEffect: readonly ArgumentReport[];
  /** Arguments that were omitted on request. */
  readonly dropped: readonly ArgumentReport[];
  readonly notes: readonly string[];
}

/** The results of an importer, before they are written. */
interface Collected {
  readonly name: string;
  readonly job: OpenJobBuilder<string>;
  readonly problems: readonly Problem[];
  readonly reports: readonly ArgumentReport[];
  readonly dropped: readonly string[];
}

/** Writes the job. Throws an ImportTrouble if there are problems. */
export function makeImported({ name, job, problems, reports, dropped }: Collected): ImportedJob {
  if (problems.length > 0) throw new ImportTrouble(name, problems);
  for (const argument of dropped) job.note(`${argument} is left out on request.`);
  return {
    ...writeJob([{ key: "name", value: name, comment: "" }, ...job.entries], job.notes),
    mapped: reports.filter(({ keys }) => keys.length > 0).map(({ argument, keys }) => ({ argument, keys })),
    withoutEffect: reports.filter(({ keys }) => keys.length === 0),
    dropped: dropped.map((argument) => ({ argument, keys: [], why: "left out on request" })),
    notes: job.notes,
  };
}
