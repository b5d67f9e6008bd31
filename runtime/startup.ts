/** Measures where the time of a start goes. */
import type { StartupPart, StartupSeconds } from "../schemas/startup.ts";

/** Measures the parts of one start. */
export class StartupClock {
  readonly #seconds: Record<StartupPart, number> = { plan: 0, device: 0, kernels: 0, weights: 0, first_step: 0 };
  /** Milliseconds from the begin of the process to the last call of `end`. */
  #last = 0;

  /** Adds the time since the last call, or since the begin of the process, to a part. Returns the seconds of each part so far. */
  end(part: StartupPart): StartupSeconds {
    const now = performance.now();
    this.#seconds[part] += (now - this.#last) / 1000;
    this.#last = now;
    return this.seconds();
  }

  /** Returns the seconds of each part so far. */
  seconds(): StartupSeconds {
    return { ...this.#seconds };
  }
}
