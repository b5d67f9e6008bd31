/** The keys of a Hugging Face config.json: what Python's json writes, and what a key must hold. */
import { Trouble } from "../../schemas/trouble.ts";

export type Config = Readonly<Record<string, unknown>>;

/** The JSON of `text`, and Python's literals Infinity, -Infinity and NaN (as the string "NaN", which no key takes). Throws a Trouble that names `path`. */
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

export const isRecord = (value: unknown): value is Config => typeof value === "object" && value !== null && !Array.isArray(value);

const LONGEST = 300;

/** A value as text on one line: JSON, cut after 300 characters. */
export function shown(value: unknown): string {
  let text: string;
  try {
    text = typeof value === "number" ? String(value) : (JSON.stringify(value) ?? "missing");
  } catch {
    return "nested too deeply to be shown"; // JSON.stringify is recursive, JSON.parse is not
  }
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

export interface Reader {
  /** A whole number of 1 or more. */
  count(key: string, otherwise?: number): number;
  /** The first of these keys that is given. */
  countOf(keys: readonly string[]): number;
  /** null means none; a key that is missing has the default. */
  countOrNone(key: string, otherwise: number | null): number | null;
  /** A number of 0 or more. */
  real(key: string, otherwise: number): number;
  flag(key: string, otherwise: boolean): boolean;
}

/** Reads keys of `config`. A key that is missing or has another type adds to `reasons`, and reading goes on; null counts as not given, as in transformers. */
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
