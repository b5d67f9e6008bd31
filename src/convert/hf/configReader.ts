/** Reads Hugging Face config.json files, as Python's json module writes them, with type checks of keys. */
import { Trouble } from "../../../schemas/trouble.ts";

/** A JSON object. */
export type Config = Readonly<Record<string, unknown>>;

/** Parses JSON with Python's literals Infinity, -Infinity and NaN (returned as the string "NaN", which is invalid for every key). Throws a Trouble that names `path`. */
export function parseConfig(text: string, path: string): unknown {
  try {
    // JSON.parse reads a number past the largest double as Infinity. A string that does not end reaches the end of the text.
    const standard = text.replace(/"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)|\b(?:Infinity|NaN)\b/gs, (token) =>
      token === "Infinity" ? "1e999" : token === "NaN" ? '"NaN"' : token,
    );
    return JSON.parse(standard);
  } catch (error) {
    throw new Trouble(`${path} is not JSON: ${(error as Error).message}`, "name the model's config.json");
  }
}

/** Returns whether a value is a JSON object. */
export const isRecord = (value: unknown): value is Config => typeof value === "object" && value !== null && !Array.isArray(value);

const LONGEST = 300;

/** Formats a value as JSON on one line, at most 300 characters. */
export function shown(value: unknown): string {
  let text: string;
  try {
    text = typeof value === "number" ? String(value) : (JSON.stringify(value) ?? "missing");
  } catch {
    return "nested too deeply to be shown"; // JSON.stringify is recursive, JSON.parse is not
  }
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

/** Readers of typed keys. */
export interface Reader {
  /** Reads an integer of at least 1. */
  count(key: string, otherwise?: number): number;
  /** Reads the first of these keys that is set. */
  countOf(keys: readonly string[]): number;
  /** Reads an integer or null (none); a missing key has the default. */
  countOrNone(key: string, otherwise: number | null): number | null;
  /** Reads a number of at least 0. */
  real(key: string, otherwise: number): number;
  flag(key: string, otherwise: boolean): boolean;
}

/** Returns readers of the keys of `config`. A missing or mistyped key adds to `reasons`; null means not set, as in transformers. */
export function reader(config: Config, reasons: string[]): Reader {
  const refuse = (key: string, wanted: string): number => {
    reasons.push(config[key] == null ? `${key} is missing` : `${key} is ${shown(config[key])}; expected ${wanted}`);
    return 1;
  };
  const count: Reader["count"] = (key, otherwise) => {
    const value = config[key] ?? otherwise;
    const given = config[key] != null;
    if (typeof value === "number" && (given ? Number.isSafeInteger(value) && value > 0 : true)) return value;
    return refuse(key, "a whole number of 1 or more");
  };
  return {
    count,
    countOf: (keys) => count(keys.find((key) => config[key] != null) ?? keys[0]!),
    countOrNone(key, otherwise) {
      if (config[key] === null || (config[key] === undefined && otherwise === null)) return null;
      return count(key, otherwise ?? undefined);
    },
    real: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : refuse(key, "a number of 0 or more");
    },
    flag: (key, otherwise) => {
      const value = config[key] ?? otherwise;
      return typeof value === "boolean" ? value : refuse(key, "true or false") === 0;
    },
  };
}
