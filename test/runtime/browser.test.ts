/** The page in Chromium: a plan that trains there has the losses of the CPU, the reference; a missing feature is an error with a fix. */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { build } from "vite";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { type Serving, serve } from "../../src/cli/pageServer.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { root } from "../support/checkout.ts";
import { launch, noBrowser } from "../support/chromium.ts";

/** On one rank, and with few sizes of products: compiling them is what takes time on the software adapter. */
const sets = ["parallel.world=1", "parallel.tensor=1", "model.ffn=64", "model.kv_heads=4", "model.layers=1"];
const home = join(root, "plans/tiny-dense");
const job = readJob(readFileSync(join(home, "job.yaml"), "utf8"), "job.yaml", sets).job!;
const STEPS = 3;
const PATIENT = { timeout: 600_000 };

const folder = mkdtempSync(join(tmpdir(), "rankc-browser-"));
const page = join(folder, "page");
const long = join(folder, "long.txt");
writeFileSync(long, "A text of one's own, in a file. ".repeat(100));
const short = join(folder, "short.txt");
writeFileSync(short, "too short");
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Returns the losses of a run on the CPU over the same text. */
async function lossesOn(text: string, steps: number): Promise<number[]> {
  const own: Job = { ...job, data: { ...job.data, path: text } };
  const run = await openRun(compile(own).plan, { baseDir: home });
  const losses: number[] = [];
  for (let step = 0; step < steps; step++) losses.push((await run.step()).loss);
  await run.close();
  return losses;
}

beforeAll(async () => {
  await build({ configFile: join(root, "runtime/browser/vite.config.ts"), build: { outDir: page }, logLevel: "error" });
});

test("the page is one small script without modules of Node", () => {
  const scripts = readdirSync(join(page, "assets")).filter((name) => name.endsWith(".js"));
  expect(scripts).toHaveLength(1);
  const script = readFileSync(join(page, "assets", scripts[0]!), "utf8");
  // zod alone is larger; the page draws initial weights, keeps documents apart, evaluates, and has the loop that issues steps ahead; Preact and its signals, which the parts that
  // it shares with the page of `rankc view` need, are 21,000 of it
  expect(script.length).toBeLessThan(105_000);
  // the last is what vite puts in the place of a module of Node
  expect(script).not.toMatch(/["'`]node:|process\.|Buffer\.(from|alloc)|browser-external/);
});

describe.skipIf(noBrowser)(`in Chromium with a software adapter${noBrowser ? `: skipped, ${noBrowser}` : ""}`, () => {
  let served: Serving;
  let browser: Browser;
  beforeAll(async () => {
    const { plan, sources } = compile(job, { target: await loadTarget("webgpu") });
    served = await serve({ plan, source: (file) => sources.get(file)! }, { port: 0, baseDir: home, page });
    browser = await launch();
  });
  afterAll(async () => {
    await browser?.close();
    await served?.close();
  });

  /** The page, ready; `before` runs in it first. Everything it logs is an error. */
  async function opened(before?: string): Promise<Page> {
    const page = await browser.newPage();
    // the limit is the test's
    page.setDefaultTimeout(0);
    page.on("pageerror", (error) => printed.push(String(error)));
    page.on("console", (message) => printed.push(message.text()));
    if (before) await page.addInitScript({ content: before });
    await page.goto(served.address);
    await page.waitForSelector("#start:enabled");
    return page;
  }
  const printed: string[] = [];
  const lossesIn = (page: Page): Promise<number[]> =>
    page
      .locator("#rows td:nth-child(2)")
      .allTextContents()
      .then((cells) => cells.map(Number));
  const ends = (page: Page) => page.waitForSelector("#start:enabled");

  test("the plan's text, then one's own: the losses of the CPU", async () => {
    const page = await opened();
    expect(await page.textContent("h1")).toBe("tiny-dense");
    expect(await page.textContent("#memory")).toMatch(/^\d+\.\d MiB$/);
    expect(await page.inputValue("#steps")).toBe(String(job.train.steps));
    await page.fill("#steps", String(STEPS));
    await page.click("#start");
    await ends(page);
    expect(await page.textContent("#status")).toBe(`Trained ${STEPS} steps.`);
    expect(await page.isHidden("#error")).toBe(true);
    const ground = (): Promise<string> => page.evaluate("getComputedStyle(document.body).backgroundColor");
    const before = await ground();
    await page.click(".theme-button");
    await expect.poll(ground, PATIENT).not.toBe(before);
    await page.keyboard.press("t");
    await expect.poll(ground, PATIENT).toBe(before);
    expect(await page.evaluate("location.hash")).toMatch(/^#theme=(light|dark)$/);
    const got = await lossesIn(page);
    const want = await lossesOn(job.data.path, STEPS);
    expect(got).toHaveLength(STEPS);
    for (const [step, loss] of want.entries()) expect(Math.abs(got[step]! - loss), `loss of step ${step + 1}`).toBeLessThan(1e-4);
    expect(await page.textContent("#adapter")).toContain("swiftshader");
    expect(await page.textContent("#speed")).toMatch(/^[\d,]+$/);

    // the curve has a point for each step, and the value of a step is read from it by pointer and by keys
    await expect.poll(async () => (await page.getAttribute("#chart polyline", "points"))?.trim().split(/\s+/).length, PATIENT).toBe(STEPS);
    await page.focus("#chart svg");
    await page.keyboard.press("End");
    expect(await page.getAttribute("#chart svg", "aria-valuetext")).toBe(`step ${STEPS}: loss ${want[STEPS - 1]!.toFixed(4)}`);
    const box = (await page.locator("#chart svg").boundingBox())!;
    await page.mouse.move(box.x + 70, box.y + 100);
    expect(await page.textContent("#chart .value")).toBe(`step 1: loss ${want[0]!.toFixed(4)}`);

    await page.selectOption("#text", "file");
    expect(await page.isDisabled("#start")).toBe(true);
    await page.setInputFiles("#file", long);
    await page.fill("#steps", "1000");
    await page.click("#start");
    await page.waitForSelector("#rows tr", { state: "attached" });
    await page.click("#stop");
    await ends(page);
    expect(await page.textContent("#status")).toMatch(/^Stopped after \d+ of 1000 steps/);
    const own = await lossesIn(page);
    expect(own.length).toBeLessThan(1000);
    expect(Math.abs(own[0]! - (await lossesOn(long, 1))[0]!)).toBeLessThan(1e-4);

    await page.setInputFiles("#file", short);
    await page.click("#start");
    await ends(page);
    expect(await page.textContent("#error")).toMatch(/short\.txt: the corpus has 9 bytes.*Fix: use a longer corpus/s);
    expect(await lossesIn(page)).toEqual([]);
    expect(printed).toEqual([]);
  });

  test("without WebGPU the page lists browsers that have it", async () => {
    const page = await opened("delete Navigator.prototype.gpu");
    expect(await page.textContent("#error")).toMatch(/no WebGPU.*Chrome.*Safari.*Firefox/s);
  });

  test("without an adapter the page names the browser's diagnostics", async () => {
    const page = await opened("GPU.prototype.requestAdapter = async () => null");
    await page.click("#start");
    await ends(page);
    expect(await page.textContent("#error")).toMatch(/no adapter.*chrome:\/\/gpu/s);
  });
});
