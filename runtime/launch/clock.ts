/** The clock of the launch protocol. Heartbeats, time limits and retries use it, so that a test can replace it by a clock that it advances. */

/** Cancels a pending call; without effect if the call has run. */
export type Cancel = () => void;

/** A monotonic clock with timers. All times are in milliseconds. */
export interface Clock {
  /** Returns the time since an arbitrary origin. */
  readonly now: () => number;
  /** Calls `call` once after `ms`. */
  readonly after: (ms: number, call: () => void) => Cancel;
  /** Calls `call` every `ms`. */
  readonly every: (ms: number, call: () => void) => Cancel;
}

/** The clock and the timers of this process. */
export const systemClock: Clock = {
  now: () => performance.now(),
  after: (ms, call) => {
    const timer = setTimeout(call, ms);
    return () => clearTimeout(timer);
  },
  every: (ms, call) => {
    const timer = setInterval(call, ms);
    return () => clearInterval(timer);
  },
};
