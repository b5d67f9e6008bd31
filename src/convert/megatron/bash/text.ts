/**
 * Text as bash expands it, with holes: what only a running shell can tell (an unset variable, the output of a command) stays a hole
 * that remembers its place, so that an error names it where its value is needed, and nowhere else.
 */

/** A part of a text whose value is not known. */
export interface Hole {
  /** The part as the script writes it, such as `$(nproc)`. */
  readonly source: string;
  /** The variable that `--set` can give; undefined where no variable has the value. */
  readonly variable?: string;
  /** It is a word after the script's name. */
  readonly isWord?: true;
  readonly line: number;
  /** Why the value is not known: "X is not set". */
  readonly why: string;
  /** The variable is not set: tests and `${X:-y}` then find it empty. */
  readonly unset?: true;
  /** A script that could not be read may set the variable. */
  readonly mayBeSet?: true;
}

/** A text: known parts and holes, in order. */
export type ScriptText = readonly (string | Hole)[];

/** The longest script, and the longest value of a variable, which a loop may double in each pass. */
export const MOST_CHARACTERS = 1 << 20;

/** Returns the text of a file as bash on the cluster has it: without the mark and the line ends of Windows. */
export const unixText = (text: string): string => text.replace(/^\uFEFF/, "").replaceAll("\r\n", "\n");

/** Returns whether all parts of a text are known. */
export const isKnown = (text: ScriptText): text is readonly string[] => text.every((part) => typeof part === "string");

/** Returns the value of a text; undefined if a part of it is not known. */
export const knownValue = (text: ScriptText): string | undefined => (isKnown(text) ? text.join("") : undefined);

/** Returns the value as a test finds it: variables that are not set are empty; undefined if another part is not known. */
export const testedValue = (text: ScriptText): string | undefined =>
  knownValue(text.filter((part) => typeof part === "string" || !part.unset));

/** Returns the text with its holes as the script writes them. */
export const shownText = (text: ScriptText): string => text.map((part) => (typeof part === "string" ? part : part.source)).join("");

/** Returns the holes of a text. */
export const holesOf = (text: ScriptText): readonly Hole[] => text.filter((part) => typeof part !== "string");

/** Returns the texts as one, with blanks between them. */
export const joined = (texts: readonly ScriptText[], by = " "): ScriptText => texts.flatMap((text, i) => (i === 0 ? text : [by, ...text]));

/** Collects the words of one expansion: bash splits what an unquoted expansion yields at blanks, and keeps all else together. */
export interface WordList {
  /** Appends to the current word; an empty quoted text makes a word, too. */
  quoted(text: ScriptText): void;
  /** Appends, and begins a new word at each blank of a known part. */
  split(text: ScriptText): void;
  /** Ends the current word. */
  end(): void;
  readonly all: readonly ScriptText[];
}

/** Returns an empty collection of words. */
export function newWords(): WordList {
  const all: ScriptText[] = [];
  let word: (string | Hole)[] | undefined;
  const end = (): void => {
    if (word) all.push(word);
    word = undefined;
  };
  return {
    all,
    end,
    quoted(text) {
      word = [...(word ?? []), ...text];
    },
    split(text) {
      for (const part of text) {
        if (typeof part !== "string") {
          word = [...(word ?? []), part];
          continue;
        }
        for (const [i, piece] of part.split(/[ \t\n]+/).entries()) {
          if (i > 0) end();
          if (piece !== "") word = [...(word ?? []), piece];
        }
      }
    },
  };
}
