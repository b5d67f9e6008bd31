/** Modules that run in a thread or a process of their own: where their file is, and how Node loads it. */

/** Returns the address of a module of the runtime by its path without extension. `here`: its `import.meta.url`, which in a bundle is that of the bundle's file. */
export function moduleUrl(path: string, here: string): string {
  return /\/dist\/cli\/[^/]+$/.test(here) ? new URL(`../runtime/${path}.js`, here).href : here;
}

/** Returns whether a module is TypeScript, as in a checkout: Node then needs the loader tsx. */
export const isTypeScript = (url: string): boolean => url.endsWith(".ts");

/** Returns the text of a program that imports a module, with the loader if it needs one. */
export function importText(url: string): string {
  const text = JSON.stringify(url);
  if (!isTypeScript(url)) return `import(${text})`;
  return `import(${JSON.stringify(import.meta.resolve("tsx/esm/api"))}).then(({ register }) => (register(), import(${text})))`;
}

/** Returns the options of a Node process whose main file is a module. */
export const loaderOptions = (url: string): string[] => (isTypeScript(url) ? ["--import", import.meta.resolve("tsx/esm")] : []);
