import type { Command } from "commander";
import { type CommonOptions, withExamples, withFormat } from "./options.ts";
import { printJson, printStdout, reportWidth } from "./output.ts";

/** Registers `explain`: prints the explanation of one code, or the list of all codes. */
export function registerExplain(program: Command): void {
  withExamples(
    withFormat(program.command("explain").description("explain the code of a finding; without a code, list all")).argument(
      "[code]",
      "for example P101",
    ),
    "explain P101",
    "explain",
  ).action(async (code: string | undefined, options: Pick<CommonOptions, "format">) => {
    const { explainAll, explained, printExplanation } = await import("../frontend/explainText.ts");
    const json = options.format === "json";
    if (code !== undefined) return json ? printJson(explained(code)) : printStdout(printExplanation(explained(code), reportWidth()));
    const all = explainAll().map(({ code, level, title }) => ({ code, level, title }));
    return json ? printJson(all) : printStdout(all.map((e) => `${e.code}  ${e.title}`).join("\n"));
  });
}
