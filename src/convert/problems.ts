/** What keeps a description from becoming a job: every importer collects all of it, and reports it at once. */
import { Trouble } from "../../schemas/trouble.ts";

/** One reason why a job cannot be made. */
export interface Problem {
  /** unsupported: rankc lacks it. value: it is missing, or not what the argument takes. unknown: there is no such argument. */
  readonly kind: "unsupported" | "value" | "unknown";
  /** What the problem is about: an argument with its value, or a default of Megatron. */
  readonly subject: string;
  readonly why: string;
  readonly fix: string;
}

/** The error of a description that cannot be imported; it has all problems, also one by one. */
export class ImportTrouble extends Trouble {
  constructor(
    name: string,
    readonly problems: readonly Problem[],
  ) {
    super(`${name} cannot be imported:${problems.map(({ subject, why, fix }) => `\n  ${subject}: ${why}\n    fix: ${fix}`).join("")}`);
  }
}
