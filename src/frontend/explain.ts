/** Explanations of codes. The example is checked by the rules themselves, so it stays correct. */
import { stringify } from "yaml";
import { rules } from "../rules/all.ts";
import { smallest } from "../rules/index.ts";
import type { Changes, Finding } from "./diagnostic.ts";
import { readJob } from "./readJobNow.ts";
import { shapeFaults } from "./shapeFaults.ts";
import { mergeYaml, setPath, textFaults } from "./source.ts";

/** The explanation of a code. */
export interface Explanation {
  readonly code: string;
  readonly level: Finding["level"];
  readonly title: string;
  readonly why: string;
  /** The invalid part of a job or of the command line. */
  readonly bad: string;
  /** The finding that it causes. */
  readonly finding: Finding;
  /** `bad` with the fix of the finding; undefined if the fix is a choice. */
  readonly corrected?: string;
}

const texts = Object.values(textFaults);
const declared = [...Object.values(shapeFaults).map((f) => ({ ...f, level: "error" as const })), ...rules];

/** All codes, sorted. */
export const codes: readonly string[] = [...texts, ...declared].map((r) => r.code).sort();

/** Returns the explanation of a code; undefined if the code does not exist. */
export function explain(code: string): Explanation | undefined {
  const text = texts.find((f) => f.code === code);
  if (text) {
    const set = text.bad.match(/^--set (.*)/)?.[1];
    return set === undefined ? of(text, "error", text.bad) : of(text, "error", smallest, [set]);
  }
  const over = declared.find((f) => f.code === code);
  return over && of(over, over.level, badJob(over.bad));
}

/** Returns the smallest valid job, merged with `bad`. */
export const badJob = (bad: string): string => stringify(mergeYaml(smallest, bad));

/** Returns YAML with changes applied. */
function correct(bad: string, set: Changes): string {
  const value = mergeYaml("{}", bad.startsWith("--set") ? "{}" : bad);
  for (const [path, to] of Object.entries(set)) setPath(value, path.split("."), to);
  return Object.entries(value)
    .map(([key, section]) => `${key}: ${stringify(section, { collectionStyle: "flow", lineWidth: 0 })}`)
    .join("");
}

function of(
  what: Pick<Explanation, "code" | "title" | "why" | "bad">,
  level: Finding["level"],
  job: string,
  sets: readonly string[] = [],
): Explanation {
  const { code, title, why, bad } = what;
  const finding = readJob(job, "job.yaml", sets).findings.find((f) => f.code === code);
  if (!finding) throw new Error(`${code} has no finding on its example`);
  return { code, level, title, why, bad, finding, ...(finding.set && { corrected: correct(bad, finding.set) }) };
}
