import type { Command } from "commander";
import { withExamples } from "./options.ts";
import { printJson } from "./output.ts";

/** Registers `schema`: prints the JSON Schema of a job. */
export function registerSchema(program: Command): void {
  withExamples(
    program.command("schema").description("print the JSON Schema of a job (draft-07), for editors"),
    "schema > job.schema.json",
  ).action(async () => {
    const { jobSchema } = await import("../../schemas/jobSchema.ts");
    printJson(jobSchema());
  });
}
