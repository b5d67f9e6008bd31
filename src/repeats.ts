/**
 * Layers of a model repeat, and so do the stages of a pipeline: their nodes, buffers and instructions differ in names only. A pass computes what
 * does not depend on names once per form. A form is a text of all that the result depends on, so equal forms have equal results, whatever
 * layers they are in; names are added afterwards. `Repeats` holds the results of one pass.
 */

/** Results by form. */
export class Repeats<T> {
  readonly #known = new Map<string, T>();

  /** Returns the result of a form. `compute` runs once per form; its result must depend on nothing that the form lacks. */
  of(form: string, compute: () => T): T {
    const known = this.#known.get(form);
    if (known !== undefined) return known;
    const made = compute();
    this.#known.set(form, made);
    return made;
  }
  /** The number of distinct forms. */
  get forms(): number {
    return this.#known.size;
  }
}
