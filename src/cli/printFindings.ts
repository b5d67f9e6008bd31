/** Prints findings in one of the formats of `check` and `compile --check`. */
import type { Finding } from "../frontend/diagnostic.ts";
import type { Texts } from "../frontend/findingJson.ts";
import { printFindings } from "./loadPlan.ts";
import { printJson, printStdout } from "./output.ts";

/** Formats of findings: for people, for programs, for code scanning, and as annotations of GitHub. */
export const findingFormats = ["text", "json", "sarif", "github"] as const;
/** One of these formats. */
export type FindingFormat = (typeof findingFormats)[number];

/** Prints findings: as text on stderr, else on stdout. `texts`: the files that they are in. `more`: further keys of the JSON format. */
export async function printFindingsAs(
  format: FindingFormat,
  findings: readonly Finding[],
  texts: Texts,
  more: Readonly<Record<string, unknown>> = {},
): Promise<void> {
  switch (format) {
    case "text":
      return printFindings(findings);
    case "json":
      return printJson({ format_version: "1.0", ...more, ...(await shownFindings(findings, texts)) });
    case "sarif":
      return printJson((await import("../frontend/sarif.ts")).sarifLog(findings, texts));
    case "github": {
      const { workflowCommands } = await import("../frontend/workflowCommands.ts");
      const lines = workflowCommands(findings);
      return lines.length > 0 ? printStdout(lines.join("\n")) : undefined;
    }
    default:
      format satisfies never;
  }
}

/** Returns what JSON has of findings: as many as the text shows, and a count of the others by code. */
export async function shownFindings(findings: readonly Finding[], texts: Texts) {
  const [{ shown }, { findingJson }] = await Promise.all([import("../frontend/diagnostic.ts"), import("../frontend/findingJson.ts")]);
  const first = shown(findings);
  return { findings: first.findings.map((finding) => findingJson(finding, texts)), more: first.more };
}
