/**
 * Both tables of docs/performance.md about one GPU in one run: whole models beside transformers, eager and compiled, and attention beside cuDNN.
 * A job runs in rankc, then in torch; kernels of attention run by turns in one process. Markdown to stdout and, with all numbers, into a folder.
 *
 *     npm run bench:cuda-tables -- [--jobs a,b] [--forms eager,compiled] [--steps 5] [--seconds 280] [--out .rankc/bench/tables]
 *
 * Past `--seconds` no further job begins and peers are left out; the table says so.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { root } from "../support/checkout.ts";

const { values } = parseArgs({
  options: {
    jobs: { type: "string", default: "qwen3-30b-12-layers,deepseek-v3-3-layers,mixtral-8x7b-4-layers,llama-125m,llama-8b-8-layers-32k" },
    forms: { type: "string", default: "eager,compiled" },
    steps: { type: "string", default: "5" },
    seconds: { type: "string", default: "280" },
    out: { type: "string", default: join(root, ".rankc/bench/tables") },
  },
});
/** Seconds of one job in rankc, and of one in torch with both forms. */
const LIMITS = { rankc: 90, torch: 150 } as const;
const begun = Date.now();
const secondsLeft = (): number => Number(values.seconds) - (Date.now() - begun) / 1e3;
mkdirSync(values.out, { recursive: true });

/** What cudaModelBench.ts prints. */
interface Own {
  readonly forward_backward_ms: number;
  readonly tflops: number;
  readonly plan_peak_gib: number;
  readonly step_ms?: number;
  readonly tokens_per_second?: number;
}
/** What cuda_model_peer.py prints of a form. */
interface Form {
  readonly forward_backward_ms?: number;
  readonly tokens_per_second?: number;
  readonly error?: string;
}
type Peer = Readonly<Record<string, unknown>> & { readonly eager?: Form; readonly compiled?: Form; readonly error?: string };

/** Returns stdout of a command, whose stderr goes into a file; undefined if it fails or takes longer than its limit. */
function outputOf(command: readonly [string, ...string[]], log: string, limit: number): Promise<string | undefined> {
  const [program, ...args] = command;
  return new Promise((resolve) => {
    const child = spawn(program, args, { cwd: root, stdio: ["ignore", "pipe", "pipe"], timeout: limit * 1e3, killSignal: "SIGKILL" });
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    child.stdout.on("data", (piece: Buffer) => out.push(piece));
    child.stderr.on("data", (piece: Buffer) => err.push(piece));
    child.on("error", () => resolve(undefined));
    child.on("close", (code) => {
      writeFileSync(join(values.out, log), Buffer.concat(err));
      resolve(code === 0 ? Buffer.concat(out).toString() : undefined);
    });
  });
}

/** transformers in a process that waits for jobs: it imports torch while rankc runs the first. */
class Torch {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  constructor() {
    const env = { ...process.env, FORMS: values.forms, ROUNDS: values.steps };
    this.#child = spawn("python3", ["test/bench/cuda_model_peer.py"], { cwd: root, env, stdio: ["pipe", "pipe", "ignore"] });
    this.#child.on("error", () => {});
    this.#child.stdin?.on("error", () => {});
    const { stdout } = this.#child;
    if (!stdout) throw new Error("python3 has no stdout");
    this.#lines = createInterface({ input: stdout })[Symbol.asyncIterator]();
  }
  async measure(file: string): Promise<Peer> {
    if (this.#child.exitCode !== null || this.#child.killed) return { error: "torch has ended" };
    this.#child.stdin?.write(`${file}\n`);
    const limit = setTimeout(() => this.end(), LIMITS.torch * 1e3);
    let line = await this.#lines.next();
    while (!line.done && !line.value.startsWith("{")) line = await this.#lines.next();
    clearTimeout(limit);
    return line.done ? { error: `no result within ${LIMITS.torch} s` } : (JSON.parse(line.value) as Peer);
  }
  end(): void {
    this.#child.kill("SIGKILL");
  }
}

const fixed = (x: number | undefined, digits = 1): string => (x === undefined ? "" : x.toFixed(digits));
const textOf = (form: Form | undefined, isWhole: boolean): string => {
  if (!form) return "";
  if (form.error) return `failed: ${form.error.slice(0, 40)}`;
  return isWhole ? `${fixed((form.tokens_per_second ?? Number.NaN) / 1e3, 0)} thousand tokens/s` : fixed(form.forward_backward_ms);
};

async function models(): Promise<string[]> {
  const torch = new Torch();
  const rows = [
    "| forward and backward of a microbatch, ms | rankc | TFLOP/s | plan's peak, GiB | torch.compile | eager |",
    "|---|---|---|---|---|---|",
  ];
  const all: Record<string, { own?: Own; peer?: Peer }> = {};
  for (const name of values.jobs.split(",")) {
    const file = `test/bench/jobs/${name}.yaml`;
    // a job whose optimizer is AdamW is measured as whole steps
    const isWhole = readFileSync(join(root, file), "utf8").includes("adamw");
    if (secondsLeft() < 20) {
      rows.push(`| ${name} | not run: ${values.seconds} s were over | | | | |`);
      continue;
    }
    const bench = ["--import", "tsx/esm", "test/bench/cudaModelBench.ts", file, "--steps", values.steps] as const;
    const printed = await outputOf([process.execPath, ...bench, ...(isWhole ? [] : ["--profile-only"])], `${name}.txt`, LIMITS.rankc);
    const own = printed === undefined ? undefined : (JSON.parse(printed.trim().split("\n").at(-1) ?? "{}") as Own);
    const peer = secondsLeft() > 45 ? await torch.measure(file) : { error: `${values.seconds} s were nearly over` };
    all[name] = { ...(own && { own }), peer };
    const speed = isWhole ? `${fixed((own?.tokens_per_second ?? Number.NaN) / 1e3, 0)} thousand tokens/s` : fixed(own?.forward_backward_ms);
    const peers = peer.error ? [`not run: ${peer.error.slice(0, 60)}`, ""] : [textOf(peer.compiled, isWhole), textOf(peer.eager, isWhole)];
    rows.push(`| ${name} | ${own ? speed : "failed"} | ${fixed(own?.tflops, 0)} | ${fixed(own?.plan_peak_gib)} | ${peers.join(" | ")} |`);
    process.stderr.write(`${rows.at(-1)}   ${((Date.now() - begun) / 1e3).toFixed(0)} s\n`);
    writeFileSync(join(values.out, "models.json"), JSON.stringify(all, null, 1));
  }
  torch.end();
  return rows;
}

/** The shapes of the table of attention. */
const ATTENTION =
  "^attention(_dropout)?(_grad)? (2x32/4x4096x128|2x32/8x4096x128|1x32/8x32768x128|1x128x4096x192|16x12x1024x64|2x16/8x4096x256)";

async function attention(): Promise<string[]> {
  const bench = ["--import", "tsx/esm", "test/bench/cudaBench.ts", "--only", ATTENTION, "--out", join(root, ".rankc/bench")] as const;
  const printed = await outputOf([process.execPath, ...bench], "attention.txt", 120);
  return printed === undefined ? ["attention: failed"] : printed.split("\n").filter((line) => line.startsWith("|"));
}

const first = await attention();
const text = [...first, "", ...(await models()), ""].join("\n");
writeFileSync(join(values.out, "tables.md"), text);
process.stdout.write(`${text}\n${((Date.now() - begun) / 1e3).toFixed(0)} s in all\n`);
