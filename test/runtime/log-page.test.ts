/** The page of logs: runs over each other, in a browser, while they train and after. */
import { appendFileSync, mkdtempSync, rmSync } from "node:fs";
import { request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { StepResult } from "../../schemas/stepResult.ts";
import { readLog } from "../../src/cli/log/readLog.ts";
import { openRunLog } from "../../src/cli/log/runLog.ts";
import { type Serving, serveLogs } from "../../src/cli/pageServer.ts";
import { compile } from "../../src/compile.ts";
import { launch, noBrowser } from "../support/chromium.ts";
import { jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-log-page-"));
const { plan } = compile(
  jobOf({
    name: "<script>alert(1)</script>",
    model: { layers: 1, hidden: 16, heads: 2, vocab: 256, seq: 16, moe: { experts: 2, top_k: 2, ffn: 16, router: { aux_coeff: 0.1 } } },
    train: { global_batch: 2, steps: 8, optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  }),
);
const step = (n: number, loss: number): StepResult => ({
  ...{ step: n, loss, aux_loss: 0.1, grad_norm: 1, lr: 1e-3, tokens: 32, seconds: 0.5, data_wait_seconds: 0 },
  ...{ expert_load: 1.5, expert_loads: [[24, 8]] },
});
/** Writes a log of some losses. */
function logOf(name: string, losses: readonly number[]) {
  const log = openRunLog(plan, { folder: join(folder, name), interval: 1, steps: 0 });
  for (const [i, loss] of losses.entries()) log.add(step(i + 1, loss), 2 * (i + 1));
  return log;
}
const first = logOf("first", [5, 4, 3.5]);
first.addEvaluation({ step: 3, part: "validation", loss: 3.75, perplexity: 42.5, tokens: 32, sources: [], seconds: 1 });
logOf("second", [5.5, 5.25]);

let served: Serving;
beforeAll(async () => {
  served = await serveLogs([folder], { port: 0 });
});
afterAll(async () => {
  await served?.close();
  rmSync(folder, { recursive: true, force: true });
});

test("a log is read while its last line is written; a step that a resumed run repeats counts once", () => {
  logOf("third", [5, 4]);
  appendFileSync(join(folder, "third", "metrics.jsonl"), '{"step":2,"lm loss":4.5}\n{"step":3,"lm lo');
  expect(readLog(join(folder, "third")).scalars.get("lm loss")).toEqual([
    { step: 1, value: 5 },
    { step: 2, value: 4.5 },
  ]);
  rmSync(join(folder, "third"), { recursive: true });
});

test("a folder without a log is named", async () => {
  await expect(serveLogs([join(folder, "none")], { port: 0 })).rejects.toThrow("none has no log of a run");
  await expect(serveLogs([folder], { port: 70000 })).rejects.toThrow("there is no port 70000");
});

test("other pages and hosts get nothing", async () => {
  const status = (path: string, headers: Record<string, string>) =>
    new Promise((done) => void request(new URL(path, served.address), { headers }, (answer) => done(answer.resume().statusCode)).end());
  expect(await status("/", { origin: "http://evil.example" })).toBe(403);
  expect(await status("/", { host: "evil.example" })).toBe(403);
  expect(await status("/../etc/passwd", {})).toBe(404);
  expect(await status("/constructor", {})).toBe(404);
  expect(await status("/", {})).toBe(200);
});

describe.skipIf(noBrowser)(`in Chromium${noBrowser ? `: skipped, ${noBrowser}` : ""}`, () => {
  let browser: Browser;
  beforeAll(async () => {
    browser = await launch();
  });
  afterAll(() => browser?.close());

  test("shows runs over each other, and further steps when it is loaded again", async () => {
    const page = await browser.newPage();
    page.setDefaultTimeout(0);
    const printed: string[] = [];
    page.on("pageerror", (error) => printed.push(String(error)));
    page.on("console", (message) => printed.push(message.text()));
    await page.goto(served.address);
    expect(await page.textContent("h1")).toBe("2 runs");
    const rows = () => page.locator("#runs tr:not(:first-child)").allInnerTexts();
    expect(
      (await rows()).map((row) =>
        row
          .split("\t")
          .map((cell) => cell.trim())
          .filter(Boolean)
          .slice(0, 5),
      ),
    ).toEqual([
      ["first", "<script>alert(1)</script>", "3 of 8", "3.5000", "3.7500"],
      ["second", "<script>alert(1)</script>", "2 of 8", "5.2500", "–"],
    ]);
    const loss = page.locator("figure", { hasText: "lm loss" }).first();
    // the losses of two runs, and the evaluation of one
    expect(await loss.locator("polyline").count()).toBe(3);
    expect((await loss.locator("polyline").first().getAttribute("points"))?.split(" ")).toHaveLength(3);
    const bars = await page.locator(".experts li").allInnerTexts();
    expect(bars.map((bar) => bar.replace(/ +/g, " "))).toEqual(["layer 0 1.50", "layer 0 1.50"]);
    expect(await page.evaluate("getComputedStyle(document.querySelector('polyline')).fill")).toBe("none");
    first.add(step(4, 3), 8);
    await page.reload();
    expect((await rows())[0]).toContain("4 of 8");
    expect(printed).toEqual([]);
  });
});
