/** A job while it is made from a foreign description: keys with their sources, problems and notes. */
import type { Problem } from "./problems.ts";

/** One key of the job. */
export interface Entry {
  /** As in "model.moe.experts". */
  readonly key: string;
  readonly value: unknown;
  /** What the comment beside the key says: the arguments that gave the value, or whose default it is. */
  readonly comment: string;
}

/** Collects the job. */
export interface JobBuilder<Name extends string = string> {
  /** Sets a key. `from`: the arguments that the value depends on. `remark`: how it comes from them, where that is not plain. */
  put(key: string, value: unknown, from: readonly Name[], remark?: string): void;
  /** Records that an argument decides about a key, of which another one gives the value. */
  decides(name: Name, key: string): void;
  /** Reports what rankc lacks. */
  refuse(subject: string, why: string, fix: string): void;
  /** Reports a value that Megatron refuses, too. */
  reject(subject: string, why: string, fix: string): void;
  /** Adds a line to the comment above the job. */
  note(text: string): void;
}

/** A job, and what it collected. */
export interface OpenJobBuilder<Name extends string> extends JobBuilder<Name> {
  readonly entries: readonly Entry[];
  readonly notes: readonly string[];
  /** The keys that each argument gave. */
  readonly keysOf: ReadonlyMap<string, readonly string[]>;
}

/** Returns an empty job. `isGiven`: whether an argument is given. `otherwise`: the comment of a key that no argument gave. */
export function newJobBuilder<Name extends string>(
  isGiven: (name: Name) => boolean,
  otherwise: string,
  problems: Problem[],
  dashes = "--",
): OpenJobBuilder<Name> {
  const entries: Entry[] = [];
  const notes: string[] = [];
  const keysOf = new Map<string, string[]>();
  const decides = (name: Name, key: string): void => {
    if (isGiven(name)) keysOf.set(name, [...(keysOf.get(name) ?? []), key]);
  };
  return {
    decides,
    entries,
    notes,
    keysOf,
    put(key, value, from, remark) {
      const given = from.filter(isGiven);
      for (const name of given) decides(name, key);
      const source = given.length > 0 ? given.map((name) => `${dashes}${name}`).join(" ") : from.length > 0 ? otherwise : undefined;
      entries.push({ key, value, comment: [source, remark].filter((part) => part !== undefined).join(": ") });
    },
    refuse: (subject, why, fix) => void problems.push({ kind: "unsupported", subject, why, fix }),
    reject: (subject, why, fix) => void problems.push({ kind: "value", subject, why, fix }),
    note: (text) => void notes.push(text),
  };
}
