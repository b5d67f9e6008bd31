/** Writes the validator of this version's plans beside the compiled code, for `fitsSchema`: a step of `npm run build`. */
import { writeFileSync } from "node:fs";
import standalone from "ajv/dist/standalone/index.js";
import { builtValidator, fastPlanSchema, openFastAjv } from "./validator.ts";

const ajv = openFastAjv();
writeFileSync(builtValidator, standalone.default(ajv, ajv.compile(fastPlanSchema())));
