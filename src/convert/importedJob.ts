/** A job made from a description of another tool, and what became of each part of the description. */
import type { OpenJobBuilder } from "./jobBuilder.ts";
import { type WrittenJob, writeJob } from "./jobText.ts";
import { ImportTrouble, type Problem } from "./problems.ts";

/** What the importer made of one argument or setting. */
export interface ArgumentReport {
  /** As in "--lr 1e-4". */
  readonly argument: string;
  /** The keys of the job that depend on it; empty if none does. */
  readonly keys: readonly string[];
  /** Why it has no effect, or why it is left out. */
  readonly why?: string;
}

/** An imported job. */
export interface ImportedJob extends WrittenJob {
  readonly mapped: readonly ArgumentReport[];
  readonly withoutEffect: readonly ArgumentReport[];
  /** What was left out on request. */
  readonly dropped: readonly ArgumentReport[];
  readonly notes: readonly string[];
}

/** What an importer collected. */
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
