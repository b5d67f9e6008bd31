/**
 * Validators of the plan's JSON Schema. Compiling the schema takes longer than validating a large plan, so `npm run build` writes a compiled
 * validator beside the package's code; it says only whether a plan fits. A checkout compiles the schema on first use, and so does a package to
 * find what is wrong.
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import type { Ajv, ErrorObject, ValidateFunction } from "ajv";
import { readPackageFile, root } from "../packageFile.ts";

/** `additive` is for newer minor versions, which may add keys: unknown keys are valid. */
type Strictness = "exact" | "additive";

// ajv takes longer to load than the built validator, which does without it
const load = createRequire(import.meta.url);
/** The file of the built validator. A checkout, whose modules are TypeScript, has none: it could be of another state of the schema. */
export const builtValidator = import.meta.url.endsWith(".ts") ? "" : fileURLToPath(new URL("dist/src/plan/planValidator.cjs", root));
const known = new Map<Strictness, ValidateFunction>();

/** Returns whether a value fits the schema of plans. */
export function fitsSchema(value: unknown, strictness: Strictness): boolean {
  const fits: (value: unknown) => unknown =
    strictness === "exact" && existsSync(builtValidator) ? load(builtValidator) : planValidator(strictness);
  return fits(value) === true;
}

/** Returns the faults of a value that does not fit the schema of plans, with the faulty data. */
export function schemaErrors(value: unknown, strictness: Strictness): readonly ErrorObject[] {
  const validate = planValidator(strictness);
  validate(value);
  return validate.errors ?? [];
}

function planValidator(strictness: Strictness): ValidateFunction {
  // definitions stay functions: a plan's schema uses that of an instruction four times
  const validate =
    known.get(strictness) ??
    openAjv({ strict: false, validateFormats: false, verbose: true, inlineRefs: false }).compile(planSchema(strictness));
  known.set(strictness, validate);
  return validate;
}

/** Returns an ajv for the validator that says only whether a plan fits: it has no messages, and looks at the kind of an instruction first. */
export const openFastAjv = (): Ajv =>
  openAjv({ strict: false, validateFormats: false, messages: false, inlineRefs: false, discriminator: true, code: { source: true } });

function openAjv(options: import("ajv").Options): Ajv {
  const ajv: typeof import("ajv") = load("ajv");
  return new ajv.Ajv(options);
}

/** Returns the published JSON Schema of plans. */
function planSchema(strictness: Strictness): object {
  const open = (key: string, value: unknown): unknown => (key === "additionalProperties" && value === false ? undefined : value);
  return JSON.parse(readPackageFile("schemas/plan.schema.json"), strictness === "additive" ? open : undefined);
}

/** Returns the schema of plans for `openFastAjv`: it names the key that selects the variant of a union, and has no descriptions. */
export function fastPlanSchema(): object {
  return JSON.parse(readPackageFile("schemas/plan.schema.json"), (key, value: unknown) => {
    if (key === "description" && typeof value === "string") return undefined;
    return isTaggedUnion(value) ? { ...value, type: "object", required: ["kind"], discriminator: { propertyName: "kind" } } : value;
  });
}

/** Returns whether a schema is a union whose variants each name their kinds. */
function isTaggedUnion(schema: unknown): schema is { readonly oneOf: readonly Variant[] } {
  if (typeof schema !== "object" || schema === null || !("oneOf" in schema) || !Array.isArray(schema.oneOf)) return false;
  return schema.oneOf.every(({ properties }: Variant) => properties?.kind?.const !== undefined || properties?.kind?.enum !== undefined);
}
interface Variant {
  readonly properties?: { readonly kind?: { readonly const?: unknown; readonly enum?: unknown } };
}
