/** Texts of `rankc explain`. */
import leven from "leven";
import { Trouble } from "../../schemas/trouble.ts";
import { render } from "../../templates/bindings.ts";
import { renderFindings, WIDTH, wrap } from "./diagnostic.ts";
import { codes, type Explanation, explain } from "./explain.ts";

/** Returns the explanation of a code. Throws a Trouble if the code does not exist. */
export function explained(code: string): Explanation {
  const wanted = code.toUpperCase();
  const found = explain(wanted);
  if (found) return found;
  const near = codes.filter((known) => leven(known, wanted) <= 1).slice(0, 3);
  throw new Trouble(
    `no finding has the code ${code}`,
    near.length > 0 ? `did you mean ${near.join(" or ")}?` : "rankc explain lists them all",
  );
}

/** The columns before the text of a finding (templates/text/explain.hbs). */
const INDENT = 4;

/** Formats an explanation; its text has at most `width` columns. */
export function printExplanation({ code, level, title, why, bad, finding, corrected = "" }: Explanation, width = 100): string {
  const lines = (text: string): string[] => text.trimEnd().split("\n");
  return render("text/explain", {
    ...{
      code,
      level,
      title,
      why: wrap(why, width).join("\n"),
      example: lines(bad),
      finding: lines(renderFindings([finding], { color: false, width: Math.min(WIDTH, width - INDENT) })),
    },
    corrected: corrected === "" ? [] : lines(corrected),
  });
}

/** Returns the explanations of all codes. */
export const explainAll = (): Explanation[] => codes.map(explained);
