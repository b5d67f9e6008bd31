/** Messages of one kind that other code awaits by name, in the order of their arrival. */
interface Waiting<T> {
  readonly resolve: (message: T) => void;
  readonly reject: (reason: Error) => void;
}

/** Queues of messages and of those who wait for one. */
export class Inbox<T extends object> {
  readonly #arrived = new Map<string, T[]>();
  readonly #waiting = new Map<string, Waiting<T>[]>();

  /** Whether a call of `next` is pending. */
  get isAwaited(): boolean {
    return [...this.#waiting.values()].some((all) => all.length > 0);
  }

  /** Returns the next message of this name. */
  next(name = ""): Promise<T> {
    const arrived = this.#arrived.get(name)?.shift();
    if (arrived) return Promise.resolve(arrived);
    return new Promise((resolve, reject) => {
      this.#waiting.set(name, [...(this.#waiting.get(name) ?? []), { resolve, reject }]);
    });
  }

  /** Gives a message to the call of `next` that waits longest, or keeps it for a later one. */
  add(message: T, name = ""): void {
    const first = this.#waiting.get(name)?.shift();
    if (first) first.resolve(message);
    else this.#arrived.set(name, [...(this.#arrived.get(name) ?? []), message]);
  }

  /** Rejects all pending calls of `next`. */
  reject(reason: Error): void {
    const all = [...this.#waiting.values()].flat();
    this.#waiting.clear();
    for (const { reject } of all) reject(reason);
  }
}
