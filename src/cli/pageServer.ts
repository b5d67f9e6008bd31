/**
 * Serves the page that trains a plan in the browser, on 127.0.0.1 only: the built page, the plan, its kernels and its corpus. The set of
 * addresses is fixed at the start; an address is never converted to a path.
 */
import { createReadStream, existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { indexPath } from "../../schemas/dataFiles.ts";
import { sourceOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { root } from "../packageFile.ts";
import { printPlan } from "../plan/seal.ts";
import { logPage, logStyle } from "./log/logPage.ts";
import { readLog, runFolders } from "./log/readLog.ts";

/** A running server. */
export interface Serving {
  /** The URL of the page. */
  readonly address: string;
  close(): Promise<void>;
}
/** Settings of `serve`. */
export interface ServeSettings {
  /** The port; 0 selects a free port. */
  readonly port: number;
  /** The base directory of data.path and data.labels. */
  readonly baseDir: string;
  /** The folder of the built page. */
  readonly page?: string;
}
/** The content of an address: bytes, or a file that is read on request. */
type Answer = { readonly type: string } & ({ readonly body: string | Uint8Array } | { readonly file: string; readonly what: string });

const HOST = "127.0.0.1";
/** Limit in bytes: the page holds the whole text in memory. */
const LARGEST_TEXT = 2 ** 28;
const TEXT = "text/plain; charset=utf-8";
const types: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".txt": TEXT,
};

/** Serves a WebGPU plan. Throws a Trouble if the plan is for another target, the page is not built, or the port is not available. */
export async function serve(
  { plan, source }: { readonly plan: Plan; source(file: string): string },
  { port, baseDir, page = fileURLToPath(new URL("dist/browser", root)) }: ServeSettings,
): Promise<Serving> {
  expectPort(port);
  const { target } = plan.toolchain;
  if (!target.startsWith("webgpu:"))
    throw new Trouble(
      `the plan is for ${target}, and browsers have WebGPU alone`,
      "compile the job with --target webgpu, or name the job itself",
    );
  const { path, labels, sources, format, tokenizer } = plan.job.data;
  if (format === "text" && tokenizer !== "bytes")
    throw new Trouble(
      "a browser tokenizes bytes alone, and the job names a tokenizer",
      "prepare the text, and set data.path to the .bin file: rankc data prepare",
    );
  if (sources)
    throw new Trouble("a browser reads one file, and the job has data.sources", "set data.path to one .bin file in place of data.sources");
  const bytes = { type: "application/octet-stream" };
  const answers = new Map<string, Answer>([
    ...pageIn(page),
    ["/plan.json", { type: "application/json", body: printPlan(plan) }],
    ["/corpus", { ...bytes, file: resolve(baseDir, path), what: "text" }],
  ]);
  // an empty body if there is no index
  const index = indexPath(path);
  const indexed = index !== undefined && existsSync(resolve(baseDir, index));
  answers.set("/index", indexed ? { ...bytes, file: resolve(baseDir, index), what: "index" } : { ...bytes, body: "" });
  if (labels !== null) answers.set("/labels", { ...bytes, file: resolve(baseDir, labels), what: "labels" });
  for (const { file } of plan.kernels.map(sourceOf)) answers.set(`/kernels/${file}`, { type: TEXT, body: source(file) });

  return listen(port, (request) => replyTo(request, (address) => answers.get(address)));
}

/** Serves the page of the logs of runs; each request reads the logs. Throws a Trouble if a folder has no log, or the port is not available. */
export async function serveLogs(folders: readonly string[], { port }: Pick<ServeSettings, "port">): Promise<Serving> {
  expectPort(port);
  runFolders(folders);
  const pages: Readonly<Record<string, () => Answer>> = {
    "/": () => ({ type: types[".html"] ?? "", body: logPage(runFolders(folders).map(readLog)) }),
    "/style.css": () => ({ type: types[".css"] ?? "", body: logStyle }),
  };
  return listen(port, (request) => replyTo(request, (address) => (Object.hasOwn(pages, address) ? pages[address]?.() : undefined)));
}

function expectPort(port: number): void {
  if (port > 65535) throw new Trouble(`there is no port ${port}`, "name one up to 65535, or 0 for any that is free");
}

async function listen(port: number, reply: (request: IncomingMessage) => Reply): Promise<Serving> {
  const server = createServer((request, response) => send(response, reply(request), request.method === "HEAD"));
  await new Promise<void>((listening, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => reject(notServed(error, port)));
    server.listen(port, HOST, listening);
  });
  return {
    address: `http://${HOST}:${(server.address() as AddressInfo).port}/`,
    close: () =>
      new Promise((closed) => {
        server.close(() => closed());
        server.closeAllConnections();
      }),
  };
}

