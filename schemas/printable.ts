/** Text from outside, such as names in a plan, a job or a message of another host, in a form that a terminal only shows. */

/** Control characters, halves of surrogate pairs, and characters that hide, join or turn other text: at each match one character. */
export const unprintable = /[\p{Cc}\p{Cs}\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;

/** Characters that a terminal would act on as \u{…}; line feeds and tabs stay. */
export const escaped = (text: string): string =>
  text.replace(unprintable, (c) => (c === "\n" || c === "\t" ? c : `\\u{${c.codePointAt(0)!.toString(16)}}`));

/** One line of at most `most` characters: what is longer ends in how long it is. */
export function printable(text: string, most = 200): string {
  const tail = ` … (${text.length} characters)`;
  const line = escaped(text.slice(0, most)).replaceAll("\n", "\\n").replaceAll("\t", "\\t");
  if (text.length <= most && line.length <= most) return line;
  return line.slice(0, most - tail.length) + tail;
}
