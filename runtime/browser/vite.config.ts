/** Builds the page into dist/browser: one script and one style, with relative addresses. */
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

export default defineConfig({
  root: fileURLToPath(new URL(".", import.meta.url)),
  base: "./",
  build: {
    outDir: "../../dist/browser",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    // older targets get light-dark() that follows the system, and not the theme that is chosen on the page
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
  },
});
