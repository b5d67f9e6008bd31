/**
 * A WebGPU adapter for tests on any Linux machine: SwiftShader, Vulkan on the CPU, as it comes with a package of ours.
 * Importing this file makes this process see it, and no other adapter. With RANKC_WEBGPU=hardware the machine's own is used.
 */
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { brotliDecompressSync } from "node:zlib";
import { root } from "./checkout.ts";

const require = createRequire(import.meta.url);
/** Tests run on the machine's own adapter. */
export const hardware = process.env.RANKC_WEBGPU === "hardware";

/** The reason why there is no adapter, for titles of skipped tests; undefined if there is one. */
export const noAdapter: string | undefined =
  hardware || `${process.platform}-${process.arch}` === "linux-x64"
    ? undefined
    : "the software adapter is a library for linux-x64; RANKC_WEBGPU=hardware uses the machine's own";

/** Why tests of 16-bit floats are skipped. */
export const noHalves: string | undefined = noAdapter ?? (hardware ? undefined : "the software adapter has no shader-f16");

/** Libraries in use: koffi closes a library without references. */
const held: unknown[] = [];

/** The environment of a process that is to see the adapter from its start: what `spawn` takes as `env`. */
export const adapterEnv: NodeJS.ProcessEnv = hardware || noAdapter ? process.env : seeSwiftShader();

function seeSwiftShader(): NodeJS.ProcessEnv {
  const folder = unpacked();
  const icd = join(folder, "vk_swiftshader_icd.json");
  // older Vulkan loaders read the second name alone
  Object.assign(process.env, { VK_DRIVER_FILES: icd, VK_ICD_FILENAMES: icd });
  // Dawn asks the system's loader for `libvulkan.so.1`, which answers with a library of that name that is loaded already;
  // LD_LIBRARY_PATH is read when a process starts, too early for this one
  held.push(require("koffi").load(join(folder, "libvulkan.so.1")));
  return { ...process.env, LD_LIBRARY_PATH: [folder, process.env.LD_LIBRARY_PATH].filter(Boolean).join(":") };
}

/** The folder with SwiftShader's libraries; unpacked once per version of the package. */
function unpacked(): string {
  const home = join(dirname(require.resolve("@sparticuz/chromium")), "../..");
  const { version } = JSON.parse(readFileSync(join(home, "package.json"), "utf8"));
  const cache = join(root, "node_modules/.cache");
  const folder = join(cache, `swiftshader-${version}`);
  if (existsSync(folder)) return folder;
  mkdirSync(cache, { recursive: true });
  // tests start together: each unpacks for itself, and the first to finish gives the folder its name
  const own = mkdtempSync(`${folder}-`);
  for (const [name, data] of tarFiles(brotliDecompressSync(readFileSync(join(home, "bin/swiftshader.tar.br")))))
    writeFileSync(join(own, name), data);
  try {
    renameSync(own, folder);
  } catch (error) {
    if (!existsSync(folder)) throw error;
    rmSync(own, { recursive: true });
  }
  return folder;
}

/** The plain files of a tar archive (POSIX.1-1988 ustar): headers of 512 bytes, contents padded to 512. */
function* tarFiles(tar: Uint8Array): Generator<[string, Uint8Array]> {
  const text = (at: number, bytes: number): string =>
    Buffer.from(tar.subarray(at, at + bytes))
      .toString("latin1")
      .split("\0")[0]!;
  for (let at = 0; text(at, 100); ) {
    const size = Number.parseInt(text(at + 124, 12), 8);
    if (text(at + 156, 1) === "0" || text(at + 156, 1) === "") yield [text(at, 100), tar.subarray(at + 512, at + 512 + size)];
    at += 512 + Math.ceil(size / 512) * 512;
  }
}
