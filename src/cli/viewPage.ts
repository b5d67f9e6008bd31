/** Puts the data of a plan into the built page. The data are compressed and in base64, so that no text of a plan is read as HTML. */
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { Trouble } from "../../schemas/trouble.ts";
import { root } from "../packageFile.ts";
import type { KernelSources, ViewData } from "../report/view/planView.ts";

/** Returns the built page. Throws a Trouble if it is not built. */
export function pageTemplate(file = fileURLToPath(new URL("dist/view/index.html", root))): string {
  if (!existsSync(file)) throw new Trouble(`the page is not built: there is no ${file}`, "npm run build");
  return readFileSync(file, "utf8");
}

/** Returns the page with its data. Sources of kernels are a part of their own, which the page unpacks when it shows them. */
export function pageOf(template: string, data: ViewData, sources: KernelSources): string {
  const parts = [packed("view-data", data), packed("kernel-sources", sources)].join("\n");
  // a function: `$` in a replacement text has a meaning
  return template.replace("</body>", () => `${parts}\n</body>`);
}

const packed = (id: string, value: unknown): string =>
  `<script type="text/plain" id="${id}">${gzipSync(JSON.stringify(value), { level: 9 }).toString("base64")}</script>`;
