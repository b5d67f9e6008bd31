/** How often instructions use the buffers of a program, for fusion. */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Buffer, Program } from "../../../schemas/plan.ts";
import { instructionsOf } from "../../../schemas/program.ts";
import { invariant } from "../../ops/op.ts";

/** The buffers of a program that is fused, and how many instructions touch each. */
export class BufferUses {
  readonly #buffers: Map<string, Buffer>;
  readonly #counts = new Map<string, number>();

  constructor(program: Program) {
    this.#buffers = new Map(program.buffers.map((b) => [b.id, b]));
    for (const i of instructionsOf(program))
      for (const id of touchedBy(i, this.#buffers)) this.#counts.set(id, (this.#counts.get(id) ?? 0) + 1);
  }
  has(id: string): boolean {
    return this.#buffers.has(id);
  }
  values(): Buffer[] {
    return [...this.#buffers.values()];
  }
  get(id: string): Buffer {
    const found = this.#buffers.get(id);
    invariant(found !== undefined, () => `${id} is not a buffer`);
    return found;
  }
  /** Returns whether only the instruction that writes a buffer and one other touch it. */
  isBetweenTwo(id: string): boolean {
    return this.get(id).kind === "workspace" && this.#counts.get(id) === 2;
  }
  /** Returns how many instructions touch a buffer. */
  countOf(id: string): number {
    return this.#counts.get(id) ?? 0;
  }
  /** Adds a buffer, or changes it. */
  set(b: Buffer): void {
    this.#buffers.set(b.id, b);
  }
  delete(id: string): void {
    this.#buffers.delete(id);
  }
}
