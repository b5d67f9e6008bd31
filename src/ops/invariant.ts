/** Conditions that rankc guarantees. */

/** A condition that rankc itself guarantees is false: a bug in the compiler, or a damaged plan file. */
export class BrokenInvariant extends Error {
  constructor(readonly law: string) {
    super(`rankc: broken invariant: ${law}`);
  }
}
/** Throws a BrokenInvariant if `ok` is false. A function as message is called only then, which keeps checks in loops cheap. */
export function invariant(ok: boolean, message: string | (() => string)): asserts ok {
  if (!ok) throw new BrokenInvariant(typeof message === "string" ? message : message());
}
