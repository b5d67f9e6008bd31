/** `allow`: the warnings that a job accepts. The rules leave them out (src/rules/index.ts). */
import type { JobText } from "../../schemas/job.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import type { Source } from "../frontend/source.ts";
import { jobRules } from "./jobRules.ts";

/** The fault of an entry that silences nothing. */
export const allowFault = {
  code: "S016",
  title: "allow names no warning",
  why: "allow silences warnings by their code. An error makes a job invalid, so that it cannot be allowed.",
  bad: "allow: [{code: M301, reason: our heads are uneven}]",
} as const;

/** Returns a finding for each entry of `allow` that names no warning. */
export function idleEntries(allow: JobText["allow"], source: Source): readonly Finding[] {
  return (allow ?? []).flatMap((entry, i): Finding[] => {
    const [code, path] = typeof entry === "string" ? [entry, `allow.${i}`] : [entry.code, `allow.${i}.code`];
    const named = jobRules.filter((rule) => rule.code === code);
    if (named.some(({ level }) => level === "warning")) return [];
    const at = source.at(path);
    const found = named.length > 0 ? `${code} is an error` : `no rule has the code ${code}`;
    const fix = named.length > 0 ? "remove the cause of the error" : "rankc check prints the codes of warnings";
    return [{ code: allowFault.code, level: "error", title: allowFault.title, path, found, why: allowFault.why, fix, ...(at && { at }) }];
  });
}
