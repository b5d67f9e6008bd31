/** Writes the JSON Schemas of the job and of the plan beside their sources: `npx tsx schemas/generate.ts`. */
import { writeFileSync } from "node:fs";
import { z } from "zod";
import { DeviceProfile } from "./deviceProfile.ts";
import { jobSchema } from "./jobSchema.ts";
import { Plan } from "./plan.ts";

const text = (schema: Record<string, unknown>): string => `${JSON.stringify(schema, null, 2)}\n`;

/** Returns the content of each committed schema file. */
export const generated = (): Record<"job.schema.json" | "plan.schema.json" | "device-profile.schema.json", string> => ({
  "job.schema.json": text(jobSchema()),
  "plan.schema.json": text({ title: "rankc plan", ...z.toJSONSchema(Plan, { target: "draft-07", io: "output" }) }),
  "device-profile.schema.json": text({
    title: "rankc device profile",
    ...z.toJSONSchema(DeviceProfile, { target: "draft-07", io: "input" }),
  }),
});

if (process.argv[1]?.endsWith("generate.ts"))
  for (const [file, content] of Object.entries(generated())) writeFileSync(new URL(file, import.meta.url), content);
