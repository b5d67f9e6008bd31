/** Where the seconds of a stage go: kernels by part, waits for communication by axes and class, and what runs beside communication. */
import type { CommunicationClass, KernelPart } from "./timedBlocks.ts";

/** Where seconds of a stage go. Communication counts where the compute stream waits for it, by its axes. */
export interface TimeParts {
  readonly kernels: Readonly<Record<KernelPart, number>>;
  readonly exposed: ReadonlyMap<string, number>;
  /** The same by class. */
  readonly exposedBy: ReadonlyMap<CommunicationClass, number>;
  /** Per class, the seconds of communication in which the compute stream does something else: by the op of its kernel, or what it waits for. */
  readonly hiddenUnder: ReadonlyMap<CommunicationClass, ReadonlyMap<string, number>>;
  /** Waiting for the host to launch kernels. */
  readonly launches: number;
  /** Waiting for other stages. */
  readonly bubble: number;
}

/** Sums of parts, to which runs are added. */
export class PartSums implements TimeParts {
  readonly kernels: Record<KernelPart, number> = { products: 0, attention: 0, "other kernels": 0, optimizer: 0 };
  readonly exposed = new Map<string, number>();
  readonly exposedBy = new Map<CommunicationClass, number>();
  readonly hiddenUnder = new Map<CommunicationClass, Map<string, number>>();
  launches = 0;
  bubble = 0;

  addKernel(part: KernelPart, seconds: number): void {
    this.kernels[part] += seconds;
  }
  addExposed(axes: string, seconds: number, by?: CommunicationClass): void {
    if (seconds <= 0) return;
    this.exposed.set(axes, (this.exposed.get(axes) ?? 0) + seconds);
    if (by) this.exposedBy.set(by, (this.exposedBy.get(by) ?? 0) + seconds);
  }
  /** Adds communication that runs while the compute stream does something else: `activity`. */
  addHidden(by: CommunicationClass, activity: string, seconds: number): void {
    if (seconds <= 0) return;
    const own = this.hiddenUnder.get(by) ?? new Map<string, number>();
    this.hiddenUnder.set(by, own);
    own.set(activity, (own.get(activity) ?? 0) + seconds);
  }
  /** Adds parts that ran so many times. */
  addAll(parts: TimeParts, times: number): void {
    for (const [part, seconds] of Object.entries(parts.kernels) as [KernelPart, number][]) this.kernels[part] += times * seconds;
    for (const [axes, seconds] of parts.exposed) this.addExposed(axes, times * seconds);
    for (const [by, seconds] of parts.exposedBy) this.exposedBy.set(by, (this.exposedBy.get(by) ?? 0) + times * seconds);
    for (const [by, activities] of parts.hiddenUnder)
      for (const [activity, seconds] of activities) this.addHidden(by, activity, times * seconds);
    this.launches += times * parts.launches;
    this.bubble += times * parts.bubble;
  }
  get total(): number {
    return sumOfParts(this);
  }
}

/** Returns the sum of all parts in seconds. */
export const sumOfParts = ({ kernels, exposed, launches, bubble }: TimeParts): number =>
  [...Object.values(kernels), ...exposed.values()].reduce((a, b) => a + b, launches + bubble);

/** What the compute stream does while communication runs, where it runs no kernel. */
export const activities = {
  /** It waits for other communication, over these axes. */
  waitsFor: (axes: string): string => `waits for ${axes}`,
  otherStages: "waits for other stages",
  launches: "launches",
  /** Of messages between stages, which travel while earlier blocks run. */
  earlierBlocks: "earlier blocks",
} as const;
