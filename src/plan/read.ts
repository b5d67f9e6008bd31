/** Parsing of plan files. Version, digests, the published JSON Schema and the laws of plans are checked, in this order. */
import type { ErrorObject } from "ajv";
import { FORMAT_VERSION } from "../../schemas/formatVersion.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { BrokenInvariant } from "../ops/op.ts";
import { version } from "../version.ts";
import { canonical } from "./canonical.ts";
import { type Digests, joined, overall, sections, sha256 } from "./seal.ts";
import { fitsSchema, schemaErrors } from "./validator.ts";
import { laws } from "./verifyPlan.ts";

/** Parses the text of a plan file. Throws Trouble with the first fault of a damaged plan; code that gets the result does not check again. */
export function parsePlan(text: string, file: string): Plan {
  const refuse = (what: string, fix = "compile the job again"): never => {
    throw new Trouble(`${file}: ${printable(what, 600)}`, fix, 2);
  };
  const read = parseJson(text);
  if (!isRecord(read.value)) return refuse(`not a plan: ${read.error ?? "the JSON holds no object"}`);
  const value = read.value;
  const version = majorMinor(value.format_version);
  if (!version) return refuse("not a plan: no format_version such as 1.0");
  const [major, minor] = version;
  const [ownMajor = 0, ownMinor = 0] = FORMAT_VERSION.split(".").map(Number);
  if (major > ownMajor) {
    return refuse(
      `format_version ${value.format_version} is newer than this rankc reads (${FORMAT_VERSION})`,
      "use a newer rankc, or compile again",
    );
  }
  if (major < ownMajor) return refuse(`format_version ${value.format_version} is older than this rankc reads (${FORMAT_VERSION})`);

  const changed = changedSection(value, text);
  if (changed) return refuse(changed);

  const strictness = minor > ownMinor ? "additive" : "exact";
  if (!fitsSchema(value, strictness)) return refuse(schemaFault(value as Partial<Plan>, schemaErrors(value, strictness)));
  const broken = brokenLaw(value as Plan);
  if (broken) return refuse(broken);
  return value as Plan;
}

/** Returns the first law that a plan breaks, with its section; undefined if it breaks none. */
function brokenLaw(plan: Plan): string | undefined {
  for (const [section, check] of laws)
    try {
      check(plan);
    } catch (error) {
      if (!(error instanceof BrokenInvariant)) throw error;
      return `section "${section}" is inconsistent: ${error.law}`;
    }
  return undefined;
}

/** Returns a message about the section that was changed after compilation; undefined if none was. */
function changedSection(value: Record<string, unknown>, text: string): string | undefined {
  const digests = value.digests;
  if (!isRecord(digests)) return "not a plan: it has no digests";
  for (const name of sections) {
    if (!(name in value)) return `section "${name}" is missing`;
  }
  if (isAsWritten(value, digests as Digests, text)) return undefined;
  const texts = new Map<string, string>();
  for (const [key, part] of Object.entries(value)) {
    const { text, fault } = printed(part);
    if (text === undefined) return `section "${key}" ${fault}`;
    texts.set(key, text);
  }
  const actual = Object.fromEntries(sections.map((name) => [name, sha256(texts.get(name) ?? "")])) as Digests;
  const wrong = sections.filter((name) => digests[name] !== actual[name]);
  // the overall digest covers the original digests, so it distinguishes a changed section from a changed digest
  const sealed = digests.plan === overall(String(value.format_version), digests as Digests);
  const [first] = wrong;
  if (first !== undefined) {
    const names = wrong.map((name) => `"${name}"`).join(" and ");
    const several = `section "digests" is not of this plan, or sections ${names} were changed after it was compiled`;
    const where = !sealed
      ? `section "digests" was changed: the digest of ${names} does not fit`
      : wrong.length > 1
        ? several
        : `section ${names} was changed after the plan was compiled`;
    return `${where} (SHA-256 ${short(actual[first])}, the plan says ${short(digests[first])})`;
  }
  if (!sealed) return `section "digests" or format_version was changed: the sections are whole, the digest over all of them is not`;
  if (text !== joined([...texts])) return "the JSON is not in the form rankc wrote: a byte between its values was changed";
  return undefined;
}

