/**
 * The notation of the tables of arguments.
 *
 * Notation of a name: `name` is a switch; `name:int`, `:float`, `:text`, `:bool`, `:pattern` (an integer or a list expression) and
 * `name:a|b` (a choice; `a|` is one word) take a value; a final `+`, `*` or digit takes one or more, any number, or so many values;
 * `=value` is the default.
 */

/** Arguments with the same treatment. */
export interface Section {
  readonly why: string;
  /** Names in the notation above, with blanks between them. */
  readonly names: string;
}
