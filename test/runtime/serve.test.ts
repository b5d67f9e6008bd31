/** `rankc serve` gives a browser the page, the plan, its kernels and its text, and nothing else of the machine. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import type { Plan } from "../../schemas/plan.ts";
import { serve } from "../../src/cli/pageServer.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-serve-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const page = join(folder, "page");
mkdirSync(join(page, "assets"), { recursive: true });
writeFileSync(join(page, "index.html"), "<title>rankc</title>");
writeFileSync(join(page, "assets", "index-1.js"), "export {};");
writeFileSync(join(folder, "corpus.txt"), "It was the best of times. ".repeat(20));
writeFileSync(join(folder, "secret.txt"), "secret");

const job = jobOf({
  name: "small",
  model: { layers: 1, hidden: 16, ffn: 32, heads: 2, vocab: 256, seq: 8 },
  train: { global_batch: 2, steps: 3, precision: "fp32", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});
const { plan, sources } = compile(job, { target: await loadTarget("webgpu") });
const source = (file: string): string => sources.get(file)!;
const served = await serve({ plan, source }, { port: 0, baseDir: folder, page });
afterAll(() => served.close());

interface Got {
  readonly status: number;
  readonly type: string;
  readonly text: string;
}
/** The path goes out as it stands; `fetch` would take dots out of it. */
function ask(
  path: string,
  { at = served.address, method = "GET", ...headers }: { at?: string; method?: string; host?: string; origin?: string } = {},
): Promise<Got> {
  const { hostname, port } = new URL(at);
  return new Promise((resolve, reject) => {
    const asked = request({ hostname, port, path, method, headers }, (answer) => {
      let text = "";
      answer.setEncoding("utf8").on("data", (chunk) => (text += chunk));
      answer.on("end", () => resolve({ status: answer.statusCode!, type: answer.headers["content-type"]!, text }));
    });
    asked.on("error", reject).end();
  });
}

describe("a plan that is served", () => {
  test("is a page, its plan, its kernels and its text", async () => {
    expect(served.address).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/$/);
    expect(await ask("/")).toEqual({ status: 200, type: "text/html; charset=utf-8", text: "<title>rankc</title>" });
    expect(await ask("/assets/index-1.js")).toMatchObject({ status: 200, type: "text/javascript; charset=utf-8", text: "export {};" });
    expect(await ask("/plan.json")).toMatchObject({ status: 200, type: "application/json", text: printPlan(plan) });
    expect(await ask("/corpus")).toMatchObject({ status: 200, text: "It was the best of times. ".repeat(20) });
    const files = plan.kernels.map((k) => k.source!.file);
    expect(files.length).toBeGreaterThan(10);
    for (const file of files) expect(await ask(`/kernels/${file}`)).toMatchObject({ status: 200, text: source(file) });
    expect(await ask("/plan.json", { method: "HEAD" })).toMatchObject({ status: 200, text: "" });
  });

  test.each([
    "/../secret.txt",
    "/assets/../../secret.txt",
    "/%2e%2e/secret.txt",
    "/assets/%2e%2e%2f%2e%2e%2fsecret.txt",
    "/..%5csecret.txt",
    "//secret.txt",
    "/kernels/../secret.txt",
    "/secret.txt",
    "/index.html/",
    "/%00",
  ])("has no content at %s", async (path) => {
    const { status, text } = await ask(path);
    expect(status).toBe(404);
    expect(text).toMatch(/^there is no .* here\n$/);
  });

  test("refuses foreign host names, and writes", async () => {
    expect(await ask("/plan.json", { host: "evil.example" })).toMatchObject({ status: 403 });
    expect(await ask("/plan.json", { host: `localhost:${new URL(served.address).port}` })).toMatchObject({ status: 200 });
    expect(await ask("/plan.json", { method: "POST" })).toMatchObject({ status: 405 });
  });

  test("has the index of ids, empty if there is none", async () => {
    expect(await ask("/index")).toMatchObject({ status: 200, text: "" });
    writeFileSync(join(folder, "ids.idx"), "an index");
    const indexed = { ...plan, job: { ...plan.job, data: { ...plan.job.data, path: "ids.bin" } } };
    const other = await serve({ plan: indexed, source }, { port: 0, baseDir: folder, page });
    expect(await ask("/index", { at: other.address })).toMatchObject({ status: 200, text: "an index" });
    await other.close();
  });

  test("refuses pages of other origins, which cannot embed it either", async () => {
    const own = served.address.slice(0, -1);
    expect(await ask("/plan.json", { origin: own })).toMatchObject({ status: 200 });
    for (const origin of ["https://evil.example", "null", own.replace(/\d+$/, "1"), own.replace("127.0.0.1", "localhost")])
      expect(await ask("/plan.json", { origin })).toMatchObject({ status: 403, text: "this server answers its own page only\n" });
    const { headers } = await fetch(new URL("/plan.json", served.address));
    expect(headers.get("cross-origin-resource-policy")).toBe("same-origin");
  });

  test("names the path of a missing corpus", async () => {
    const other = await serve({ plan, source }, { port: 0, baseDir: join(folder, "nowhere"), page });
    expect(await ask("/corpus", { at: other.address })).toMatchObject({
      status: 404,
      text: expect.stringContaining(join(folder, "nowhere", "corpus.txt")),
    });
    await other.close();
  });
});

test.each<[string, { port?: number; page?: string; plan?: Plan }, RegExp]>([
  ["a port that is taken", { port: Number(new URL(served.address).port) }, /^port \d+ is taken$/],
  ["a port that does not exist", { port: 65536 }, /^there is no port 65536$/],
  ["a page that is not built", { page: folder }, /^the page is not built/],
  ["a plan for another target", { plan: compile(job).plan }, /^the plan is for cpu/],
])("%s is reported with a fix", async (_, { port = 0, page: where = page, plan: which = plan }, message) => {
  await expect(serve({ plan: which, source }, { port, baseDir: folder, page: where })).rejects.toMatchObject({
    name: "Trouble",
    message: expect.stringMatching(message),
    fix: expect.stringMatching(/./),
  });
});
