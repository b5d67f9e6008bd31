/**
 * Bundles the command line into dist/cli: a command loads a few files instead of a hundred. They are CommonJS, which Node loads faster and whose
 * compiled code can be cached on Node 20 (codeCache.ts). Threads and probes start from dist/runtime.
 */
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

export default defineConfig({
  root: fileURLToPath(new URL(".", import.meta.url)),
  publicDir: false,
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
