/** Added tokens: texts that are one token each and are found before the model sees the rest. As in tokenizers' added_vocabulary.rs. */
import { literally, WORD } from "./pattern.ts";
import type { AddedTokenConfig } from "./tokenizerFile.ts";

/** A section of a text: an added token, or what lies between two. `at`: where it begins. */
export type TextSection = { readonly id: number } | { readonly text: string; readonly at: number };

const wordEnds = new RegExp(`[${WORD}\\u200c\\u200d]$`, "u");
const wordBegins = new RegExp(`^[${WORD}\\u200c\\u200d]`, "u");

/** Returns a function that cuts a text at added tokens: of several that begin at one place, at the longest. */
export function cutterOf(tokens: readonly (AddedTokenConfig & { readonly pattern: string })[]): (text: string) => TextSection[] {
  const byText = new Map(tokens.filter(({ pattern }) => pattern !== "").map((token) => [token.pattern, token]));
  const longestFirst = [...byText.keys()].sort((a, b) => b.length - a.length);
  if (longestFirst.length === 0) return (text) => [{ text, at: 0 }];
  const finder = new RegExp(longestFirst.map(literally).join("|"), "gv");
  return (text) => {
    const sections: TextSection[] = [];
    let done = 0;
    for (const { 0: found, index } of text.matchAll(finder)) {
      const token = byText.get(found);
      if (token === undefined) continue;
      const [before, after] = [text.slice(0, index), text.slice(index + found.length)];
      if (token.single_word && (wordEnds.test(before.slice(-2)) || wordBegins.test(after.slice(0, 2)))) continue;
      const start = token.lstrip ? Math.max(done, before.replace(/\p{White_Space}+$/u, "").length) : index;
      const spaces = token.rstrip ? (/^\p{White_Space}*/u.exec(after)?.[0].length ?? 0) : 0;
      if (start > done) sections.push({ text: text.slice(done, start), at: done });
      sections.push({ id: token.id });
      done = index + found.length + spaces;
    }
    if (done < text.length) sections.push({ text: text.slice(done), at: done });
    return sections;
  };
}
