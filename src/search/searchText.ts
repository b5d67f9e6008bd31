/** The result of a search as lines. */
import type { Job } from "../../schemas/job.ts";
import { bold, type Column, fitTable, wrap } from "../report/textLayout.ts";
import { bytesText, countText, plural, rateText, secondsText } from "../units.ts";
import { type FixedKeys, type JobChoice, settingsOf } from "./choice.ts";
import { alternativesOf, type Candidate, frontOf, type SearchResult, type TooLarge } from "./search.ts";

const columns: readonly Column[] = [
  { head: "tp", right: true },
  { head: "pp", right: true },
  { head: "vpp", right: true },
  { head: "cp", right: true },
  { head: "ep", right: true },
  { head: "etp", right: true },
  { head: "batch", right: true },
  { head: "recompute" },
  { head: "step", right: true },
  { head: "tokens/s", right: true, drop: 1 },
  { head: "a GPU", right: true, drop: 2 },
  { head: "memory", right: true },
  { head: "also" },
];

/** Returns the table of choices that fits a width; without the keys beside the mesh where all are as in the job. */
function tableOf(choices: readonly TooLarge[], rowsOf: readonly (readonly string[])[], width: number): string[] {
  const hasSides = choices.some(({ choice }) => sidesText(choice) !== "");
  const shown = hasSides ? columns : columns.slice(0, -1);
  return fitTable(
    shown,
    rowsOf.map((row) => row.slice(0, shown.length)),
    { width },
  );
}

/** Returns the keys beside the mesh whose values differ from those of the job. Words but "none" say by themselves which key they are of. */
function sidesText({ dispatch, expert_overlap, schedule, gradient_bucket, rows_bound }: JobChoice): string {
  const named = { dispatch, overlap: expert_overlap, schedule, bucket: gradient_bucket, rows: rows_bound };
  return Object.entries(named)
    .filter(([, value]) => value !== "job")
    .map(([name, value]) => (typeof value === "string" && value !== "none" ? value : `${name} ${value}`))
    .join(", ");
}

const degreesOf = ({ choice: c }: TooLarge): string[] => [
  ...[c.tensor, c.pipeline, c.virtual_pipeline, c.context, c.expert, c.expert_tensor, c.micro_batch].map(String),
  c.recompute,
];
const rowOf = (candidate: Candidate): string[] => [
  ...degreesOf(candidate),
  secondsText(candidate.seconds),
  countText(Math.round(candidate.tokens_per_second)),
  rateText(candidate.model_flops_per_second),
  bytesText(candidate.peak),
  sidesText(candidate.choice),
];
const sizesOf = (choice: TooLarge): string[] => [...degreesOf(choice), "", "", "", bytesText(choice.peak), sidesText(choice.choice)];

/** Returns the report of a search: the best choices, why the first wins, the front of memory and time, and what was ruled out. */
export function printSearch(
  job: Job,
  result: SearchResult,
  { top, width, fixed }: { top: number; width: number; fixed: FixedKeys },
): string[] {
  const { best, tooLarge, written, choices, ruledOut } = result;
  const [winner] = best;
  const counted = `${plural(choices, "choice")} for ${plural(job.parallel.world, "rank")}; ${plural(best.length, "plan")} compiled, ${countText(tooLarge.length)} too large`;
  const lines = [bold(job.name), `  ${counted}`, ""];
  if (!winner) lines.push(...nothingFits(result, fixed, width));
  else
    lines.push(
      ...tableOf(best.slice(0, top), best.slice(0, top).map(rowOf), width),
      ...(written ? [`  as written: ${secondsText(written.seconds)}, ${bytesText(written.peak)}`] : []),
      ...whyLines(best, width),
      ...writtenLines(result, width),
      ...frontLines(best, width),
      "",
      ...wrap(
        `use it with ${settingsOf(job, winner.choice)
          .map((s) => `--set ${s.includes("[") || s.includes("|") ? `'${s}'` : s}`)
          .join(" ")}`,
        width,
      ),
    );
  if (ruledOut.length > 0) {
    lines.push("", bold("ruled out"));
    for (const { reason, choices } of ruledOut.slice(0, top)) {
      const text = reason === "memory" ? `far more than ${bytesText(result.memory)} by forecast` : reason;
      lines.push(...wrap(`  ${countText(choices)}  ${text}`, width, "    "));
    }
  }
  return lines;
}

