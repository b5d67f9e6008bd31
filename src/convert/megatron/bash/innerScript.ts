/** The script that a command runs: `srun … bash -c TEXT`, `sbatch <<EOF`, `bash FILE words`, `./FILE words`. */
import type { HereDoc } from "unbash";
import { expandParts, type Shell } from "./expand.ts";
import { knownValue, type ScriptText } from "./text.ts";

/** A script that a command runs. `before`: the words before the shell that runs it. */
export type InnerScript = { readonly before: readonly ScriptText[] } & (
  | { readonly kind: "text"; readonly text: ScriptText; readonly words: readonly ScriptText[] }
  | { readonly kind: "document"; readonly text: ScriptText }
  | { readonly kind: "file"; readonly words: readonly ScriptText[] }
);

/** Returns the script that a command runs; undefined if it runs none. */
export function innerScript(
  name: string,
  words: readonly ScriptText[],
  document: HereDoc | undefined,
  shell: Shell,
): InnerScript | undefined {
  const at = words.findIndex((word) => /^(?:.*\/)?(?:ba|z|da)?sh$/.test(knownValue(word) ?? ""));
  const before = words.slice(0, Math.max(0, at));
  const [option, text, ...rest] = at < 0 ? [] : words.slice(at + 1);
  const flag = option && knownValue(option);
  if (flag !== undefined && /^-\w*c$/.test(flag) && text) return { kind: "text", before, text, words: rest.slice(1) };
  if (document && (at >= 0 || name === "sbatch")) {
    const isVerbatim = document.delimiter?.quoted === true || document.body.parts === undefined;
    const body: ScriptText = isVerbatim ? [document.body.text] : expandParts(document.body.parts ?? [], shell);
    return { kind: "document", before: name === "sbatch" ? words : before, text: body };
  }
  if (at >= 0 && flag !== undefined && !flag.startsWith("-")) return { kind: "file", before, words: words.slice(at + 1) };
  return /\.(?:sh|bash)$/.test(name) ? { kind: "file", before: [], words } : undefined;
}
