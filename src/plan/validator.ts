/**
 * Validators of the plan's JSON Schema. Compiling the schema takes longer than validating a large plan, so `npm run build` writes the
 * compiled validator beside the package's code. A checkout compiles the schema on first use.
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import type { Ajv, ValidateFunction } from "ajv";
import { readPackageFile, root } from "../packageFile.ts";

/** `additive` is for newer minor versions, which may add keys: unknown keys are valid. */
type Strictness = "exact" | "additive";

// ajv takes longer to load than the built validator, which does without it
const load = createRequire(import.meta.url);
/** The file of the built validator. A checkout, whose modules are TypeScript, has none: it could be of another state of the schema. */
export const builtValidator = import.meta.url.endsWith(".ts") ? "" : fileURLToPath(new URL("dist/src/plan/planValidator.cjs", root));
const known = new Map<Strictness, ValidateFunction>();

/** Returns a validator of plans. Its errors hold the faulty data. */
export function planValidator(strictness: Strictness): ValidateFunction {
  const validate: ValidateFunction =
    known.get(strictness) ??
    (strictness === "exact" && existsSync(builtValidator) ? load(builtValidator) : openAjv().compile(planSchema(strictness)));
  known.set(strictness, validate);
  return validate;
}

/** Returns the published JSON Schema of plans. */
export function planSchema(strictness: Strictness): object {
  const open = (key: string, value: unknown): unknown => (key === "additionalProperties" && value === false ? undefined : value);
  return JSON.parse(readPackageFile("schemas/plan.schema.json"), strictness === "additive" ? open : undefined);
}

/** Returns an ajv that keeps the code of its validators. */
export function openAjv(): Ajv {
  const ajv: typeof import("ajv") = load("ajv");
  // definitions stay functions: a plan's schema uses that of an instruction four times
  return new ajv.Ajv({ strict: false, validateFormats: false, verbose: true, inlineRefs: false, code: { source: true } });
}
