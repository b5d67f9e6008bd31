/** Measures the page of `rankc view` for a plan of 2,048 ranks in headless Chromium: size, time to open, and frames while drawings move, with their CPU time. */
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { Page } from "playwright-core";
import { build } from "vite";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { pageOf, pageTemplate } from "../../src/cli/viewPage.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { viewData } from "../../src/report/view/readPlanView.ts";
import { root } from "../support/checkout.ts";
import { launch, noBrowser } from "../support/chromium.ts";
import { cpuByThread } from "./frameCpu.ts";

if (noBrowser) throw new Error(noBrowser);
const sets = ["parallel.world=2048", "train.global_batch=16384"];
const job = "plans/deepseek-v3-1024gpu/job.yaml";
const OPENS = 7;
const FRAMES = 300;

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;
const at95 = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[Math.floor(0.95 * values.length)] ?? 0;
const cpu = (): number => process.cpuUsage().user / 1e6;

const { plan } = compile(readJob(readFileSync(join(root, job), "utf8"), job, sets).job!);
const before = cpu();
const data = viewData([{ plan, job: { text: "", places: {} }, warnings: [], profile: packageProfile("h100-80gb") }]);
const seconds = cpu() - before;
const folder = mkdtempSync(join(tmpdir(), "rankc-view-bench-"));
await build({ configFile: join(root, "src/page/vite.config.ts"), build: { outDir: join(folder, "built") }, logLevel: "error" });
const file = join(folder, "page.html");
writeFileSync(file, pageOf(pageTemplate(join(folder, "built/index.html")), data, [{}]));
const runs = data.plans[0]!.timeline.stages.reduce((sum, { start }) => sum + start.length, 0);
console.log(
  `${plan.mesh.world} ranks, ${data.plans[0]!.stages.length} stages, ${runs} block runs; page ${statSync(file).size} bytes, data in ${seconds.toFixed(2)} s of CPU`,
);

/** Moves a drawing by wheel events, one in each frame. Returns the intervals of frames and the time of each drawing, in ms. */
const move = (page: Page, selector: string, event: string): Promise<{ frames: number[]; draws: number[] }> =>
  page.evaluate(`(async () => {
    const canvas = document.querySelector(${JSON.stringify(selector)});
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const [frames, draws] = [[], []];
    let last = await new Promise(requestAnimationFrame);
    for (let i = 0; i < ${FRAMES}; i++) {
      const begin = performance.now();
      canvas.dispatchEvent(new WheelEvent("wheel", { clientX: left + width / 2, clientY: top + height / 2, bubbles: true, cancelable: true, ...(${event})(i) }));
      draws.push(performance.now() - begin);
      const now = await new Promise(requestAnimationFrame);
      frames.push(now - last);
      last = now;
    }
    return { frames, draws };
  })()`);

const browser = await launch();
try {
  const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
  const address = pathToFileURL(file).href;
  const opened: number[] = [];
  for (let i = 0; i < OPENS; i++) {
    await page.goto("about:blank");
    await page.goto(`${address}#schedule`);
    await page.waitForFunction("performance.getEntriesByName('rankc-ready').length > 0");
    opened.push(await page.evaluate("performance.getEntriesByName('rankc-ready')[0].startTime"));
  }
  console.log(`open: median ${median(opened).toFixed(0)} ms, most ${Math.max(...opened).toFixed(0)} ms of ${OPENS}`);
  /** Moves a drawing twice: for frames a second, and with the tracing of the browser for the CPU time of its threads. */
  const report = async (selector: string, event: string, what: string): Promise<void> => {
    const { frames, draws } = await move(page, selector, event);
    const rate = (1000 * frames.length) / frames.reduce((a, b) => a + b, 0);
    console.log(
      `${what}: ${rate.toFixed(1)} frames a second; interval median ${median(frames).toFixed(1)}, 95 % ${at95(frames).toFixed(1)} ms; drawing median ${median(draws).toFixed(1)}, 95 % ${at95(draws).toFixed(1)} ms`,
    );
    await browser.startTracing(page, { categories: ["toplevel"] });
    await move(page, selector, event);
    const threads = [...cpuByThread(await browser.stopTracing())].map(([name, ms]) => [name, ms / FRAMES] as const);
    const shown = threads.filter(([, ms]) => ms >= 0.1).sort(([, a], [, b]) => b - a);
    console.log(`  CPU ms a frame: ${shown.map(([name, ms]) => `${name} ${ms.toFixed(2)}`).join(", ")}`);
  };
  const zoom = "(i) => ({ deltaY: i < 100 ? -12 : i < 200 ? 12 : i % 2 ? 20 : -20 })";
  const pan = "(i) => ({ shiftKey: true, deltaY: i < 150 ? 30 : -30 })";
  await report(".schedule-panel canvas", zoom, "schedule, zoom");
  await page.goto("about:blank");
  const { end } = data.plans[0]!.timeline;
  await page.goto(`${address}#schedule?time=${0.1 * end}~${0.6 * end}`);
  await page.waitForSelector(".schedule-panel canvas");
  await report(".schedule-panel canvas", pan, "schedule, pan over half of the step");
  await page.goto("about:blank");
  await page.goto(`${address}#schedule?time=${0.1 * end}~${0.13 * end}`);
  await page.waitForSelector(".schedule-panel canvas");
  await report(".schedule-panel canvas", pan, "schedule, pan with single runs");
  await page.click("#tab-traffic");
  await page.waitForSelector(".traffic-panel canvas");
  await report(".traffic-panel canvas", zoom, "matrix, zoom");
  await page.click("#tab-memory");
  await page.waitForSelector(".memory-panel canvas");
  await report(".memory-panel canvas", pan, "memory, pan");
} finally {
  await browser.close();
  rmSync(folder, { recursive: true, force: true });
}
