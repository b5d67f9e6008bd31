/** The differences of two plans as Markdown, for a comment on a pull request: consequences first, programs details. */
import { printable } from "../../schemas/printable.ts";
import { bytesText, countText, flopsText, ranges, secondsText } from "../units.ts";
import type { PlanDiff, SummaryChange } from "./diff.ts";
import { instructionsOf, percentText, sortedSummary, valueText } from "./diffText.ts";
import { axisTitle } from "./overview.ts";
import { placedText } from "./placementChanges.ts";
import type { ProgramChange } from "./programChanges.ts";

/** The longest comment: GitHub takes 65,536 characters. */
const LONGEST = 60_000;

/** Formats the differences as Markdown of at most 60,000 characters. */
export function diffMarkdown(diff: PlanDiff): string {
  const [a, b] = diff.names.map((name) => code(printable(name, 60)));
  const title = a === b ? a : `${a} → ${b}`;
  if (!diff.changes) return `### ${title}: no difference\n\nThe plans are the same.\n`;
  const marks = { worse: "🔺", better: "🔽", other: "▫️" } as const;
  const parts = [
    `### ${title}`,
    section(
      "Job",
      ["key", "before", "after"],
      diff.job.map((c) => [code(c.path), code(valueText(c, "old")), code(valueText(c, "new"))]),
    ),
    diff.consequences.length > 0
      ? `**Consequences**, the gravest first (🔺 costs more, 🔽 costs less)\n\n${diff.consequences.map((c) => `- ${marks[c.is]} ${text(c.text)}`).join("\n")}`
      : "",
    section(
      "Placement",
      ["axis", "before", "after"],
      diff.placement.map(({ axis, old, new: now }) => [text(axisTitle(axis)), placedText(old), placedText(now)]),
    ),
    details(
      `Summary of a rank: ${countText(diff.summary.length)} figures`,
      table(["stages", "what", "before", "after", "change"], sortedSummary(diff.summary, true).map(summaryRow)),
    ),
    details(programTitle(diff.program), diff.program.map((p) => `- ${programText(p)}`).join("\n")),
  ].filter((part) => part !== "");
  const whole = `${parts.join("\n\n")}\n`;
  return whole.length <= LONGEST ? whole : shortened(parts);
}

/** Drops lines of the last part until the text fits. */
function shortened(parts: readonly string[]): string {
  const head = parts.slice(0, -1).join("\n\n");
  const tail = "\n\n… cut: `rankc diff --only program` shows all\n\n</details>\n";
  const room = Math.max(0, LONGEST - head.length - tail.length - 2);
  const last = parts.at(-1) ?? "";
  return `${head.slice(0, LONGEST - tail.length - 2)}\n\n${last.slice(0, last.lastIndexOf("\n", room))}${tail}`;
}

const text = (words: string): string =>
  words.replace(/[\\|<>`*_[\]]/g, (c) => (c === "<" ? "&lt;" : c === ">" ? "&gt;" : `\\${c}`)).replaceAll("-&gt;", "→");
/** Returns text as code; a text with backticks gets longer fences. */
const code = (words: string): string => {
  const clean = words.replaceAll("\n", " ").replaceAll("|", "\\|");
  return clean.includes("`") ? `\`\` ${clean} \`\`` : `\`${clean}\``;
};

function table(heads: readonly string[], rows: readonly (readonly string[])[]): string {
  if (rows.length === 0) return "";
  const line = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;
  return [line(heads), line(heads.map(() => "---")), ...rows.map(line)].join("\n");
}

const section = (title: string, heads: readonly string[], rows: readonly (readonly string[])[]): string =>
  rows.length === 0 ? "" : `**${title}**\n\n${table(heads, rows)}`;

const details = (title: string, body: string): string =>
  body === "" ? "" : `<details><summary>${text(title)}</summary>\n\n${body}\n\n</details>`;

const units = { bytes: bytesText, flops: flopsText, count: countText, seconds: secondsText } as const;
const summaryRow = (c: SummaryChange): string[] => [
  ranges(c.stages),
  text(c.what),
  units[c.unit](c.old),
  units[c.unit](c.new),
  percentText(c.old, c.new),
];

const programTitle = (program: readonly ProgramChange[]): string =>
  `Program: ${countText(instructionsOf(program, "added"))} instructions added, ${countText(instructionsOf(program, "removed"))} removed, ${countText(instructionsOf(program, "changed"))} changed`;

function programText({ change, phase, id, does, layers, stages, differences }: ProgramChange): string {
  const where = [phase, ...(layers.length > 0 ? [`layers ${ranges(layers)}`] : []), `stages ${ranges(stages)}`].join(", ");
  const what = differences.map((d) => `${text(d.what)} ${code(d.old)} → ${code(d.new)}`).join("; ");
  return `${change} ${code(id)} (${text(does)}; ${where})${what ? `: ${what}` : ""}`;
}
