/** The page of a code, from its template. One code needs the compiler: whether a plan fits is known of a plan alone. */
import leven from "leven";
import { Trouble } from "../schemas/trouble.ts";
import { render } from "../templates/bindings.ts";
import { compile } from "./compile.ts";
import { renderFindings } from "./diagnostic.ts";
import { badJob, type Explanation, explain, codes as jobCodes } from "./explain.ts";
import { fitFindings, fitRule } from "./fits.ts";
import { readJob } from "./readJob.ts";

const codes = [...jobCodes, fitRule.code].sort();

export function explained(code: string): Explanation {
  const wanted = code.toUpperCase();
  const found = wanted === fitRule.code ? explainFit() : explain(wanted);
  if (found) return found;
  const near = codes.filter((known) => leven(known, wanted) <= 1).slice(0, 3);
  throw new Trouble(
    `no finding has the code ${code}`,
    near.length > 0 ? `did you mean ${near.join(" or ")}?` : "rankc explain lists them all",
  );
}

export function printExplanation({ code, level, title, why, bad, finding }: Explanation): string {
  const lines = (text: string): string[] => text.trimEnd().split("\n");
  return render("text/explain", { code, level, title, why, example: lines(bad), said: lines(renderFindings([finding], { color: false })) });
}

export const explainAll = (): Explanation[] => codes.map(explained);

function explainFit(): Explanation {
  const { job, source } = readJob(badJob(fitRule.bad), "job.yaml");
  return { ...fitRule, finding: fitFindings(compile(job!).plan, source)[0]! };
}
