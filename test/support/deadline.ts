/**
 * A limit for each part of a script, kept by a thread beside: a main thread within a call of the driver runs neither timers nor
 * signals. After the limit the thread prints the part that runs, and ends the process by SIGKILL.
 */
import { Worker } from "node:worker_threads";

/** What both threads see: cells (i32), the moment of the limit (f64), and two texts: the part, and where in it. */
const cells = { answered: 0, lengths: [1, 2] } as const;
const [limitAt, textsAt, textBytes] = [16, [64, 1088], 1024] as const;

/** Plain JavaScript: a thread of its own has no loader for TypeScript. */
const thread = `
const { workerData: { name, shared, grace, report }, parentPort } = require("node:worker_threads");
const { writeSync } = require("node:fs");
const { spawn } = require("node:child_process");
const cell = new Int32Array(shared, 0, 4);
const limit = new Float64Array(shared, ${limitAt}, 1);
const text = (n) => Buffer.from(shared, [${textsAt}][n], Atomics.load(cell, [${cells.lengths}][n])).toString();
const end = () => process.kill(process.pid, "SIGKILL");
let asked = 0;
const timer = setInterval(() => {
  if (Date.now() < limit[0]) {
    asked = 0;
    return;
  }
  if (!asked) {
    asked = Date.now();
    parentPort.postMessage("over");
  }
  const heard = Atomics.load(cell, ${cells.answered});
  if (!heard && Date.now() - asked < grace) return;
  clearInterval(timer);
  const words = [name + ": no end of " + text(0), text(1), heard ? "" : "the main thread does not answer: it computes, or is within a call"];
  try {
    writeSync(2, words.filter((w) => w).join("; ") + "\\n");
  } catch {
    // stdout is closed: the process ends nevertheless
  }
  const last = spawn(report[0], report.slice(1), { stdio: ["ignore", 2, "ignore"] });
  last.on("error", end).on("exit", end);
  setTimeout(end, 5000);
}, 50);
`;

/** What the device does then: 100 % where a kernel runs, 0 % where it waits or has nothing to do. */
const nvidiaSmi = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader"];

export interface Deadline {
  /** A part begins, and may take so many seconds. Said on stderr, with the seconds since the start. */
  part(what: string, seconds: number): void;
  /** Where in the part the script is. Costs a microsecond or two. */
  at(where: string): void;
}

/** `explain`: what more there is to say, asked for when a limit is over and the main thread hears it within `grace` milliseconds. */
export function startDeadline(name: string, explain: () => string | undefined, { grace = 5000, report = nvidiaSmi } = {}): Deadline {
  const shared = new SharedArrayBuffer(textsAt[1] + textBytes);
  const cell = new Int32Array(shared, 0, 4);
  const limit = new Float64Array(shared, limitAt, 1);
  limit[0] = Number.POSITIVE_INFINITY;
  let where = "";
  const write = (n: 0 | 1, text: string): void => {
    const bytes = Buffer.from(text).subarray(0, textBytes);
    new Uint8Array(shared, textsAt[n], textBytes).set(bytes);
    Atomics.store(cell, cells.lengths[n], bytes.length);
  };
  const at = (text: string): void => write(1, (where = text));
  // without this process's loaders: they are set up by a main thread that does not block
  const worker = new Worker(thread, { eval: true, execArgv: [], workerData: { name, shared, grace, report } });
  worker.on("message", () => {
    const more = explain();
    if (more) at(where ? `${where}; ${more}` : more);
    Atomics.store(cell, cells.answered, 1);
  });
  worker.unref();
  const begun = performance.now();
  return {
    at,
    part(what, seconds) {
      write(0, `${what} within ${seconds} s`);
      at("");
      Atomics.store(cell, cells.answered, 0);
      limit[0] = Date.now() + seconds * 1000;
      process.stderr.write(`${((performance.now() - begun) / 1000).toFixed(1).padStart(6)} s  ${what}\n`);
    },
  };
}
