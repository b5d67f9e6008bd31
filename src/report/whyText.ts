/** Text of the answer to `--why` and `--op`. */
import { bytesText, countText, flopsText, plural, ranges, secondsText } from "../units.ts";
import { linkText } from "./links.ts";
import { bold, fitLines, labelled } from "./textLayout.ts";
import type { Why } from "./why.ts";

/** Where a job key is written: the file and the line, or that it is a default. */
export interface KeyPlace {
  readonly path: string;
  /** As `job.yaml:12: tensor: 4`; absent if the job file is not known. */
  readonly line?: string;
  readonly isDefault?: boolean;
}

/** Formats the answer. `refusals` says per cure which rules refuse the changed job. */
export function printWhy(why: Why, place: KeyPlace, refusals: readonly string[], width: number): string[] {
  const { id, what, phase, stages, layers, because, key, sharding, shapes, link, removed_by } = why;
  const where = [
    ...(phase ? [phase] : []),
    ...(layers.length > 1 ? [`alike in layers ${ranges(layers)}`] : []),
    `stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`,
  ];
  const row = (label: string, text: string | undefined): string[] => (text === undefined ? [] : labelled(label, text, width));
  const value = typeof key.value === "object" && key.value !== null ? JSON.stringify(key.value) : String(key.value);
  return [
    ...fitLines([bold(id)], width),
    ...fitLines([`${what}; ${where.join(", ")}`], width),
    "",
    ...because.flatMap((sentence, i) => row(i === 0 ? "because" : "", sentence)),
    ...row("key", place.line ?? `${key.path}: ${value.length > 60 ? "…" : value}${place.isDefault ? " (default)" : ""}`),
    ...row("layout", sharding),
    ...row("shapes", shapes),
    ...row(
      "links",
      link && link.ranks > 1
        ? `${plural(link.ranks, "rank")} ${linkText(link)}${link.across > 0 ? `; ${percent(link.across)} of its bytes cross nodes` : ""}`
        : undefined,
    ),
    ...row("bytes", bytesLine(why)),
    ...row("cost", costLine(why)),
    ...row("time", timeLine(why)),
    ...removed_by.flatMap(({ set, effect }, i) =>
      row(
        i === 0 ? "without" : "",
        `${Object.entries(set)
          .map(([path, to]) => `${path}=${to}`)
          .join(", ")}: ${effect}${refusals[i] ? ` (not alone: ${refusals[i]})` : ""}`,
      ),
    ),
    ...(removed_by.length === 0 ? row("without", "no single key: it belongs to every job of this kind") : []),
    "",
  ];
}

const percent = (share: number): string => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function bytesLine({ is, bytes, times_per_step, bytes_per_step, layers }: Why): string {
  const all = layers.length > 1 ? ", all layers of the stage" : "";
  if (is === "buffer")
    return `${bytesText(bytes)} a rank${times_per_step > 1 ? ` x ${times_per_step} copies` : ""}; ${bytesText(bytes_per_step)}${all}`;
  const verb = is === "instruction" ? "reads and writes" : "sends";
  return `a rank ${verb} ${bytesText(bytes)}, ${countText(times_per_step)} x a step; ${bytesText(bytes_per_step)} a step${is === "instruction" ? "" : all}`;
}

function costLine({ is, flops, seconds_per_step, share }: Why): string | undefined {
  if (is === "instruction") return flops ? `${flopsText(flops)} each time` : "no flops: it moves bytes";
  if (is === "buffer") return `${percent(share)} of the peak of the stage`;
  const time = seconds_per_step === undefined ? "" : `at least ${secondsText(seconds_per_step)} a step at the bandwidth of the links; `;
  return `${time}${percent(share)} of the bytes that the rank sends`;
}

function timeLine({ is, estimated_seconds_per_step: seconds, layers }: Why): string | undefined {
  if (seconds === undefined) return undefined;
  const all = layers.length > 1 ? ", all layers of the stage" : "";
  return `${secondsText(seconds)} a step by the estimate${all}${is === "instruction" ? "" : ", if nothing hides it"}`;
}
