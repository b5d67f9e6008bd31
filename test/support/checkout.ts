/** A copy of this checkout in a temporary folder, for tests that build in it or write into it. Its packages are links to ours. */
import { cpSync, mkdirSync, mkdtempSync, readdirSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const root = fileURLToPath(new URL("../..", import.meta.url));
/** What is made, and what tools keep for themselves (`.git`). */
const left = /^(node_modules|dist|\..*)$/;

export function copyCheckout(): string {
  const copy = mkdtempSync(join(tmpdir(), "rankc-checkout-"));
  for (const name of readdirSync(root)) if (!left.test(name)) cpSync(join(root, name), join(copy, name), { recursive: true });
  // a folder of links, not one link to the folder: a command that empties it empties the copy
  const packages = join(copy, "node_modules");
  mkdirSync(packages);
  for (const name of readdirSync(join(root, "node_modules"))) {
    // `npm run setup` compares the time of this file with that of the lock file: here this one is newer
    if (name === ".package-lock.json") cpSync(join(root, "node_modules", name), join(packages, name));
    else symlinkSync(join(root, "node_modules", name), join(packages, name));
  }
  return copy;
}
