/** Builds the page of `rankc view` into dist/view/index.html: one file with its script and style, to which the command adds a plan. */
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";

export default defineConfig({
  root: fileURLToPath(new URL(".", import.meta.url)),
  publicDir: false,
  plugins: [viteSingleFile()],
  build: {
    outDir: "../../dist/view",
    emptyOutDir: true,
    target: "es2022",
    // older targets get light-dark() that follows the system, and not the theme that is chosen on the page
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
  },
});
