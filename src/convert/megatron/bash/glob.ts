/** Patterns of bash: `*`, `?` and brackets, as `case`, `[[ == ]]` and `${X##*}` use them. */

/** Returns a regular expression for a pattern, without anchors. A backslash quotes the character after it. `shortest`: `*` matches as little as possible. */
export function patternSource(pattern: string, shortest = false): string {
  let source = "";
  for (let i = 0; i < pattern.length; i++) {
    const c = pattern.charAt(i);
    if (c === "*") source += shortest ? "[\\s\\S]*?" : "[\\s\\S]*";
    else if (c === "?") source += "[\\s\\S]";
    else if (c === "[" && pattern.indexOf("]", i + 2) > 0) {
      const end = pattern.indexOf("]", i + 2);
      source += `[${pattern
        .slice(i + 1, end)
        .replace(/^!/, "^")
        .replaceAll("\\", "\\\\")
        .replaceAll("[", "\\[")}]`;
      i = end;
    } else {
      const literal = c === "\\" && i + 1 < pattern.length ? pattern.charAt(++i) : c;
      source += literal.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
    }
  }
  return source;
}

/** Returns a pattern that matches the text alone. */
export const quotedPattern = (text: string): string => text.replace(/[\\*?[]/g, "\\$&");

/** Returns whether a pattern matches a whole text. A pattern with an invalid range matches itself alone. */
export function matches(pattern: string, text: string): boolean {
  try {
    return new RegExp(`^${patternSource(pattern)}$`).test(text);
  } catch {
    return pattern === text;
  }
}
