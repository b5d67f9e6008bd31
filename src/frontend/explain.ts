/** explain: all there is to say about a code. The example is read by the real checks, so it cannot go stale. */
import { stringify } from "yaml";
import { rules, smallest } from "../rules/index.ts";
import type { Finding } from "./diagnostic.ts";
import { readJob, shapeFaults } from "./readJob.ts";
import { mergeYaml, textFaults } from "./source.ts";

export interface Explanation {
  readonly code: string;
  readonly level: Finding["level"];
  readonly title: string;
  readonly why: string;
  /** The part of a job (or the command line) that is wrong. */
  readonly bad: string;
  /** What is said about it. */
  readonly finding: Finding;
}

const texts = Object.values(textFaults);
const laid = [...Object.values(shapeFaults).map((f) => ({ ...f, level: "error" as const })), ...rules];

export const codes: readonly string[] = [...texts, ...laid].map((r) => r.code).sort();

export function explain(code: string): Explanation | undefined {
  const text = texts.find((f) => f.code === code);
  if (text) {
    const set = text.bad.match(/^--set (.*)/)?.[1];
    return set === undefined ? of(text, "error", text.bad) : of(text, "error", smallest, [set]);
  }
  const over = laid.find((f) => f.code === code);
  return over && of(over, over.level, badJob(over.bad));
}

/** The smallest valid job with `bad` laid over it. */
export const badJob = (bad: string): string => stringify(mergeYaml(smallest, bad));

function of(what: Omit<Explanation, "level" | "finding">, level: Finding["level"], job: string, sets: readonly string[] = []): Explanation {
  const { code, title, why, bad } = what;
  const finding = readJob(job, "job.yaml", sets).findings.find((f) => f.code === code);
  if (!finding) throw new Error(`${code} does not speak on its own example`);
  return { code, level, title, why, bad, finding };
}
