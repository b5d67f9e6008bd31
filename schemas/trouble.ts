/** Trouble: what a person can put right, as one message and a way out. Whoever prints it shows no stack; any other error is our mistake. */
import { escaped } from "./printable.ts";

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
