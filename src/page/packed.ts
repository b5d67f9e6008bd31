/** Unpacks the data that `rankc view` put into the page: gzip in base64. */
import type { KernelSources, ViewData } from "../report/view/planView.ts";

/** The version of the data that this page reads; the command and the page are built together. */
const VERSION: ViewData["version"] = 1;

/** Returns the plans. Throws if the page has none, or those of another version of rankc. */
export async function readViewData(): Promise<ViewData> {
  const data = await unpacked<ViewData>("view-data");
  if (data.version !== VERSION) throw new Error(`its data have version ${data.version}, and the page reads ${VERSION}`);
  return data;
}

let sources: Promise<KernelSources> | undefined;
/** Returns the sources of kernels; they are unpacked once, when they are first shown. */
export const readKernelSources = (): Promise<KernelSources> => (sources ??= unpacked<KernelSources>("kernel-sources"));

async function unpacked<T>(id: string): Promise<T> {
  const text = document.getElementById(id)?.textContent;
  if (!text) throw new Error(`it has no ${id}`);
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}
