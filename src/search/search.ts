/**
 * Finds the fastest way to run a job on some ranks. All choices whose sizes divide are ordered by a forecast in closed form; rules, exact memory
 * and the estimate of the compiled plan then judge the most promising ones.
 */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { deviceOf } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import type { Assumptions } from "../analysis/estimate/timedBlocks.ts";
import type { GeneratedKernel } from "../codegen/kernelSpec.ts";
import { cpu, type Target } from "../codegen/targets.ts";
import { peakOf } from "../rules/all.ts";
import { secondsText } from "../units.ts";
import {
  choicesOf,
  type FixedKeys,
  type JobChoice,
  jobWith,
  type KeptKeys,
  searchedKeys,
  sideKeys,
  variantsOf,
  withLowerBound,
} from "./choice.ts";
import { estimateJob, type JobEstimateOptions } from "./estimateJob.ts";
import { type Forecast, type ForecastBase, forecast, forecastBase } from "./forecast.ts";
import { type ChangeStep, choiceOfJob, stepsFrom } from "./fromWritten.ts";
import { firstError, type TimedPlan, timedPlan } from "./timedPlan.ts";
import { type Conflict, conflictOf } from "./waysOut.ts";

/** Settings of a search. */
export interface SearchOptions {
  readonly profile: DeviceProfile;
  readonly fixed?: FixedKeys;
  /** Keys that follow from a choice otherwise. */
  readonly given?: KeptKeys;
  /** The kernels of the device; default cpu, which has none. */
  readonly target?: Target;
  /** Plans to compile at most; default 20. */
  readonly plans?: number;
  /** Bytes of the device that a plan leaves free; default: what the driver and NCCL hold (`reserveOf`). */
  readonly reserve?: number;
  /** What the software of the profile does and a plan does not say; default: nothing. */
  readonly assumed?: Assumptions;
  /** The job with the degrees that its file has, to compare with. */
  readonly written?: Job | undefined;
  /** Receives a line for each compiled plan. */
  readonly onProgress?: (line: string) => void;
}

/** A choice that does not fit. */
export interface TooLarge {
  readonly choice: JobChoice;
  /** Bytes of the rank with the most memory. */
  readonly peak: number;
}

/** A compiled choice. */
export interface Candidate extends TimedPlan {
  readonly choice: JobChoice;
  /** Set if the job has this choice: it was judged whatever the forecast says, so it is no measure of other choices. */
  readonly isWritten?: true;
}

/** Choices that were not compiled, by their reason. */
export interface RuledOut {
  /** The code and title of a rule, or `memory`. */
  readonly reason: string;
  readonly choices: number;
}

/** The result of a search. */
export interface SearchResult {
  /** Compiled choices that fit, the fastest first. */
  readonly best: readonly Candidate[];
  /** Choices whose exact memory does not fit, the least first. */
  readonly tooLarge: readonly TooLarge[];
  /** The job as its file has it; undefined if it has errors or another number of ranks. */
  readonly written?: TimedPlan;
  /** Where the best is faster than that by more than three percent: the changes that lead to it. */
  readonly fromWritten?: readonly ChangeStep[];
  readonly choices: number;
  readonly ruledOut: readonly RuledOut[];
  /** Bytes that a plan may take, and that it leaves free of the device. */
  readonly memory: number;
  readonly reserve: number;
  /** Where nothing fits: why, and what would. */
  readonly conflict?: Conflict;
}

/** The least gain over the job as written, as a share, for which the search prints reasons. */
const LEAST_GAIN = 0.03;
const GIB = 2 ** 30;
/**
 * Returns the bytes of a device that no plan can have: driver, context and code, and beside several ranks the buffers of NCCL. Measured on H200:
 * 0.5 GiB on one, 2 to 3 GiB more on two (test/results/cuda-host-2026-11-30.md).
 */
const reserveOf = (ranks: number): number => (ranks === 1 ? 0.75 * GIB : 3.5 * GIB);

