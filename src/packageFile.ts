/** The files that ship with the package (schemas, templates): found from `src/` in a checkout and from `dist/src/` when installed. */
import { existsSync, readFileSync } from "node:fs";

/** The URL of the package folder. */
export const root = packageRoot(new URL(".", import.meta.url));

/** Reads a text file of the package by its path below the package folder. */
export const readPackageFile = (path: string): string => readFileSync(new URL(path, root), "utf8");

function packageRoot(from: URL): URL {
  if (existsSync(new URL("package.json", from))) return from;
  return packageRoot(new URL("..", from));
}
