/** The input and the result of the interpreter of scripts: the commands that a script would run. */
import type { Scope } from "./scope.ts";
import type { ScriptText } from "./text.ts";

/** A command that the script would run. */
export interface CalledCommand {
  readonly words: readonly ScriptText[];
  /** Commands around it: the words of `srun … bash -c`, the outermost first. */
  readonly around: readonly (readonly ScriptText[])[];
  /** File and line, as in "run.sh:12". */
  readonly place: string;
  /** Variables at the time of the call. */
  readonly scope: Scope;
  /** The condition under which it runs, if it is unknown. */
  readonly condition?: string;
}

/** The input of the interpreter. */
export interface ScriptSettings {
  readonly file: string;
  /** Words after the script's name. */
  readonly words: readonly string[];
  /** Variables whose values the script cannot change. */
  readonly pinned: ReadonlyMap<string, string>;
  /** Returns the text of another script, for `source`; undefined if it cannot be read. */
  readonly readScript: (path: string) => string | undefined;
}

/** The result of the interpreter. */
export interface ScriptRead {
  readonly commands: readonly CalledCommand[];
  /** Variables that were not set and took the default of `${NAME:-value}`. */
  readonly defaults: ReadonlyMap<string, string>;
  /** Where the script ended early, with `exit`. */
  readonly exit?: string;
  /** Scripts that `source` names and that could not be read. */
  readonly unread: readonly string[];
}
