/** Hover and completion from the JSON Schema of jobs. */
import { jobSchema } from "../../../schemas/jobSchema.ts";
import type { Path } from "../../frontend/source.ts";

/** The part of JSON Schema that the job's has. */
export interface KeySchema {
  readonly type?: string;
  readonly description?: string;
  readonly default?: unknown;
  readonly const?: unknown;
  readonly enum?: readonly unknown[];
  readonly properties?: Readonly<Record<string, KeySchema>>;
  readonly items?: KeySchema | readonly KeySchema[];
  readonly anyOf?: readonly KeySchema[];
}

let root: KeySchema | undefined;

/** Returns the schema of a path; undefined if no key is there. */
export function keySchema(path: Path): KeySchema | undefined {
  root ??= jobSchema() as KeySchema;
  let here: KeySchema | undefined = root;
  for (const key of path) {
    if (!here) return undefined;
    here = variants(here)
      .map((s): KeySchema | undefined => (typeof key === "number" ? itemOf(s, key) : ownKey(s, key)))
      .find((s) => s !== undefined);
  }
  return here;
}

const ownKey = ({ properties }: KeySchema, key: string): KeySchema | undefined =>
  properties && Object.hasOwn(properties, key) ? properties[key] : undefined;
const itemOf = ({ items }: KeySchema, i: number): KeySchema | undefined =>
  (Array.isArray(items) ? items[i] : items) as KeySchema | undefined;
const variants = (schema: KeySchema): readonly KeySchema[] => [schema, ...(schema.anyOf ?? []).flatMap(variants)];

/** Returns the keys of a section with their schemas. */
export const keysOf = (path: Path): [string, KeySchema][] =>
  variants(keySchema(path) ?? {}).flatMap(({ properties }) => Object.entries(properties ?? {}));

/** Returns the words that a value may be. */
export const wordsOf = (schema: KeySchema): string[] => [
  ...new Set(
    variants(schema).flatMap((s) => [
      ...(s.enum ?? []).map(String),
      ...(s.const === undefined ? [] : [String(s.const)]),
      ...(s.type === "boolean" ? ["true", "false"] : []),
      ...(s.type === "null" ? ["null"] : []),
    ]),
  ),
];

/** Whether a key begins a section. */
export const isSection = (schema: KeySchema): boolean => variants(schema).some(({ properties }) => properties !== undefined);

/** Returns the description of a key, its choices and its default, as Markdown. */
export function describe(path: Path): string | undefined {
  const schema = keySchema(path);
  if (!schema) return undefined;
  const words = wordsOf(schema);
  const { default: standard } = schema;
  const hasDefault = standard !== undefined && !(typeof standard === "object" && standard !== null && !Array.isArray(standard));
  return [
    `**${path.join(".")}**`,
    ...(schema.description === undefined ? [] : [schema.description]),
    ...(words.length > 0 ? [`one of ${words.map((word) => `\`${word}\``).join(", ")}`] : []),
    ...(hasDefault ? [`default: \`${JSON.stringify(standard)}\``] : []),
  ].join("\n\n");
}