/** Of the plans, those with other values of the keys beside the mesh. */
const VARIANTS = 6;
/** Choices of one mesh that are compiled at most: their forecasts differ little. */
const PER_MESH = 3;
/** A forecast of memory may be too high by this factor. */
const DOUBT = 1.12;
/** The share of its calibrated forecast below which no estimate is expected. */
const MARGIN = 0.8;
/** Plans that are compiled before the search may end early. */
const LEAST = 8;
/** Exact sizes after which forecasts of memory are corrected, and the share of a corrected forecast that is believed. */
const FEW = 3;
const CLOSE = 0.9;
/** Choices whose exact memory may be too large before the search ends. */
const MOST_TOO_LARGE = 64;

/** Searches. Throws a BrokenInvariant for bugs alone; a job that no choice fits has an empty `best`. */
export function search(
  job: Job,
  { profile, fixed = {}, given = {}, target: kernels = cpu, plans = 20, assumed = {}, written, onProgress, ...more }: SearchOptions,
): SearchResult {
  const target = remembering(kernels);
  const options = { profile, target, assumed };
  const { reserve = reserveOf(job.parallel.world) } = more;
  const memory = deviceOf(job.cluster.device).memory - reserve;
  const base = forecastBase(job, profile, assumed);
  const all = [...choicesOf(job, fixed)].map((choice) => {
    const own = { choice, ...forecast(base, choice) };
    const lower = own.bytes > DOUBT * memory ? withLowerBound(job, choice, fixed) : undefined;
    return lower ? { choice: lower, seconds: own.seconds, bytes: forecast(base, lower).bytes } : own;
  });
  const fitting = all.filter(({ bytes }) => bytes <= DOUBT * memory);
  const judge = new Judge(job, { ...options, fixed, given, memory, report: (line) => onProgress?.(line), plans });
  const { judged, tooLarge, ratios, sizes } = judge;
  if (fitting.length < all.length) judge.count("memory", all.length - fitting.length);

  const perMesh = new Map<string, number>();
  // where nothing fits, the choices with the least memory show how much is missing
  const order = fitting.length > 0 ? fitting.sort((a, b) => a.seconds - b.seconds) : all.sort((a, b) => a.bytes - b.bytes);
  // the job as written is judged first, so that nothing slower is called the best
  const first = written && matching(order, choiceOfJob(written));
  const isOpen = sideKeys.some((key) => fixed[key] === undefined);
  const variants = isOpen ? Math.min(VARIANTS, Math.floor(plans / 3)) : 0;
  for (const one of first ? [first, ...order.filter((o) => o !== first)] : order) {
    const { choice, seconds, bytes } = one;
    if (judged.length >= plans - variants || tooLarge.length >= MOST_TOO_LARGE || isDone(judged, ratios, seconds)) break;
    const mesh = meshKey(choice);
    if ((perMesh.get(mesh) ?? 0) >= PER_MESH) continue;
    // exact sizes correct the forecasts of the choices that follow
    if (fitting.length > 0 && bytes * sizes.correction(choice) * CLOSE > memory) {
      judge.count("memory");
      continue;
    }
    if (judge.judge(choice, one, choice === first?.choice)) perMesh.set(mesh, (perMesh.get(mesh) ?? 0) + 1);
  }
  judge.judgeVariants(base);
  const best = judged.sort((a, b) => a.seconds - b.seconds);
  const [winner] = best;
  const own =
    written && firstError(written) === undefined ? timedPlan(estimateJob(written, options), peakOf(written, target).bytes) : undefined;
  const isBeaten = written && own && winner && winner.seconds * (1 + LEAST_GAIN) < own.seconds;
  return {
    ...{ best, tooLarge: tooLarge.sort((a, b) => a.peak - b.peak) },
    ...(own && { written: own }),
    ...(isBeaten && { fromWritten: stepsFrom(written, own, winner.choice, { ...options, base, given }) }),
    ...{ choices: all.length, memory, reserve },
    ...(!winner && { conflict: conflictOf(job, { profile, target, fixed, given, memory }) }),
    ruledOut: judge.ruledOut(),
  };
}

