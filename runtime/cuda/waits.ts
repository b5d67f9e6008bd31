/** Waits for events of a device; the failure of another rank ends the wait. */
import { setImmediate, setTimeout } from "node:timers/promises";
import type { Context, Event, Stream } from "./driver.ts";

/** The waits of one rank. */
export class Waits {
  readonly #context: Context;
  readonly #stream: Stream;
  readonly #done: Event;
  readonly #checks: (() => void)[];

  /** `stream`: the stream that `settled` waits for. `check` throws if another rank has failed. */
  constructor(context: Context, stream: Stream, check: () => void) {
    this.#context = context;
    this.#stream = stream;
    this.#done = context.createEvent("order");
    this.#checks = [check];
  }

  /** Adds a check that throws if another rank has failed. */
  add(check: () => void): void {
    this.#checks.push(check);
  }

  /** Throws if another rank has failed. */
  check(): void {
    for (const check of this.#checks) check();
  }

  /** Waits until the event is complete. */
  async happens(event: Event): Promise<void> {
    const begun = performance.now();
    for (let asked = 0; !this.#context.happened(event); asked++) {
      if (asked % 256 === 0) this.check();
      // poll less often for long steps
      await (performance.now() - begun < 1000 ? setImmediate() : setTimeout(1));
    }
  }

  /** Waits until all work issued to the stream is complete. */
  async settled(): Promise<void> {
    this.#context.record(this.#done, this.#stream);
    await this.happens(this.#done);
  }

  /** Returns whether all work issued to the stream completes within a time. Does not throw: a device that reports an error does not complete. */
  async settlesWithin(milliseconds: number): Promise<boolean> {
    this.#context.record(this.#done, this.#stream);
    const last = performance.now() + milliseconds;
    for (;;) {
      try {
        if (this.#context.happened(this.#done)) return true;
      } catch {
        return false;
      }
      if (performance.now() > last) return false;
      await setTimeout(1);
    }
  }

  close(): void {
    this.#context.destroyEvent(this.#done);
  }
}
