/** Fills a template in. A name that nobody supplies throws; nothing is escaped, for the text is code or prose, never HTML. */
import { createRequire } from "node:module";
import type Handlebars from "handlebars";
import { readPackageFile } from "../src/packageFile.ts";

const load = createRequire(import.meta.url);
const compiled = new Map<string, Handlebars.TemplateDelegate>();

/** Whether templates stay empty. */
let isWithoutText = false;

/** Returns the result of `make`, whose templates stay empty. For callers that need the scratch of kernels, not their sources and launches. */
export function withoutText<T>(make: () => T): T {
  isWithoutText = true;
  try {
    return make();
  } finally {
    isWithoutText = false;
  }
}

/** Returns whether templates stay empty: then what only appears in texts and launches need not be chosen. */
export const needsNoText = (): boolean => isWithoutText;

/** Fills a template with values and returns the text. Throws if a value is missing. */
export function fill(name: string, values: object): string {
  if (isWithoutText) return "";
  let template = compiled.get(name);
  if (!template) {
    const source = readPackageFile(`templates/${name}.hbs`);
    // loaded on first use: a check of a job fills no template in
    const handlebars: typeof Handlebars = load("handlebars");
    template = handlebars.compile(source, { strict: true, noEscape: true, knownHelpersOnly: true });
    compiled.set(name, template);
  }
  return template(values);
}
