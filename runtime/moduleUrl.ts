/** Where the file of a module is that starts a thread or a process from itself. */

/** Returns the address of a module of the runtime by its path without extension. `here`: its `import.meta.url`, which in a bundle is that of the bundle's file. */
export function moduleUrl(path: string, here: string): string {
  return /\/dist\/cli\/[^/]+$/.test(here) ? new URL(`../runtime/${path}.js`, here).href : here;
}