/**
 * Returns whether the text of every section has its digest, and nothing stands between the sections. Such a file needs no second canonical text,
 * which takes longer than parsing. False is no fault: the caller then finds out what differs.
 */
function isAsWritten(value: Record<string, unknown>, digests: Digests, text: string): boolean {
  const names = Object.keys(value).sort();
  // each search begins behind the key before: from `{` at 0 to `}` and a line break at the end, keys and their texts are then all of the text
  let after = 0;
  const starts = names.map((name, at) => {
    const key = `${at === 0 ? "{" : ","}${JSON.stringify(name)}:`;
    const start = text.indexOf(key, after);
    after = start < 0 ? text.length : start + key.length;
    return start;
  });
  if (starts[0] !== 0 || starts.includes(-1) || !text.endsWith("}\n")) return false;
  const texts = names.map((name, at): [string, string] => {
    const from = (starts[at] ?? 0) + JSON.stringify(name).length + 2;
    return [name, text.slice(from, starts[at + 1] ?? text.length - 2)];
  });
  const byName = new Map(texts);
  return (
    digests.plan === overall(String(value.format_version), digests) &&
    sections.every((name) => digests[name] === sha256(byName.get(name) ?? "")) &&
    names.every((name) => (sections as readonly string[]).includes(name) || byName.get(name) === printed(value[name]).text)
  );
}

/** Returns the canonical text of a section, or a fault: numbers such as 1e400, which parse as infinity, and deep nesting. */
function printed(part: unknown): { readonly text?: string; readonly fault?: string } {
  try {
    return { text: canonical(part) };
  } catch (error) {
    return { fault: error instanceof RangeError ? "is nested too deeply" : "holds a number beyond the range of 64-bit floats" };
  }
}

const short = (digest: unknown): string => (typeof digest === "string" ? `${digest.slice(0, 12)}…` : "nothing");

function parseJson(text: string): { readonly value?: unknown; readonly error?: string } {
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    return { error: `broken JSON (${(error as Error).message.replace(/\s+/g, " ").slice(0, 120)})` };
  }
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);

function majorMinor(version: unknown): readonly [number, number] | undefined {
  const match = typeof version === "string" ? /^(\d+)\.(\d+)$/.exec(version) : null;
  return match ? [Number(match[1]), Number(match[2])] : undefined;
}

/** Faults that another schema explains: a key or a name that one build of rankc has and another lacks. */
const ofOtherBuilds: readonly string[] = ["required", "additionalProperties", "enum", "const", "discriminator"];

/** Returns a message about a plan whose digests are right and which does not fit the schema: an edited plan, or one of another build, which has other keys. */
function schemaFault({ toolchain }: Partial<Plan>, errors: readonly ErrorObject[]): string {
  const fault = deepestError(errors);
  const what = errorText(fault);
  return fault && ofOtherBuilds.includes(fault.keyword)
    ? `another build of rankc wrote this plan (it names ${toolchain?.rankc ?? "no version"}, this is ${version}): ${what}`
    : `not a valid plan: ${what}`;
}

/** Returns the deepest error. Every variant of a union reports errors; the deepest is about the variant that matches best. */
function deepestError(errors: readonly ErrorObject[]): ErrorObject | undefined {
  const depth = (error: ErrorObject): number => error.instancePath.split("/").length;
  return [...errors].sort((a, b) => depth(b) - depth(a))[0];
}

function errorText(error: ErrorObject | undefined): string {
  if (!error) return "it does not fit the schema";
  const { keyword, data, message, instancePath } = error;
  const fault = keyword === "enum" ? `is ${JSON.stringify(data)}, which is not one of the allowed values` : message;
  return `${instancePath || "the plan"} ${fault}`;
}
