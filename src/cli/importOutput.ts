/** Prints what an importer made: the job to stdout or a file, the summary to stderr, or both as JSON. */
import type { ImportedJob } from "../convert/importedJob.ts";
import type { ProcessExit } from "./options.ts";
import { type Format, printJson, printStderr, printStdout } from "./output.ts";
import { writeFile } from "./outputFiles.ts";

/** Options of importers that report each argument. */
export interface ImportOutput {
  readonly out?: string;
  readonly format: Format;
}

/** Makes a job and prints it. With `--format json`, problems are printed, too, and the exit code is 2. */
export async function printImported(make: () => ImportedJob, { out, format }: ImportOutput, exit: ProcessExit): Promise<void> {
  if (format === "text") {
    const imported = make();
    if (out === undefined) printStdout(imported.text);
    else writeFile(out, imported.text);
    printSummary(imported);
    return;
  }
  const { ImportTrouble } = await import("../convert/problems.ts");
  try {
    const { text, mapped, withoutEffect, dropped, notes } = make();
    if (out !== undefined) writeFile(out, text);
    printJson({ job: text, mapped, without_effect: withoutEffect, dropped, problems: [], notes });
  } catch (error) {
    if (!(error instanceof ImportTrouble)) throw error;
    printJson({ job: null, problems: error.problems });
    exit.setCode(error.exit);
  }
}

function printSummary({ mapped, withoutEffect, dropped, notes }: ImportedJob): void {
  for (const note of notes) printStderr(note);
  const counts = `${mapped.length} mapped, ${withoutEffect.length} without effect on the plan, ${dropped.length} left out on request, 0 unsupported`;
  printStderr(counts);
  for (const why of new Set(withoutEffect.map((report) => report.why))) {
    const alike = withoutEffect.filter((report) => report.why === why);
    printStderr(`  ${alike.map(({ argument }) => argument).join(", ")}: ${why}`);
  }
}
