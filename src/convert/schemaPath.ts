/** The path of the JSON Schema in a folder that `rankc examples` or `rankc init` wrote to. */
export const schemaPath = "schemas/job.schema.json";
