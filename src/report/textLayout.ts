/**
 * Text that fits a width: wrapped lines, tables and bars. Styles are marked by private-use characters, which `paint` turns into colours of a
 * terminal, so that text from a plan is escaped before and cannot bring escape codes of its own.
 */

/** Style marks and their codes of a terminal (SGR). */
const styles = { end: ["\ue000", 0], bold: ["\ue001", 1], dim: ["\ue002", 2], warn: ["\ue003", 33], add: ["\ue004", 32] } as const;
/** Marks of the parts of a bar, with background-free colours that stay readable on light and dark terminals. */
const partColours = [34, 32, 33, 35, 36, 90] as const;
const PART = 0xe010;
const marks = /[\ue000-\ue01f]/g;

const styled = (style: keyof typeof styles, text: string): string => `${styles[style][0]}${text}${styles.end[0]}`;
/** Marks a heading. */
export const bold = (text: string): string => styled("bold", text);
/** Marks a remark. */
export const dim = (text: string): string => styled("dim", text);
/** Marks a warning. */
export const warn = (text: string): string => styled("warn", text);
/** Marks an addition. */
export const added = (text: string): string => styled("add", text);
/** Marks text in the colour of part `i` of a bar. */
export const inPartColour = (i: number, text: string): string =>
  text === "" ? "" : `${String.fromCharCode(PART + (i % partColours.length))}${text}${styles.end[0]}`;

/** Returns the text with its style marks as codes of a terminal, or without them. */
export function paint(text: string, hasColor: boolean): string {
  const codes = new Map<string, number>([
    ...Object.values(styles),
    ...partColours.map((code, i) => [String.fromCharCode(PART + i), code] as const),
  ]);
  return text.replace(marks, (mark) => (hasColor ? `\u001b[${codes.get(mark) ?? 0}m` : ""));
}

/** Characters that take two columns: CJK, Hangul, full-width forms, emoji. */
const wide =
  /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/gu;
const zeroWidth = /[\ue000-\ue01f\p{Mn}\p{Me}]/gu;
const ascii = /^[ -~]*$/;

/** Returns the columns that a line takes on a terminal, without style marks. */
export function textWidth(line: string): number {
  if (ascii.test(line)) return line.length;
  const visible = line.replace(zeroWidth, "");
  return [...visible].length + (visible.match(wide)?.length ?? 0);
}

/** Returns the line padded to a width; `right` pads before it. */
export function pad(line: string, width: number, right = false): string {
  const space = " ".repeat(Math.max(0, width - textWidth(line)));
  return right ? space + line : line + space;
}

/** A number, and the unit that must stay beside it. */
const number = /^[(~]?[-+]?[\d.,]+$/;
const unit = /^(%|x|[KMGTPE]?i?B|[KMGTPE]?flops?|m?s|µs|[KMGTP]?B\/s|of)[),;:]*$/i;

/** An option, and its argument that must stay beside it. */
const option = /^--[a-z-]+$/;
const argument = /^[A-Z]+$/;

const unmarked = (word: string): string => word.replace(marks, "");

/** Returns the words of a line; a number and its unit are one word, and so are an option and its argument. */
function wordsOf(line: string): string[] {
  const words: string[] = [];
  for (const word of line.split(" ").filter(Boolean)) {
    const last = words.at(-1);
    const belongs =
      last !== undefined && ((number.test(last) && unit.test(word)) || (option.test(unmarked(last)) && argument.test(unmarked(word))));
    if (belongs) words[words.length - 1] = `${last} ${word}`;
    else words.push(word);
  }
  return words;
}

/** Breaks a line between words. Further lines start with `indent`. A word that is wider than a line is broken behind its dots, else it stays whole. */
export function wrap(line: string, width: number, indent = ""): string[] {
  if (textWidth(line) <= width) return [line];
  const lead = /^ */.exec(line)?.[0] ?? "";
  const lines: string[] = [];
  let now = lead;
  const room = (): number => width - textWidth(now) - (now.trim() === "" ? 0 : 1);
  const flush = (): void => {
    if (now.trim() !== "") lines.push(now.trimEnd());
    now = indent;
  };
  const put = (word: string): void => {
    if (textWidth(word) > room() && now.trim() !== "") flush();
    now += (now.trim() === "" ? "" : " ") + word;
  };
  for (const word of wordsOf(line)) {
    if (textWidth(word) <= width - textWidth(indent)) put(word);
    else longWord(word, width - textWidth(indent)).forEach(put);
  }
  flush();
  return lines;
}

/** Splits a long id behind dots, commas and `@`, where the next part is no digit of a number. */
function longWord(word: string, width: number): string[] {
  const parts: string[] = [];
  for (const piece of word.split(/(?<=[.,@|](?!\d))/)) {
    const last = parts.at(-1);
    if (last !== undefined && textWidth(last) + textWidth(piece) <= width) parts[parts.length - 1] = last + piece;
    else parts.push(piece);
  }
  return parts;
}

