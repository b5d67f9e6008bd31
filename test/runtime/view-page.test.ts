/** The page of `rankc view` in a real browser: one file without network; every panel shows the selection, in both themes and by keyboard. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { Browser, Page } from "playwright-core";
import { build } from "vite";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { jobView } from "../../src/cli/jobView.ts";
import { compileAt } from "../../src/cli/loadPlan.ts";
import { pageOf, pageTemplate } from "../../src/cli/viewPage.ts";
import { warningsOf } from "../../src/cli/warnings.ts";
import { decidingKeys, type PlanToView, viewData } from "../../src/report/view/readPlanView.ts";
import { root } from "../support/checkout.ts";
import { launch, noBrowser } from "../support/chromium.ts";
import { full } from "../support/tiers.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-view-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const jobPath = join(root, "plans/tiny-interleaved/job.yaml");

async function planAt(
  set: readonly string[],
  target?: string,
  path = jobPath,
): Promise<{ shown: PlanToView; sources: Record<string, string> }> {
  const options = { set, overlay: [] };
  const { plan, sources } = await compileAt(path, options, target);
  const job = await jobView(plan, decidingKeys(plan), { path, options });
  return { shown: { plan, job, warnings: await warningsOf(plan) }, sources: Object.fromEntries(sources) };
}

/** A drawing whose pixels can be read. */
interface Readable {
  getImageData(x: number, y: number, width: number, height: number): { readonly data: { readonly buffer: ArrayBuffer } };
}

/** Returns the texts of a page whose contrast to their ground is below 4.5, the least of WCAG 2 for ordinary text. */
const lowContrast = (page: Page): Promise<string[]> =>
  page.evaluate(`(() => {
    const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((s, c, i) => s + c * [0.2126, 0.7152, 0.0722][i], 0);
    const groundOf = (e) => { for (let at = e; at; at = at.parentElement) { const c = channels(getComputedStyle(at).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(":disabled") && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).flatMap((e) => {
      const [a, b] = [light(channels(getComputedStyle(e).color)), light(groundOf(e))];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return contrast < 4.5 ? [e.className + ": " + e.textContent.trim().slice(0, 30) + " " + contrast.toFixed(2)] : [];
    });
  })()`);

/** Addresses of a page about one plan, of one about two, of one about a plan with streams, and of one about a plan with pairs. */
let one: string;
let two: string;
let streams: string;
let pairs: string;
beforeAll(async () => {
  const built = join(folder, "built");
  await build({ configFile: join(root, "src/page/vite.config.ts"), build: { outDir: built }, logLevel: "error" });
  const template = pageTemplate(join(built, "index.html"));
  const first = await planAt([], "cuda:sm_90a");
  const second = await planAt(["parallel.tensor=1", "parallel.sequence=false", 'name="<script>alert(1)</script>"']);
  const written = (name: string, plans: readonly (typeof first)[]): string => {
    const file = join(folder, name);
    writeFileSync(
      file,
      pageOf(
        template,
        viewData(plans.map(({ shown }) => shown)),
        plans.map(({ sources }) => sources),
      ),
    );
    return pathToFileURL(file).href;
  };
  one = written("one.html", [first]);
  two = written("two.html", [first, second]);
  const beside = ["parallel.world=8", "parallel.distributed_optimizer=true", "parallel.gradient_bucket=1", "parallel.parameter_bucket=1"];
  streams = written("streams.html", [await planAt(beside)]);
  const interleaved = ["parallel.expert_overlap=interleave", "train.global_batch=32"];
  pairs = written("pairs.html", [await planAt(interleaved, undefined, join(root, "plans/tiny-mixtral/job.yaml"))]);
});

test("a page that is not built is named", () => {
  expect(() => pageTemplate(join(folder, "none.html"))).toThrow("the page is not built");
});

