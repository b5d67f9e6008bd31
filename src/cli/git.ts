/** `git-setup` makes git show plans as rankc does; `git-driver` is what git then calls. */
import { existsSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import type { Command } from "commander";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { withExamples } from "./options.ts";
import { printReport, printStdout, reportWidth } from "./output.ts";
import { writeFile } from "./outputFiles.ts";

/** The line of .gitattributes: at any depth, a plan.json is compared by the driver, and folded on GitHub. */
const ATTRIBUTE = "plan.json diff=rankc linguist-generated";

/** Registers `git-setup`, and the hidden command that git calls. */
export function registerGit(program: Command): void {
  withExamples(
    program
      .command("git-setup")
      .description("let git compare committed plans as `rankc diff` does: writes .gitattributes and the diff driver of this clone"),
    "git-setup",
  ).action(setUp);
  program.command("git-driver", { hidden: true }).argument("<what>").argument("[args...]").action(drive);
}

async function setUp(): Promise<void> {
  const { git } = await import("./gitFiles.ts");
  const top = git(["rev-parse", "--show-toplevel"], { fix: "change to a folder of the repository that has the plans" }).trimEnd();
  const file = join(top, ".gitattributes");
  const text = existsSync(file) ? readFileSync(file, "utf8") : "";
  const lines = text.split("\n");
  const isWritten = lines.some((line) => line.trim() === ATTRIBUTE);
  const other = lines.find((line) => /^plan\.json\s.*\bdiff=/.test(line) && line.trim() !== ATTRIBUTE);
  if (other !== undefined)
    throw new Trouble(`${file} has another driver for plans: ${other.trim()}`, `remove the line, or replace it by: ${ATTRIBUTE}`);
  if (!isWritten) writeFile(file, `${text}${text === "" || text.endsWith("\n") ? "" : "\n"}${ATTRIBUTE}\n`);
  const command = commandLine();
  const settings = {
    "diff.rankc.command": `${command} git-driver diff`,
    "diff.rankc.textconv": `${command} git-driver text`,
    "diff.rankc.cachetextconv": "true",
  };
  for (const [key, value] of Object.entries(settings))
    git(["config", "--local", key, value], { cwd: top, fix: "check that the configuration of the repository can be written" });
  printStdout(
    [
      `${file}: ${isWritten ? "has" : "now has"} the line "${ATTRIBUTE}"${isWritten ? "" : "; commit it"}`,
      "this clone: git diff shows the differences of plans as rankc diff does; git log -p and git show compare their text",
      "each clone needs git-setup once, because git keeps drivers outside the repository",
    ].join("\n"),
  );
}

/** Returns the shell words that start this rankc. */
function commandLine(): string {
  const [, script = "rankc"] = process.argv;
  const quoted = (word: string): string => (/^[\w./@:=-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  // the name of an installed command stays right when the package is updated
  return basename(script) === "rankc" ? quoted(script) : [process.execPath, ...process.execArgv, script].map(quoted).join(" ");
}

/** git gives the text of a plan.json, or, to compare: its path, then file, digest and mode before and after. A plan that cannot be read is a line, because git stops at an error. */
async function drive(what: string, args: readonly string[]): Promise<void> {
  const read = async (file: string): Promise<Plan | string> => {
    const [{ parsePlanText }, { readPlanFile }] = await Promise.all([import("./loadPlan.ts"), import("./inputFiles.ts")]);
    if (file === "/dev/null") return "no plan";
    try {
      return await parsePlanText(readPlanFile(file), basename(file));
    } catch (error) {
      if (error instanceof Trouble) return `not a plan that this rankc reads (${error.message})`;
      throw error;
    }
  };
  if (what === "text") {
    const plan = await read(args[0] ?? "");
    const { printPlanText } = await import("../report/planText.ts");
    return printStdout(typeof plan === "string" ? plan : printPlanText(plan));
  }
  if (what !== "diff" || args.length < 7) throw new Trouble("git-driver is called by git", "run rankc git-setup, then git diff");
  const [path = "", oldFile = "", , , newFile = ""] = args;
  const [before, after] = [await read(oldFile), await read(newFile)];
  printStdout(`diff rankc ${path}`);
  if (typeof before === "string" || typeof after === "string") {
    const text = (side: Plan | string): string => (typeof side === "string" ? side : `plan ${side.digests.plan.slice(0, 16)}`);
    return printStdout(`${text(before)} -> ${text(after)}\n`);
  }
  const [{ diffPlans }, { printDiff }] = await Promise.all([import("../report/diff.ts"), import("../report/diffText.ts")]);
  printReport(`${printDiff(diffPlans(before, after), { width: reportWidth(), isWhole: false })}\n`);
}
