/** Escapes external text (names in plans and jobs, messages of other hosts), so that a terminal displays it and does not execute it. */

/** Matches one control character, lone surrogate, or character that hides, joins or reorders text. */
export const unprintable = /[\p{Cc}\p{Cs}\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;

/** Returns the text with unprintable characters as \u{…}; line feeds and tabs stay. */
export const escaped = (text: string): string =>
  text.replace(unprintable, (c) => (c === "\n" || c === "\t" ? c : `\\u{${c.codePointAt(0)!.toString(16)}}`));

/** Returns one line of at most `most` characters. Longer text is cut and ends with its length. */
export function printable(text: string, most = 200): string {
  const tail = ` … (${text.length} characters)`;
  const line = escaped(text.slice(0, most)).replaceAll("\n", "\\n").replaceAll("\t", "\\t");
  if (text.length <= most && line.length <= most) return line;
  return line.slice(0, most - tail.length) + tail;
}