const valueText = (value: number | string): string => (value === "job" ? "as written" : `${value}`);

function whyLines(best: readonly Candidate[], width: number): string[] {
  const lines = alternativesOf(best).map(({ key, value, instead, saved, part }) => {
    const reason = part.saved > 0 ? `, ${secondsText(part.saved)} more of ${part.name}` : "";
    return `  ${key} ${valueText(value)}: with ${valueText(instead)} the best takes ${secondsText(saved)} more${reason}`;
  });
  return lines.length === 0 ? [] : ["", bold("why the first"), ...lines.flatMap((line) => wrap(line, width, "    "))];
}

/** Says what leads from the job as written to the best choice, one change after another. */
function writtenLines({ written, fromWritten = [] }: SearchResult, width: number): string[] {
  if (!written || fromWritten.length === 0) return [];
  const lines = fromWritten.map(({ changes, seconds, saved, peak, part, reason }) => {
    const what =
      changes.map(({ key, from, to }) => `${key} ${valueText(from)} -> ${valueText(to)}`).join(", ") || "layout and sequence as above";
    const change = `${secondsText(Math.abs(saved))} ${saved >= 0 ? "less" : "more"}`;
    const why = [
      ...(Math.abs(part.saved) > 0 ? [`${secondsText(Math.abs(part.saved))} ${part.saved >= 0 ? "less" : "more"} of ${part.name}`] : []),
      ...(reason === undefined ? [] : [reason]),
    ].join("; ");
    return `  ${what}: ${secondsText(seconds)} (${change}), ${bytesText(peak)}${why && `: ${why}`}`;
  });
  return ["", bold("from the job as written to the first"), ...lines.flatMap((line) => wrap(line, width, "    "))];
}

function frontLines(best: readonly Candidate[], width: number): string[] {
  const front = frontOf(best);
  if (front.length < 2) return [];
  return ["", bold("less memory for more time"), ...tableOf(front, front.map(rowOf), width)];
}

/** Says how much memory is missing, which given keys conflict, and what would fit. */
function nothingFits({ choices, tooLarge, memory, reserve, conflict }: SearchResult, fixed: FixedKeys, width: number): string[] {
  const [least] = tooLarge;
  const lack = `the least memory found is ${bytesText(least?.peak ?? 0)}, and the device has ${bytesText(memory + reserve)}, of which the driver and NCCL need ${bytesText(reserve)}`;
  const invalid =
    choices === 0
      ? "no choice exists: degrees must divide the ranks and the heads, experts and the batch; stages need layers"
      : "no choice is valid; the rules that exclude them are below";
  const lines = wrap(`  ${least ? `nothing fits: ${lack}` : invalid}`, width, "  ");
  if (least) lines.push(...tableOf(tooLarge.slice(0, 3), tooLarge.slice(0, 3).map(sizesOf), width));
  const textOf = (key: keyof FixedKeys): string => `--fix ${key}=${fixed[key]}`;
  const { keys = [], waysOut = [] } = conflict ?? {};
  if (keys.length > 0)
    lines.push(
      ...wrap(
        `  ${least ? "nothing fits" : "no choice remains"} with ${keys.map(textOf).join(" ")}, and no fewer of the given keys exclude all`,
        width,
        "  ",
      ),
    );
  for (const { change, peak } of waysOut) {
    const without =
      "ranks" in change ? `on ${plural(change.ranks, "rank")} (--gpus ${change.ranks})` : `without ${textOf(change.leaveOut)}`;
    lines.push(...wrap(`  fits ${without}: ${bytesText(peak)}`, width, "  "));
  }
  if (!least) return lines;
  const others = `a device with more memory (--device)${waysOut.length === 0 ? ", more ranks (--gpus)" : ""}, or a lower model.moe.rows_bound`;
  lines.push(...wrap(`  other ways out: ${others}`, width, "  "));
  return lines;
}
