/**
 * The cache of the built command line: a folder below the user's cache folder, named by the digest of the build, because a result is that of one
 * state of the code. A checkout has no cache. A folder of another user is not read. Folders of older builds are removed.
 */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { makeFolder } from "../../schemas/writing.ts";

/** How many folders of other builds stay, the newest. */
const OTHERS = 2;

let opened: { readonly folder: string | undefined } | undefined;

/** Returns the folder of the cache; undefined if there is none. */
export function cacheFolder(): string | undefined {
  opened ??= { folder: openFolder() };
  return opened.folder;
}

function openFolder(): string | undefined {
  if (process.env.RANKC_CACHE === "off") return undefined;
  try {
    // the entry of the bundle names its files, and their names hold their digests
    const build = createHash("sha256")
      .update(readFileSync(new URL("rankc.cjs", import.meta.url)))
      .digest("hex");
    const all = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "rankc");
    const folder = join(all, `results-${build.slice(0, 16)}`);
    if (makeFolder(folder, 0o700) !== undefined) removeOld(all, folder);
    const { uid, mode } = statSync(folder);
    return (process.getuid?.() ?? uid) === uid && (mode & 0o022) === 0 ? folder : undefined;
  } catch {
    return undefined;
  }
}

/** Removes the folders of other builds, except the newest. */
function removeOld(all: string, own: string): void {
  const others = readdirSync(all)
    .filter((name) => name.startsWith("results-"))
    .map((name) => join(all, name))
    .filter((folder) => folder !== own)
    .map((folder) => ({ folder, age: statSync(folder).mtimeMs }))
    .sort((a, b) => b.age - a.age);
  for (const { folder } of others.slice(OTHERS)) rmSync(folder, { recursive: true, force: true });
}
