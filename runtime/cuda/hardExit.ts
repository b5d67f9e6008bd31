/** The C library's `_exit`: unlike `process.exit` it does not run the driver's last rites, which wait for a device that may never be done. */
import { koffi } from "./libraries.ts";

export const hardExit = (): ((code: number) => void) => koffi().load(null).func("_exit", "void", ["int"]);
