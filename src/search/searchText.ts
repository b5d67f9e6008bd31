/** The result of a search as lines. */
import type { Job } from "../../schemas/job.ts";
import { bold, type Column, fitTable, wrap } from "../report/textLayout.ts";
import { bytesText, countText, plural, rateText, secondsText } from "../units.ts";
import { type FixedKeys, settingsOf } from "./choice.ts";
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
];

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
];
const sizesOf = (choice: TooLarge): string[] => [...degreesOf(choice), "", "", "", bytesText(choice.peak)];

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
      ...fitTable(columns, best.slice(0, top).map(rowOf), { width }),
      ...(written ? [`  as written: ${secondsText(written.seconds)}, ${bytesText(written.peak)}`] : []),
      ...whyLines(best, width),
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

function whyLines(best: readonly Candidate[], width: number): string[] {
  const lines = alternativesOf(best).map(({ key, value, instead, saved, part }) => {
    const reason = part.saved > 0 ? `, ${secondsText(part.saved)} more of ${part.name}` : "";
    return `  ${key} ${value}: with ${instead} the best takes ${secondsText(saved)} more${reason}`;
  });
  return lines.length === 0 ? [] : ["", bold("why the first"), ...lines.flatMap((line) => wrap(line, width, "    "))];
}

function frontLines(best: readonly Candidate[], width: number): string[] {
  const front = frontOf(best);
  if (front.length < 2) return [];
  return ["", bold("less memory for more time"), ...fitTable(columns, front.map(rowOf), { width })];
}

/** Says how much memory is missing, and which given keys stand in the way. */
function nothingFits({ tooLarge, memory }: SearchResult, fixed: FixedKeys, width: number): string[] {
  const [least] = tooLarge;
  if (!least) return ["  no choice is valid; the rules that exclude them are below"];
  const given = Object.entries(fixed).map(([key, value]) => `${key}=${value}`);
  const free = given.length > 0 ? `leave out --fix ${given.join(" --fix ")}, ` : "";
  return [
    ...wrap(`  nothing fits: the least memory found is ${bytesText(least.peak)}, and the device has ${bytesText(memory)}`, width, "  "),
    ...fitTable(columns, tooLarge.slice(0, 3).map(sizesOf), { width }),
    ...wrap(`  ${free}use more ranks (--gpus), a device with more memory (--device), or a lower model.moe.rows_bound`, width, "  "),
  ];
}