function notServed({ code }: NodeJS.ErrnoException, port: number): Trouble {
  if (code === "EADDRINUSE") return new Trouble(`port ${port} is taken`, "name another: --port 0 takes any that is free");
  if (code === "EACCES") return new Trouble(`port ${port} may not be taken`, "name one from 1024 on");
  return new Trouble(`port ${port} cannot be listened on: ${code}`, "name another: --port 0 takes any that is free");
}

/** Returns the files of the built page by address. */
function pageIn(folder: string): [string, Answer][] {
  if (!existsSync(join(folder, "index.html"))) throw new Trouble(`the page is not built: ${folder} has no index.html`, "npm run build");
  const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  return files.map((entry) => {
    const path = join(entry.parentPath, entry.name);
    const address = path.slice(folder.length).replaceAll("\\", "/").replace(/^\/*/, "/");
    return [
      address === "/index.html" ? "/" : address,
      { type: types[extname(path)] ?? "application/octet-stream", body: readFileSync(path) },
    ];
  });
}

interface Reply {
  readonly status: number;
  readonly answer: Answer;
}

function replyTo({ method, url = "", headers }: IncomingMessage, answerOf: (address: string) => Answer | undefined): Reply {
  const refused = (status: number, why: string): Reply => ({ status, answer: { type: TEXT, body: `${why}\n` } });
  // browsers send the origin header for requests of other pages
  if (headers.origin !== undefined && headers.origin !== `http://${headers.host}`)
    return refused(403, "this server answers its own page only");
  // another host name that resolves to this address indicates DNS rebinding
  if (!/^(127\.0\.0\.1|localhost)(:\d+)?$/.test(headers.host ?? ""))
    return refused(403, "this server answers at 127.0.0.1 and localhost only");
  if (method !== "GET" && method !== "HEAD") return refused(405, "this server is for reading");
  const answer = answerOf(url.replace(/\?.*$/s, ""));
  if (!answer) return refused(404, `there is no ${printable(url)} here`);
  if ("body" in answer) return { status: 200, answer };
  const { file, what } = answer;
  const stat = statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile())
    return refused(
      404,
      `the plan's ${what} ${what === "labels" ? "are" : "is"} not at ${file}: start rankc serve with --data-dir, the folder that data.path starts at, or choose a file here`,
    );
  const mebibytes = (bytes: number): string => `${Math.ceil(bytes / 2 ** 20)} MiB`;
  if (stat.size > LARGEST_TEXT)
    return refused(
      413,
      `the plan's ${what} ${what === "labels" ? "have" : "has"} ${mebibytes(stat.size)}, and the page takes ${mebibytes(LARGEST_TEXT)} at most: choose a shorter file here`,
    );
  return { status: 200, answer };
}

function send(response: ServerResponse, { status, answer }: Reply, bodiless: boolean): void {
  response.writeHead(status, { ...always, "Content-Type": answer.type });
  if (bodiless) response.end();
  else if ("body" in answer) response.end(answer.body);
  // on a read error the connection is closed, which the browser reports
  else
    createReadStream(answer.file)
      .on("error", () => response.destroy())
      .pipe(response);
}

/** Headers of every response: the page loads nothing from other origins, and other pages cannot embed it. */
const always = {
  "Cache-Control": "no-cache",
  "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
};
