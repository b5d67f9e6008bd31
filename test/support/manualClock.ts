/** A clock that stands still until a test advances it: time limits pass without waiting, on a machine of any load. */
import type { Cancel, Clock } from "../../runtime/launch/clock.ts";

interface Timer {
  at: number;
  readonly ms: number;
  readonly repeats: boolean;
  readonly call: () => void;
}

export class ManualClock implements Clock {
  #now = 0;
  readonly #timers = new Set<Timer>();
  readonly #awaited: { readonly ms: number; readonly resolve: () => void }[] = [];

  readonly now = (): number => this.#now;
  readonly after = (ms: number, call: () => void): Cancel => this.#add({ at: this.#now + ms, ms, repeats: false, call });
  readonly every = (ms: number, call: () => void): Cancel => this.#add({ at: this.#now + ms, ms, repeats: true, call });

  /** Advances by `ms`, and runs the timers that are due, each at its own time. */
  advance(ms: number): void {
    const end = this.#now + ms;
    for (let next = this.#nextUntil(end); next; next = this.#nextUntil(end)) {
      this.#now = Math.max(this.#now, next.at);
      if (next.repeats) next.at += next.ms;
      else this.#timers.delete(next);
      next.call();
    }
    this.#now = end;
  }

  /** Lets `ms` pass in which no timer runs, as in a process that is suspended. */
  suspend(ms: number): void {
    this.#now += ms;
  }

  /** Resolves when a timer with this delay is pending. */
  scheduled(ms: number): Promise<void> {
    if ([...this.#timers].some((timer) => timer.ms === ms)) return Promise.resolve();
    return new Promise((resolve) => this.#awaited.push({ ms, resolve }));
  }

  #add(timer: Timer): Cancel {
    this.#timers.add(timer);
    for (const { ms, resolve } of this.#awaited) if (ms === timer.ms) resolve();
    return () => void this.#timers.delete(timer);
  }

  #nextUntil(end: number): Timer | undefined {
    const [first] = [...this.#timers].filter(({ at }) => at <= end).sort((a, b) => a.at - b.at);
    return first;
  }
}
