/**
 * The arguments of Megatron-LM at commit d98e8a64: name, type, default, and treatment by the importer.
 */
import { inactive } from "./inactive.ts";
import { mapped } from "./mapped.ts";
import type { Section } from "./section.ts";
import { unsupported } from "./unsupported.ts";
import { withoutEffect } from "./withoutEffect.ts";

/** The treatment of an argument by the importer. */
export type Fate = "mapped" | "without effect" | "unsupported";

/** How many values an argument takes: none, one, one or more, any number, or a number. */
export type Arity = "none" | "one" | "some" | "any" | number;

/** An argument of Megatron-LM. */
export interface ArgumentSpec {
  /** The name without dashes. */
  readonly name: string;
  readonly type: "switch" | "int" | "float" | "text" | "bool" | "pattern" | "choice";
  readonly choices: readonly string[];
  readonly arity: Arity;
  readonly default?: string;
  readonly fate: Fate;
  readonly why: string;
  readonly instead?: string;
}

type SplitWords<Text extends string> = Text extends `${infer Head}\n${infer Tail}`
  ? SplitWords<Head> | SplitWords<Tail>
  : Text extends `${infer Head} ${infer Tail}`
    ? SplitWords<Head> | SplitWords<Tail>
    : Text;
type NameOf<Word extends string> = Word extends `${infer Name}:${string}` ? Name : Word;

/** The name of an argument that the importer maps. */
export type MappedName = Exclude<NameOf<SplitWords<(typeof mapped)[number]["names"]>>, "">;

function parseName(word: string, fate: Fate, { why, instead }: Section & { readonly instead?: string }): ArgumentSpec {
  const found = /^(?<name>[\w-]+)(?::(?<type>[^=]+?)(?<count>[+*]|(?<=int)\d)?(?:=(?<value>.*))?)?$/.exec(word)?.groups;
  if (!found?.name) throw new Error(`the table of arguments has an entry that is no argument: ${word}`);
  const { name, type, count, value } = found;
  const isChoice = type?.includes("|") === true;
  const rest = { name, fate, why, ...(instead !== undefined && { instead }), ...(value !== undefined && { default: value }) };
  if (type === undefined) return { ...rest, type: "switch", choices: [], arity: "none" };
  const arity = count === "+" ? "some" : count === "*" ? "any" : count === undefined ? "one" : Number(count);
  const plain = (["int", "float", "text", "bool", "pattern"] as const).find((known) => known === type);
  if (!plain && !isChoice) throw new Error(`the table of arguments has a type that is none: ${word}`);
  return { ...rest, type: plain ?? "choice", choices: isChoice ? type.split("|").filter((choice) => choice !== "") : [], arity };
}

const tables: readonly { readonly fate: Fate; readonly sections: readonly Section[] }[] = [
  { fate: "mapped", sections: mapped },
  { fate: "without effect", sections: withoutEffect },
  { fate: "without effect", sections: inactive },
  { fate: "unsupported", sections: unsupported },
];

/** All arguments by name. */
export const argumentSpecs: ReadonlyMap<string, ArgumentSpec> = new Map(
  tables.flatMap(({ fate, sections }) =>
    sections.flatMap((section) =>
      section.names
        .split(/\s+/)
        .filter((word) => word !== "")
        .map((word) => parseName(word, fate, section))
        .map((spec) => [spec.name, spec] as const),
    ),
  ),
);
