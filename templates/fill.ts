/** Fills a template in. A name that nobody supplies throws; nothing is escaped, for the text is code or prose, never HTML. */
import Handlebars from "handlebars";
import { readPackageFile } from "../src/packageFile.ts";

const compiled = new Map<string, Handlebars.TemplateDelegate>();

export function fill(name: string, values: object): string {
  let template = compiled.get(name);
  if (!template) {
    const source = readPackageFile(`templates/${name}.hbs`);
    template = Handlebars.compile(source, { strict: true, noEscape: true, knownHelpersOnly: true });
    compiled.set(name, template);
  }
  return template(values);
}
