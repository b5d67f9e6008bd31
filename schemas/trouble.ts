/** User errors. They are printed without a stack; any other error is a bug. */
import { escaped } from "./printable.ts";

/** An error that a person can correct: a message, a fix, and the exit code of the process. Unprintable characters are escaped. */
export class Trouble extends Error {
  override readonly name = "Trouble";
  readonly fix?: string;

  constructor(
    message: string,
    fix?: string,
    readonly exit: 1 | 2 | 3 = 2,
  ) {
    super(escaped(message));
    if (fix !== undefined) this.fix = escaped(fix);
  }
}
