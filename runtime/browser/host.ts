/** WebGPU in a browser, with errors for the user of the page. */
/// <reference types="@webgpu/types" />
import { Trouble } from "../../schemas/trouble.ts";
import type { Host } from "../webgpu/device.ts";

/** The WebGPU of the page's browser. */
export const browser: Host = {
  // a page cannot set Dawn's toggles; the adapter then lacks the features that need them
  async gpu() {
    if (!isSecureContext)
      throw new Trouble(
        `browsers offer WebGPU to secure pages only, and ${location.origin} is not secure`,
        "open the page at 127.0.0.1 or localhost, or through https",
      );
    if (!navigator.gpu)
      throw new Trouble(
        "this browser has no WebGPU",
        "Chrome and Edge have it from 113 on (Android: Chrome 121; Linux: from 144 on some GPUs, else with chrome://flags/#enable-unsafe-webgpu), Safari from 26, Firefox from 141 on Windows and 145 on Apple silicon",
      );
    return navigator.gpu;
  },
  noAdapter: () =>
    new Trouble(
      "this browser has WebGPU, but offers no adapter: its GPU or driver is on the browser's block list, or there is none",
      "chrome://gpu (Firefox: about:support) shows the reason; enable graphics acceleration in the settings, or use another browser",
    ),
};
