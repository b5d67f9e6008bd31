/**
 * Findings as workflow commands, which GitHub shows beside the lines of a pull request. Source: GitHub's documentation, "Workflow commands for GitHub
 * Actions": % and line ends are escaped in messages, also : and , in properties.
 */
import type { At, Finding } from "./diagnostic.ts";

/** Returns a command for each finding. */
export const workflowCommands = (findings: readonly Finding[]): string[] => findings.map(commandOf);

function commandOf({ code, level, title, found, fix, at }: Finding): string {
  const properties = { ...placeOf(at), title: `${code}: ${title}` };
  const text = Object.entries(properties)
    .map(([key, value]) => `${key}=${escapedProperty(String(value))}`)
    .join(",");
  return `::${level} ${text}::${escapedMessage(`${found}\nfix: ${fix}${at && "set" in at ? `\nat --set ${at.set}` : ""}`)}`;
}

const placeOf = (at: At | undefined): Readonly<Record<string, string | number>> =>
  at && "file" in at ? { file: at.file, line: at.line, endLine: at.line, col: at.col, endColumn: at.endCol } : {};

const escapedMessage = (text: string): string => text.replaceAll("%", "%25").replaceAll("\r", "%0D").replaceAll("\n", "%0A");
const escapedProperty = (text: string): string => escapedMessage(text).replaceAll(":", "%3A").replaceAll(",", "%2C");
