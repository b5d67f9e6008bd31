/** Bundles the command line into dist/cli: a command loads a few files instead of a hundred. Threads and probes start from dist/runtime. */
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
    rolldownOptions: { input: { rankc: "main.ts" }, output: { entryFileNames: "[name].js", chunkFileNames: "[name]-[hash].js" } },
  },
});
