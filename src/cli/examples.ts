/** `rankc examples`: copies the worked examples, and the schema that editors use for them, from the package into a folder. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { root } from "../packageFile.ts";
import { plural } from "../units.ts";
import { withExamples } from "./options.ts";
import { printStdout } from "./output.ts";
import { writeFolder } from "./outputFiles.ts";

/** Registers `examples`: writes plans/ and schemas/ into a folder; files that are equal already are skipped. */
export function registerExamples(program: Command): void {
  withExamples(
    program
      .command("examples")
      .description("copy the example jobs, their corpus and the schema for editors into a folder")
      .argument("[dir]", "the folder to write plans/ and schemas/ to", ".")
      .option("--overwrite", "replace files that differ"),
    "examples",
    "examples tour/ && rankc check tour/plans/tiny-mixtral/job.yaml",
  ).action((folder: string, { overwrite }: { overwrite?: true }) => {
    const files = examples();
    const changed = [...files].filter(([path, bytes]) => {
      const there = join(folder, path);
      return existsSync(there) && !readFileSync(there).equals(bytes);
    });
    const [first] = changed;
    if (first && !overwrite)
      throw new Trouble(`${join(folder, first[0])} exists and differs from the example`, "name another folder, or add --overwrite");
    const missing = [...files].filter(([path]) => overwrite || !existsSync(join(folder, path)));
    writeFolder(folder, Object.fromEntries(missing));
    printStdout(`${plural(missing.length, "file")} written; start with rankc check ${join(folder, "plans/tiny-mixtral/job.yaml")}`);
  });
}

/** Returns the files of plans/, and the JSON Schemas, by their paths in the package. */
function examples(): Map<string, Buffer> {
  const home = fileURLToPath(root);
  const below = (folder: string, wanted: (path: string) => boolean): string[] =>
    readdirSync(join(home, folder), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name).slice(home.length))
      .filter(wanted);
  const paths = [...below("plans", () => true), ...below("schemas", (path) => path.endsWith(".json"))];
  return new Map(paths.map((path) => [path, readFileSync(join(home, path))]));
}
