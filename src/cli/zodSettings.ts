/** Settings of zod for the command line, which reads one job: compiling a parser for its schema takes longer than parsing. */
import { config } from "zod";

/** Switches compiled parsers off. It must run before a schema is made. */
export const interpretSchemas = (): void => void config({ jitless: true });
