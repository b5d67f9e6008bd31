/**
 * A browser for tests on any Linux machine: headless Chromium as a package of ours brings it, with SwiftShader, its WebGPU on the
 * CPU. It is unpacked once per version of the package; the few libraries that a bare machine lacks come along.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { type Browser, chromium } from "playwright-core";
import { root } from "./checkout.ts";

interface Chromium {
  readonly executablePath: string;
  readonly env: Record<string, string>;
}

const found =
  `${process.platform}-${process.arch}` === "linux-x64" ? chromiumHere() : "the browser of these tests is a program for linux-x64";
/** Why there is no browser to test in; undefined where there is one. For the titles of tests that are skipped. */
export const noBrowser: string | undefined = typeof found === "string" ? found : undefined;

export const launch = (): Promise<Browser> =>
  chromium.launch({ ...(found as Chromium), args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"] });

function chromiumHere(): Chromium | string {
  const folder = unpacked();
  const executablePath = join(folder, "chromium");
  const own = Object.fromEntries(Object.entries(process.env).filter((entry): entry is [string, string] => entry[1] !== undefined));
  const libraries = [join(folder, "al2023/lib"), own.LD_LIBRARY_PATH].filter(Boolean).join(":");
  // the machine's own libraries first
  const printed = [own, { ...own, LD_LIBRARY_PATH: libraries }].map((env) => {
    const { status, stderr } = spawnSync(executablePath, ["--version"], { env, encoding: "utf8" });
    return { env, status, stderr };
  });
  const works = printed.find(({ status }) => status === 0);
  return works ? { executablePath, env: works.env } : `Chromium does not start here: ${printed[0]!.stderr?.trim().split("\n")[0]}`;
}

/** The folder with Chromium and its libraries, SwiftShader's beside it, where it looks for them. */
function unpacked(): string {
  const home = join(dirname(createRequire(import.meta.url).resolve("@sparticuz/chromium")), "../..");
  const { version } = JSON.parse(readFileSync(join(home, "package.json"), "utf8"));
  const cache = join(root, "node_modules/.cache");
  const folder = join(cache, `chromium-${version}`);
  if (existsSync(folder)) return folder;
  mkdirSync(cache, { recursive: true });
  // whole or not at all, also where two tests begin together
  const own = mkdtempSync(`${folder}-`);
  try {
    // the package unpacks into the temporary folder, and its libraries where it believes to be on AWS Lambda
    const { status, stderr } = spawnSync(
      process.execPath,
      ["--input-type=module", "-e", `import package_ from "@sparticuz/chromium"; await package_.executablePath();`],
      { cwd: root, env: { ...process.env, TMPDIR: own, AWS_EXECUTION_ENV: "AWS_Lambda_nodejs22.x" }, encoding: "utf8" },
    );
    if (status !== 0) throw new Error(`Chromium could not be unpacked: ${stderr}`);
    if (!existsSync(folder)) renameSync(own, folder);
  } finally {
    rmSync(own, { recursive: true, force: true });
  }
  return folder;
}
