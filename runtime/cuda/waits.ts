/** Waits for events of a device; the failure of another rank ends the wait. */
import { setImmediate, setTimeout } from "node:timers/promises";
import type { Context, Event, Stream } from "./driver.ts";

/** The waits of one rank. */
export class Waits {
  readonly #context: Context;
  readonly #stream: Stream;
  readonly #checks: (() => void)[];
  #isClosed = false;

  /** `stream`: the stream that `settled` waits for. `check` throws if another rank has failed. */
  constructor(context: Context, stream: Stream, check: () => void) {
    this.#context = context;
    this.#stream = stream;
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

  /** Waits until the event is complete. Throws if the device is closed by then. */
  async happens(event: Event): Promise<void> {
    const begun = performance.now();
    for (let asked = 0; !this.#hasHappened(event); asked++) {
      if (asked % 256 === 0) this.check();
      // poll less often for long steps
      await (performance.now() - begun < 1000 ? setImmediate() : setTimeout(1));
    }
  }

  /** Waits until all work that is issued to the stream by now is complete. */
  async settled(): Promise<void> {
    const done = this.#record();
    await this.happens(done);
    this.#context.destroyEvent(done);
  }

  /** Returns whether all work issued to the stream completes within a time. Does not throw: a device that reports an error does not complete. */
  async settlesWithin(milliseconds: number): Promise<boolean> {
    const done = this.#record();
    const last = performance.now() + milliseconds;
    for (;;) {
      try {
        if (this.#context.happened(done)) return true;
      } catch {
        return false;
      }
      if (performance.now() > last) return false;
      await setTimeout(1);
    }
  }

  /** Ends all waits: the events are destroyed afterwards, and a failed step may leave reads that nothing awaits. */
  close(): void {
    this.#isClosed = true;
  }

  #hasHappened(event: Event): boolean {
    if (this.#isClosed) throw new Error("rankc: the device was closed while it was waited for");
    return this.#context.happened(event);
  }

  /** Returns an event behind all work issued to the stream so far; later work does not move it. */
  #record(): Event {
    const done = this.#context.createEvent("order");
    this.#context.record(done, this.#stream);
    return done;
  }
}
