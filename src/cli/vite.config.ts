/**
 * Bundles the command line into dist/cli: a command loads a few files instead of a hundred. They are CommonJS, which Node loads faster and whose
 * compiled code can be cached on Node 20 (codeCache.ts). Threads and probes start from dist/runtime.
 */
import { fileURLToPath } from "node:url";
import { defineConfig, type Plugin } from "vite";

/** Commander starts programs only for subcommands that are files of their own, and rankc has none: the module, which takes 3 ms, is loaded on demand. */
const startsNoPrograms: Plugin = {
  name: "commander-starts-no-programs",
  transform(code, id) {
    if (!id.endsWith("/commander/lib/command.js")) return;
    const required = /require\('node:child_process'\)/;
    if (!required.test(code)) throw new Error("commander loads child_process in another way: change this plugin");
    return code.replace(required, "{ spawn: (...args) => process.getBuiltinModule('node:child_process').spawn(...args) }");
  },
};

export default defineConfig({
  root: fileURLToPath(new URL(".", import.meta.url)),
  publicDir: false,
  plugins: [startsNoPrograms],
  // native libraries stay packages
  ssr: { noExternal: true, external: ["koffi", "webgpu"] },
  build: {
    ssr: true,
    outDir: "../../dist/cli",
    emptyOutDir: true,
    target: "node20",
    sourcemap: true,
    minify: true,
    rolldownOptions: {
      input: { rankc: "rankc.ts" },
      // start-up of threads of a checkout, which the bundle does not use
      checks: { emptyImportMeta: false },
      output: { format: "cjs", entryFileNames: "[name].cjs", chunkFileNames: "[name]-[hash].cjs" },
    },
  },
});