test("the page is one file: it names no other address, and texts of the plan are not in it as HTML", () => {
  const text = readFileSync(new URL(two), "utf8");
  expect(text).not.toMatch(/(src|href)="(?!data:)/);
  expect(text).not.toContain("alert(1)");
});

describe.skipIf(noBrowser)(`in Chromium${noBrowser ? `: skipped, ${noBrowser}` : ""}`, () => {
  let browser: Browser;
  let page: Page;
  const said: string[] = [];
  beforeAll(async () => {
    browser = await launch();
    page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
    page.on("pageerror", (error) => said.push(String(error)));
    // reading the pixels of canvases is what this test does
    page.on("console", (message) => void (/^Canvas2D/.test(message.text()) || said.push(message.text())));
    page.on("request", (request) => {
      if (!/^(file|data|blob):/.test(request.url())) said.push(request.url());
    });
  });
  afterAll(() => browser?.close());

  const opened = async (address: string): Promise<void> => {
    await page.goto("about:blank");
    await page.goto(address);
    await page.waitForSelector(".tabs");
    // a canvas that is not drawn yet has the size of every canvas, and nothing on it can be chosen
    await page.waitForFunction("[...document.querySelectorAll('canvas')].every(({ width, height }) => width !== 300 || height !== 150)");
  };
  /** Expects what the page shows after it has drawn: each value is read again until it is as expected. */
  const soon = <T>(read: () => Promise<T>, message?: string) => expect.poll(read, { timeout: 60_000, ...(message && { message }) });
  /** The visible text of an element. */
  const textOf = async (selector: string): Promise<string> => (await page.locator(selector).allInnerTexts()).join("\n");
  const details = (): Promise<string> => textOf(".details");
  /** How many colours a canvas has: a blank one has 1 or 2. */
  const coloursOf = (selector: string): Promise<number> =>
    page.locator(selector).evaluate((element) => {
      const canvas = element as unknown as { width: number; height: number; getContext(kind: "2d"): Readable };
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    });
  /** Clicks into a canvas, by shares of its size. */
  const clickAt = async (selector: string, x: number, y: number): Promise<void> => {
    const box = (await page.locator(selector).boundingBox())!;
    await page.mouse.click(box.x + x * box.width, box.y + y * box.height);
  };

  test("choosing a collective shows its ranks, bytes, time slots and line of the job on every panel", async () => {
    await opened(one);
    await page.keyboard.press("/");
    await page.keyboard.type("all_gather attn forward");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".section-graph li.selected");
    const text = await details();
    expect(text).toMatch(/collective/);
    expect(text).toMatch(/Why/);
    expect(text).toMatch(/job\.yaml:\d+ parallel\./);
    expect(text).toMatch(/a rank sends\n[\d.]+ Ki?B, \d+ × a step/);
    expect(text).toMatch(/Ranks\n\s*0–1/);
    await soon(() => textOf(".yaml mark")).toMatch(/tensor|sequence/);
    for (const tab of ["mesh", "schedule", "memory", "traffic"]) {
      await page.click(`#tab-${tab}`);
      await soon(() => coloursOf(".panel canvas.fill"), tab).toBeGreaterThan(4);
      await soon(details).toContain("all_gather");
    }
  });

  test("a shared address opens the same view", async () => {
    await page.click("#tab-schedule");
    await page.waitForFunction("location.hash.startsWith('#schedule?')");
    const before = await details();
    const hash: string = await page.evaluate("location.hash");
    expect(hash).toContain("select=instruction~0~forward~");
    await opened(`${one}${hash}`);
    await soon(() => page.getAttribute("#tab-schedule", "aria-selected")).toBe("true");
    await soon(details).toBe(before);
  });

  test("the selected collective is marked in mesh, schedule and matrix, and its time in the column at the right", async () => {
    const pixels = (selector: string): Promise<string> =>
      page.locator(selector).evaluate((e) => (e as unknown as { toDataURL(): string }).toDataURL());
    for (const tab of ["mesh", "schedule", "traffic"]) {
      await opened(`${one}#${tab}`);
      await soon(() => coloursOf(".panel canvas.fill"), tab).toBeGreaterThan(4);
      const before = await pixels(".panel canvas.fill");
      await page.keyboard.press("/");
      await page.keyboard.type("all_gather attn forward");
      await page.keyboard.press("Enter");
      await page.click(`#tab-${tab}`);
      await soon(() => pixels(".panel canvas.fill"), tab).not.toBe(before);
      await soon(() => coloursOf(".mini-time")).toBeGreaterThan(2);
      await soon(() => coloursOf(".mini-mesh")).toBeGreaterThan(2);
    }
  });

  test("Enter takes the hit of the text, also of a letter that is not drawn yet", async () => {
    await opened(`${streams}#schedule`);
    await page.keyboard.press("/");
    await page.locator("dialog.search input").evaluate((e) => {
      const field = e as unknown as { value: string; dispatchEvent(event: Event): void };
      field.value = "reduce_scatter stream gradients";
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.dispatchEvent(Object.assign(new Event("keydown", { bubbles: true }), { key: "Enter" }));
    });
    await soon(details).toMatch(/stream\ngradients/);
  });

  test("streams: a wide run has a lane for each, and a collective on it names its stream and what waits for it", async () => {
    await opened(`${streams}#schedule`);
    await soon(() => textOf(".lanes-of-runs")).toBe("A wide run shows, from above: in order, stream gradients, stream parameters");
    await page.keyboard.press("/");
    await page.keyboard.type("reduce_scatter stream gradients");
    await page.keyboard.press("Enter");
    await soon(details).toMatch(/stream\ngradients/);
    await soon(details).toMatch(/1 × a step/);
    // the last backward run of stage 0 is the only one with collectives of gradients: it stands at the end of the first row
    await page.click("#tab-schedule");
    await page.keyboard.press("Escape");
    const box = (await page.locator(".schedule-panel canvas").boundingBox())!;
    await page.mouse.move(box.x + box.width - 14, box.y + 40);
    for (let i = 0; i < 12; i++) await page.mouse.wheel(0, -240);
    await page.waitForFunction("location.hash.includes('time=')");
    const found = new Set<string>();
    for (let x = 90; x < box.width - 14 && !found.has("gradients"); x += 7) {
      await page.mouse.move(box.x + x, box.y + 72);
      const stream = /, stream (\w+)$/.exec(await textOf(".status"))?.[1];
      if (stream === undefined) continue;
      found.add(stream);
      await page.mouse.down();
      await page.mouse.up();
    }
    expect([...found]).toContain("gradients");
    await soon(details).toMatch(/collective[\s\S]*stream\ngradients/);
  });

  test("pairs: the legend names their mark, and a run lists the turns of its pair", async () => {
    await opened(`${pairs}#schedule`);
    await soon(() => textOf(".legend")).toContain("line above: a pair, whose instructions alternate");
    await page.focus(".schedule-panel canvas");
    for (let i = 0; i < 4; i++) await page.keyboard.press("ArrowRight");
    await soon(details).toMatch(/alternates with\nstage 0, B0/);
    await soon(details).toMatch(/Turns of the pair[\s\S]*dispatch\s+\d+ instructions? from layers\.0/);
    expect(await textOf(".status")).toMatch(/F\d: forward of microbatch \d, alternates with B0,/);
  });

  test("mesh: a rank is chosen by pointer or keyboard, and its groups are named", async () => {
    await opened(`${one}#mesh`);
    await page.focus(".mesh-panel canvas");
    await page.keyboard.press("ArrowRight");
    await soon(details).toContain("rank 1");
    await soon(() => textOf(".status")).toMatch(/^rank 1: node 0, stage 0; tp 1/);
    await clickAt(".mesh-panel canvas", 0.02, 0.08);
    await soon(details).toContain("rank 0");
    await page.click(".axes button:has-text('pp')");
    await soon(details).toContain("axis");
  });

  test("schedule: zoom, waits, runs and what they wait for", async () => {
    await opened(`${one}#schedule`);
    await page.focus(".schedule-panel canvas");
    for (const key of ["ArrowRight", "ArrowDown"]) await page.keyboard.press(key);
    await soon(() => textOf(".status")).toMatch(/^stage 1, F\d/);
    await soon(details).toMatch(/receives from\nstage 0, F/);
    await page.click("button[aria-label='zoom in']");
    await page.waitForFunction("location.hash.includes('time=')");
    const box = (await page.locator(".schedule-panel canvas").boundingBox())!;
    await page.mouse.move(box.x + 400, box.y + 60);
    await page.mouse.wheel(0, -600);
    await page.focus(".schedule-panel canvas");
    await page.keyboard.press("Home");
    await page.waitForFunction("!location.hash.includes('time=')");
    await page.click("text=by microbatch");
    await soon(() => coloursOf(".schedule-panel canvas")).toBeGreaterThan(8);
    await page.click("summary");
    await soon(() => page.locator(".schedule-panel tbody tr").count()).toBeGreaterThan(10);
  });

  test("memory: the fullest moment lists what is alive, by falling bytes", async () => {
    await opened(`${one}#memory`);
    await page.click("text=fullest moment");
    await page.waitForFunction("location.hash.includes('moment=')");
    const rows = await page.locator(".alive tbody tr").allInnerTexts();
    expect(rows.length).toBeGreaterThan(10);
    expect(rows.join("\n")).toMatch(/activation[\s\S]*workspace|workspace[\s\S]*activation/);
    await page.click(".alive tbody button >> nth=0");
    await soon(details).toMatch(/parameter|optimizer|gradient|activation|buffer/);
  });

  test("program: layers fold, arrow keys go from instruction to instruction", async () => {
    await opened(`${one}#program`);
    const count = await page.locator(".rows li").count();
    await page.click(".fold-button[aria-expanded='true'] >> nth=0");
    await soon(() => page.locator(".rows li").count()).toBeLessThan(count);
    await page.click(".fold-button[aria-expanded='false'] >> nth=-1");
    await page.click(".rows button >> nth=0");
    const first = await textOf(".details h2");
    await page.keyboard.press("ArrowDown");
    await soon(() => textOf(".details h2")).not.toBe(first);
    await soon(() => page.locator("svg.lanes circle").count()).toBeGreaterThan(0);
  });

  test("communication: a pair of ranks, and axes that are hidden", async () => {
    await opened(`${one}#traffic`);
    await page.focus(".traffic-panel canvas");
    await page.keyboard.press("ArrowRight");
    await soon(details).toMatch(/0 → 1[\s\S]*on one node; [\d.]+ [KM]iB a step/);
    const before = await coloursOf(".traffic-panel canvas");
    for (const box of await page.locator(".check input").all()) await box.uncheck();
    await soon(() => coloursOf(".traffic-panel canvas")).toBeLessThan(before);
  });

  test("kernels: the source of the one that is chosen", async () => {
    await opened(`${one}#kernels`);
    await page.fill(".kernels-panel input", "gemm");
    await page.click(".kernels-panel tbody button >> nth=0");
    await page.waitForFunction("document.querySelector('.code')?.textContent.includes('__global__')");
    await soon(details).toMatch(/runs a step\n\d/);
  });

  test("two plans: consequences, changed instructions, the difference of bytes; names are text", async () => {
    await opened(`${two}#findings`);
    await soon(() => textOf(".findings")).toMatch(/parallel\.tensor\s+2\s+1/);
    await page.click(".segments label:nth-child(2)");
    expect(await page.textContent("h1")).toBe("<script>alert(1)</script>");
    await page.click("#tab-program");
    await soon(() => page.locator(".is-changed, .is-added").count()).toBeGreaterThan(0);
    await page.click("#tab-traffic");
    await page.click("text=difference");
    await soon(() => coloursOf(".traffic-panel canvas")).toBeGreaterThan(3);
  });

  test("themes: both have readable text, and the choice is kept in the address", async () => {
    await opened(`${one}#schedule`);
    const ground = (): Promise<string> => page.evaluate("getComputedStyle(document.body).backgroundColor");
    await page.emulateMedia({ colorScheme: "light" });
    expect(await ground()).toBe("rgb(255, 255, 255)");
    await page.emulateMedia({ colorScheme: "dark" });
    await page.waitForSelector("html[data-theme='dark']");
    expect(await ground()).toBe("rgb(21, 25, 30)");
    await page.keyboard.press("t");
    expect(await ground()).toBe("rgb(255, 255, 255)");
    await page.waitForFunction("location.hash.includes('theme=light')");
  });

  test("parts have roles and names; nothing was logged and nothing was loaded from a network", async () => {
    await opened(`${one}#mesh`);
    expect(await page.getByRole("tab").count()).toBe(7);
    for (const role of ["tabpanel", "complementary", "status", "img"] as const)
      expect(await page.getByRole(role).count(), role).toBeGreaterThan(0);
    const unnamed = await page.evaluate(
      "[...document.querySelectorAll('button, input, select, canvas')].filter((e) => !(e.textContent || e.getAttribute('aria-label') || e.closest('label'))).length",
    );
    expect(unnamed).toBe(0);
    expect(said).toEqual([]);
  });

  test("screenshots of every panel in both themes", full, async () => {
    const shots = process.env.RANKC_SCREENSHOTS;
    if (shots) mkdirSync(shots, { recursive: true });
    for (const colorScheme of ["light", "dark"] as const) {
      await page.emulateMedia({ colorScheme });
      for (const panel of ["mesh", "schedule", "memory", "program", "traffic", "kernels", "findings"]) {
        await opened(`${two}#${panel}?theme=${colorScheme}`);
        const image = await page.screenshot(shots ? { path: join(shots, `${panel}-${colorScheme}.png`) } : {});
        expect(image.length).toBeGreaterThan(10_000);
        // text of every panel has a contrast of at least 4.5 to its ground
        expect(await lowContrast(page), `${panel}, ${colorScheme}`).toEqual([]);
      }
    }
  });
});
