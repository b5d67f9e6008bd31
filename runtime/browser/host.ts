/** WebGPU in a browser. What is missing is told in words for who sits before it. */
/// <reference types="@webgpu/types" />
import { Trouble } from "../../schemas/trouble.ts";
import type { Host } from "../webgpu/device.ts";

export const browser: Host = {
  // a page may set no toggles: what needs them is found missing on the adapter
  async gpu() {
    if (!isSecureContext)
      throw new Trouble(
        `browsers give WebGPU to secure pages only, and ${location.origin} is none`,
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
      "chrome://gpu (Firefox: about:support) says why; switch on graphics acceleration in the settings, or use another browser",
    ),
};