/** Wraps each line of a text; further lines are indented by four more columns than the first. */
export const fitLines = (lines: readonly string[], width: number): string[] =>
  lines.flatMap((line) => wrap(line, width, `${/^ */.exec(line)?.[0] ?? ""}    `));

/** Returns a line that starts with a bold label in ten columns; further lines are indented by as many. */
export function labelled(label: string, text: string, width: number): string[] {
  const [first = "", ...more] = wrap(text, width - 10);
  const rest = more.length === 0 ? [] : wrap(more.map((line) => line.trim()).join(" "), width - 10);
  return [`${pad(bold(label), 10)}${first}`, ...rest.map((line) => " ".repeat(10) + line)];
}

/** A column of a table. */
export interface Column {
  readonly head: string;
  readonly right?: true;
  /** Columns with a number are left out in descending order where the width does not suffice. */
  readonly drop?: number;
  /** The column that is wrapped where the table is still too wide: none or one, and not the last, which wraps as well. */
  readonly wraps?: true;
}

/** Returns a table that fits a width: columns are dropped, then one is narrowed, and the last one is wrapped below itself. Rows have a cell per column. */
export function fitTable(
  columns: readonly Column[],
  rows: readonly (readonly string[])[],
  { width, indent = "  ", heads = true }: { readonly width: number; readonly indent?: string; readonly heads?: boolean },
): string[] {
  const all = heads ? [columns.map(({ head }) => dim(head)), ...rows] : rows;
  const sizes = columns.map((_, i) => all.reduce((most, row) => Math.max(most, textWidth(row[i] ?? "")), 0));
  let shown = columns.map((_, i) => i).filter((i) => (sizes[i] ?? 0) > 0);
  const total = (): number => shown.reduce((sum, i) => sum + (sizes[i] ?? 0) + 2, indent.length - 2);
  /** The least width that the last column needs: it can wrap. */
  const least = (): number => total() - (sizes[shown.at(-1) ?? 0] ?? 0) + Math.min(24, sizes[shown.at(-1) ?? 0] ?? 0);
  const dropped = shown.filter((i) => columns[i]?.drop !== undefined).sort((a, b) => (columns[b]?.drop ?? 0) - (columns[a]?.drop ?? 0));
  for (const i of dropped) if (least() > width) shown = shown.filter((other) => other !== i);
  const last = shown.at(-1) ?? 0;
  const slimmed = least() > width ? shown.find((i) => columns[i]?.wraps) : undefined;
  if (slimmed !== undefined) sizes[slimmed] = Math.max(12, (sizes[slimmed] ?? 0) - (least() - width));
  return all.flatMap((row) => {
    const [head = "", ...below] = slimmed === undefined ? [] : wrap(row[slimmed] ?? "", sizes[slimmed] ?? 0, "  ");
    const cellOf = (i: number): string => (i === slimmed ? head : (row[i] ?? ""));
    const before = shown.slice(0, shown.indexOf(slimmed ?? 0)).reduce((sum, i) => sum + (sizes[i] ?? 0) + 2, indent.length);
    const lead =
      indent +
      shown
        .slice(0, -1)
        .map((i) => `${pad(cellOf(i), sizes[i] ?? 0, columns[i]?.right)}  `)
        .join("");
    const cell = columns[last]?.right ? pad(row[last] ?? "", sizes[last] ?? 0, true) : (row[last] ?? "");
    const at = Math.min(textWidth(lead), Math.max(indent.length + 2, width - 24));
    const [first = "", ...more] = wrap(cell, width - textWidth(lead)).flatMap((line) => (textWidth(line) > 0 ? [line] : []));
    const rest = more.length === 0 ? [] : wrap(more.join(" "), width - at);
    return [
      `${lead}${first}`.trimEnd(),
      ...rest.map((line) => " ".repeat(at) + line.trimStart()),
      ...below.map((line) => " ".repeat(before) + line),
    ];
  });
}

/** A part of a bar: its letter, so that it is legible without colour, and its size. */
export interface BarPart {
  readonly letter: string;
  readonly size: number;
}

/** Returns a bar of `width` columns for a size of `total`; what no part fills is dots. Parts above the total are cut at the end and marked `>`. */
export function bar(parts: readonly BarPart[], total: number, width: number): string {
  let [at, sum, text] = [0, 0, ""];
  for (const [i, { letter, size }] of parts.entries()) {
    sum += size;
    const end = Math.min(width, Math.round((width * sum) / total));
    text += inPartColour(i, letter.repeat(Math.max(0, end - at)));
    at = Math.max(at, end);
  }
  const over = sum > total * (1 + 1e-9);
  return `[${text}${"·".repeat(width - at)}${over ? ">" : "]"}`;
}
