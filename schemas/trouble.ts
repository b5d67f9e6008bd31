/** Trouble: what a person can put right, as one message and a way out. Whoever prints it shows no stack; any other error is our mistake. */
export class Trouble extends Error {
  override readonly name = "Trouble";

  constructor(
    message: string,
    readonly fix?: string,
    readonly exit: 1 | 2 | 3 = 2,
  ) {
    super(message);
  }
}
