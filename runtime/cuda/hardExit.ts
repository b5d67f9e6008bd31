/** Returns the C library's `_exit`. Unlike `process.exit` it skips the driver's exit handlers, which wait for a device that may never complete. */
import { koffi } from "./libraries.ts";

/** Returns `_exit` of the C library, which ends the process without exit handlers. */
export const hardExit = (): ((code: number) => void) => koffi().load(null).func("_exit", "void", ["int"]);
