import { type Command, Option } from "commander";
import { type ProcessExit, withExamples } from "./options.ts";

/** Registers `lsp`: a language server for jobs on stdin and stdout. */
export function registerLsp(program: Command, exit: ProcessExit): void {
  withExamples(
    program
      .command("lsp")
      .description("language server of jobs on stdin and stdout: findings while typing, fixes, hover, completion (docs/editors.md)")
      .addOption(new Option("--stdio", "what editors add; it is the only way to connect"))
      .addOption(new Option("--memory-findings", "read a job from stdin, print the findings that need a compiled plan").hideHelp()),
    "lsp",
  ).action(async ({ memoryFindings }: { memoryFindings?: true }) => {
    const { interpretSchemas } = await import("./zodSettings.ts");
    interpretSchemas();
    if (memoryFindings) return (await import("./lsp/memoryFindings.ts")).printMemoryFindings();
    const { serveEditor } = await import("./lsp/server.ts");
    exit.setCode(await serveEditor(process.stdin, process.stdout));
  });
}