/** What judges of choices need. */
interface JudgeSettings extends JobEstimateOptions {
  readonly fixed: FixedKeys;
  readonly given: KeptKeys;
  /** Bytes that a plan may take. */
  readonly memory: number;
  readonly plans: number;
  readonly report: (line: string) => void;
}

/** Judges choices by rules, exact memory and the estimate of the compiled plan. */
class Judge {
  readonly judged: Candidate[] = [];
  readonly tooLarge: TooLarge[] = [];
  /** Estimated over forecast seconds. */
  readonly ratios: number[] = [];
  readonly sizes = new ExactSizes();
  readonly #ruledOut = new Map<string, number>();
  readonly #job: Job;
  readonly #settings: JudgeSettings;

  constructor(job: Job, settings: JudgeSettings) {
    this.#job = job;
    this.#settings = settings;
  }

  /** Counts choices that are not compiled. */
  count(reason: string, n = 1): void {
    this.#ruledOut.set(reason, (this.#ruledOut.get(reason) ?? 0) + n);
  }

  ruledOut(): RuledOut[] {
    return [...this.#ruledOut].map(([reason, choices]) => ({ reason, choices })).sort((a, b) => b.choices - a.choices);
  }

  /** Judges a choice; one that does not fit once more with a lower bound of rows. Returns false if a rule excludes it. */
  judge(choice: JobChoice, { seconds, bytes }: Forecast, isWritten = false): boolean {
    const { given, target, memory, fixed, plans, report, ...options } = this.#settings;
    const candidate = jobWith(this.#job, choice, given);
    const broken = firstError(candidate);
    if (broken !== undefined) {
      this.count(broken);
      return false;
    }
    const { bytes: peak } = peakOf(candidate, target);
    this.sizes.add(choice, peak / bytes);
    const lower = peak > memory ? withLowerBound(this.#job, choice, fixed) : undefined;
    if (lower) return this.judge(lower, { seconds, bytes });
    if (peak > memory) this.tooLarge.push({ choice, peak });
    else {
      const result = { choice, ...timedPlan(estimateJob(candidate, { ...options, target }), peak), ...(isWritten && { isWritten }) };
      this.judged.push(result);
      this.ratios.push(result.seconds / seconds);
    }
    report(`${this.judged.length} of at most ${plans} plans, ${this.tooLarge.length} too large, best ${bestText(this.judged)}`);
    return true;
  }

  /** Judges the best choice, and then the best of another mesh, with other values of the keys beside the mesh; a value that helps is kept for those after it. */
  judgeVariants(base: ForecastBase): void {
    const { fixed, plans } = this.#settings;
    const known = new Set(this.judged.map(({ choice }) => JSON.stringify(choice)));
    const meshes = new Set<string>();
    const fastest = (): Candidate[] => this.judged.toSorted((a, b) => a.seconds - b.seconds);
    for (;;) {
      const start = fastest().find(({ choice }) => !meshes.has(meshKey(choice)));
      if (!start) return;
      meshes.add(meshKey(start.choice));
      let at = start;
      for (const { key, value } of variantsOf(this.#job, start.choice, fixed)) {
        if (this.judged.length >= plans) return;
        const choice = { ...at.choice, [key]: value };
        const text = JSON.stringify(choice);
        if (known.has(text)) continue;
        known.add(text);
        const before = this.judged.length;
        this.judge(choice, forecast(base, choice));
        const found = this.judged[before];
        if (found && found.seconds < at.seconds) at = found;
      }
    }
  }
}

/** Returns the choice of a list that equals another. */
const matching = <T extends { readonly choice: JobChoice }>(all: readonly T[], like: JobChoice): T | undefined =>
  all.find(({ choice }) => searchedKeys.every((key) => choice[key] === like[key]));

/** Returns the target with its kernels generated once for each spec: choices share most of them. */
function remembering(target: Target): Target {
  const known = new Map<string, GeneratedKernel | undefined>();
  const generate: Target["generate"] = (spec) => {
    if (!known.has(spec.name)) known.set(spec.name, target.generate(spec));
    return known.get(spec.name);
  };
  return { ...target, generate };
}

/** Exact sizes over forecast ones: they correct the forecasts of other choices, first of those that recompute and batch alike. */
class ExactSizes {
  readonly #all: number[] = [];
  readonly #alike = new Map<string, number[]>();

  add(choice: JobChoice, ratio: number): void {
    this.#all.push(ratio);
    const key = this.#keyOf(choice);
    this.#alike.set(key, [...(this.#alike.get(key) ?? []), ratio]);
  }

  /** Returns the factor of a forecast of bytes; 0 where too few sizes are known. */
  correction(choice: JobChoice): number {
    const alike = this.#alike.get(this.#keyOf(choice)) ?? [];
    const known = alike.length >= FEW ? alike : this.#all;
    return known.length >= FEW ? median(known) : 0;
  }

  #keyOf({ recompute, micro_batch, pipeline, tensor, dispatch, expert_overlap }: JobChoice): string {
    return [recompute, micro_batch, pipeline > 1, tensor > 1, dispatch, expert_overlap].join();
  }
}

const median = (numbers: readonly number[]): number => numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)] ?? 1;

const meshKey = ({ tensor, pipeline, context, expert, expert_tensor }: JobChoice): string =>
  [tensor, pipeline, context, expert, expert_tensor].join();

/** Returns whether later choices, whose forecasts are slower, cannot be faster than the best so far. */
function isDone(judged: readonly Candidate[], ratios: readonly number[], seconds: number): boolean {
  if (judged.length < LEAST) return false;
  const sorted = ratios.toSorted((a, b) => a - b);
  const ratio = sorted[Math.floor(sorted.length / 4)] ?? 1;
  return seconds * ratio * MARGIN > Math.min(...judged.map((c) => c.seconds));
}

function bestText(judged: readonly Candidate[]): string {
  const best = Math.min(...judged.map(({ seconds }) => seconds));
  return Number.isFinite(best) ? `${secondsText(best)} a step` : "none that fits yet";
}

/** Returns the candidates that no other beats in both memory and time, by falling memory. */
export function frontOf(candidates: readonly Candidate[]): Candidate[] {
  const isBeaten = (c: Candidate): boolean =>
    candidates.some((o) => o !== c && o.seconds <= c.seconds && o.peak <= c.peak && (o.seconds < c.seconds || o.peak < c.peak));
  return candidates.filter((c) => !isBeaten(c)).sort((a, b) => b.peak - a.peak);
}

/** What another value of one key would cost. */
export interface Alternative {
  readonly key: (typeof searchedKeys)[number];
  readonly value: number | string;
  readonly instead: number | string;
  /** Seconds that the best candidate saves against the best with the other value. */
  readonly saved: number;
  /** The part of the step that changes most, and its change in seconds. */
  readonly part: { readonly name: string; readonly saved: number };
}

/** Returns for each key the best candidate with another value, compared with the winner. */
export function alternativesOf(best: readonly Candidate[]): Alternative[] {
  const [winner, ...others] = best;
  if (!winner) return [];
  return searchedKeys.flatMap((key): Alternative[] => {
    const other = others.find((c) => !c.isWritten && c.choice[key] !== winner.choice[key]);
    if (!other) return [];
    const names = [...new Set([...Object.keys(winner.parts), ...Object.keys(other.parts)])];
    const changes = names.map((name) => ({ name, saved: (other.parts[name] ?? 0) - (winner.parts[name] ?? 0) }));
    const part = changes.reduce((a, b) => (b.saved > a.saved ? b : a), { name: "none", saved: 0 });
    return [{ key, value: winner.choice[key], instead: other.choice[key], saved: other.seconds - winner.seconds, part }];
  });
}
