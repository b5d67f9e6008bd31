/** Writes the validator of this version's plans beside the compiled code, for `planValidator`: the last step of `npm run build`. */
import { writeFileSync } from "node:fs";
import standalone from "ajv/dist/standalone/index.js";
import { builtValidator, openAjv, planSchema } from "./validator.ts";

const ajv = openAjv();
writeFileSync(builtValidator, standalone.default(ajv, ajv.compile(planSchema("exact"))));
