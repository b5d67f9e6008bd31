/** How loops end: `break` and `continue`, also where only a running shell can tell whether they happen. */
import { type Frame, merge } from "./frame.ts";
import type { Scope } from "./scope.ts";

/** How a statement ends: the next one follows, or it leaves a loop, a function or the script. */
export type Flow = "next" | "break" | "continue" | "return" | "exit";

/** A way out of a loop under a condition that is not known, with the variables as they are there. */
interface Exit {
  readonly flow: "break" | "continue";
  readonly scope: Scope;
}

/** The loops around a statement. */
export class Loops {
  /** How many loops the last `break` or `continue` is for. */
  levels = 1;
  #exits: Exit[] = [];

  /** Whether the innermost loop may have ended. */
  get mayHaveEnded(): boolean {
    return this.#exits.some(({ flow }) => flow === "break");
  }

  /**
   * Merges the branches of a condition that is not known. A branch that leaves the loop is merged where the loop, or the pass, ends; one
   * that leaves a function or the script is left out. Returns how all branches together end.
   */
  mergeBranches(branches: readonly { readonly flow: Flow; readonly scope: Scope }[], frame: Frame, pos: number): Flow {
    const on = branches.filter(({ flow }) => flow === "next");
    const exits = branches.flatMap(({ flow, scope }) => (flow === "break" || flow === "continue" ? [{ flow, scope }] : []));
    const [first] = exits;
    const endsAll = on.length === 0 && first !== undefined;
    const scopes = (endsAll ? exits : on).map(({ scope }) => scope);
    if (!endsAll) this.#exits.push(...exits);
    merge(scopes, frame, pos);
    return endsAll ? first.flow : "next";
  }

  /** Follows a loop. A variable on which its end and a `break` that may happen disagree becomes a hole. */
  follow(frame: Frame, pos: number, run: () => Flow): Flow {
    const outer = this.#exits;
    this.#exits = [];
    const flow = run();
    if (this.#exits.length > 0) merge([frame.shell.scope.copy(), ...this.#exits.map(({ scope }) => scope)], frame, pos);
    this.#exits = outer;
    return flow;
  }

  /**
   * Ends a pass through the body of a loop: a variable on which it and a `continue` that may happen disagree becomes a hole. Returns how the
   * loop ends; undefined if it goes on. `break 2` and `continue 2` end the inner loop, too.
   */
  endPass(flow: Flow, frame: Frame, pos: number): Flow | undefined {
    const skipped = this.#exits.filter((exit) => exit.flow === "continue");
    this.#exits = this.#exits.filter((exit) => exit.flow === "break");
    if (skipped.length > 0) merge([frame.shell.scope.copy(), ...skipped.map(({ scope }) => scope)], frame, pos);
    if (flow === "return" || flow === "exit") return flow;
    if (flow !== "next" && --this.levels > 0) return flow;
    return flow === "break" ? "next" : undefined;
  }
}
