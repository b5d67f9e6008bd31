/** A copy of this checkout in a temporary folder, for tests that build in it or write into it; node_modules is shared. */
import { cpSync, mkdtempSync, readdirSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const root = fileURLToPath(new URL("..", import.meta.url));
const left = new Set(["node_modules", "dist", ".git", ".rankc"]);

export function copyCheckout(): string {
  const copy = mkdtempSync(join(tmpdir(), "rankc-checkout-"));
  for (const name of readdirSync(root)) if (!left.has(name)) cpSync(join(root, name), join(copy, name), { recursive: true });
  symlinkSync(join(root, "node_modules"), join(copy, "node_modules"));
  return copy;
}
