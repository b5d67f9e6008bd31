/** The JSON Schema of a job file, for editors (draft-07): the schema `JobText`, with `extends`. */
import { z } from "zod";
import { JobText } from "./job.ts";

/** A JSON Schema, as far as this file changes it. */
type Schema = Record<string, unknown>;
const isSchema = (value: unknown): value is Schema => typeof value === "object" && value !== null && !Array.isArray(value);

/** Returns the JSON Schema of a job file. Keys that a job must have are required where the file extends no other. */
export function jobSchema(): Schema {
  const { properties, required, ...rest } = z.toJSONSchema(JobText, { target: "draft-07", io: "input" });
  const schema: Schema = { title: "rankc job", ...rest, properties: { extends: extendsSchema, ...properties }, required };
  const needed = takeRequired(schema);
  return { ...schema, if: { required: ["extends"] }, else: needed };
}

const extendsSchema: Schema = {
  type: "string",
  minLength: 1,
  description: "a file whose keys this job has where it does not write them, relative to this file; it may extend another one",
};

/** Removes `required` from a schema and from the maps below it, and returns what they required; undefined if nothing. Items of lists keep theirs, because a list is replaced as a whole. */
function takeRequired(schema: Schema): Schema | undefined {
  const { required } = schema;
  delete schema.required;
  const variants = Array.isArray(schema.anyOf) ? schema.anyOf.filter(isSchema) : [];
  const within = isSchema(schema.properties) ? Object.entries(schema.properties) : [];
  const properties = within.flatMap(([key, inner]) => {
    const needed = isSchema(inner) ? takeRequired(inner) : undefined;
    return needed ? [[key, needed] as const] : [];
  });
  const own = {
    ...(required !== undefined && { required }),
    ...(properties.length > 0 && { properties: Object.fromEntries(properties) }),
  };
  const [needed] = [own, ...variants.map((variant) => takeRequired(variant) ?? {})].filter((s) => Object.keys(s).length > 0);
  return needed;
}
