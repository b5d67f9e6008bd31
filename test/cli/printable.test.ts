/** Names from outside cannot act on a terminal: what it would obey is escaped, and what is long is cut. */
import { afterEach, describe, expect, test, vi } from "vitest";
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { printError, printJson, printStdout } from "../../src/cli/output.ts";
import { renderFindings } from "../../src/frontend/diagnostic.ts";
import { printSummary } from "../../src/report/summary.ts";

const hostile = "a\u001b[2J\u0007\u009b31m\u202etxt\u200b\u2028b";
/** Characters that may not reach a terminal. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const acts = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e]/;

test("control characters are escaped as code points", () => {
  expect(printable(hostile)).toBe("a\\u{1b}[2J\\u{7}\\u{9b}31m\\u{202e}txt\\u{200b}\\u{2028}b");
  expect(printable("two\nlines\tand \ud800")).toBe("two\\nlines\\tand \\u{d800}");
  expect(printable("plain, größer, 模型 🙂")).toBe("plain, größer, 模型 🙂");
});

test.each([199, 200, 201, 100_000])("a name of %i characters takes at most 200", (length) => {
  for (const c of ["x", "\u0007"]) {
    const text = printable(c.repeat(length));
    expect(text.length).toBeLessThanOrEqual(200);
    if (length > 200) expect(text).toMatch(new RegExp(` … \\(${length} characters\\)$`));
  }
  if (length <= 200) expect(printable("x".repeat(length))).toBe("x".repeat(length));
});

describe("printed text", () => {
  const written: string[] = [];
  const watch = (stream: NodeJS.WriteStream) => vi.spyOn(stream, "write").mockImplementation((text) => written.push(String(text)) > 0);
  afterEach(() => {
    vi.restoreAllMocks();
    written.length = 0;
  });
  test.each<[string, () => void]>([
    ["a message with its way out", () => printError(new Trouble(`${hostile} is missing`, `name ${hostile}`))],
    ["an internal error", () => printError(new Error(hostile))],
    ["data", () => printStdout(hostile)],
    ["JSON", () => printJson({ [hostile]: hostile })],
  ])("%s", (_, act) => {
    watch(process.stdout);
    watch(process.stderr);
    act();
    expect(written.join("")).toContain("txt");
    expect(written.join("")).not.toMatch(acts);
  });

  test("JSON output is unchanged", () => {
    watch(process.stdout);
    printJson({ name: hostile });
    expect(JSON.parse(written.join(""))).toEqual({ name: hostile });
  });
});

test("a finding shows its line without control characters", () => {
  const at = { file: hostile, line: 1, col: 1, endCol: 3, lineText: hostile };
  const text = renderFindings([{ code: "X1", level: "error", title: "t", path: "p", found: hostile, why: "w", fix: hostile, at }], {
    color: false,
  });
  expect(text).not.toMatch(acts);
});

test("the name of a job is cut in a summary", () => {
  const device = { name: "h100-80gb", bytes: 1 };
  const text = printSummary({
    ...{ name: "n".repeat(5000), digest: "d", ranks: 1, roles: 1, instructions: 1, peak: { stage: 0, bytes: 1 }, device },
  });
  expect(text.split("\n")[0]!.length).toBeLessThan(260);
});
