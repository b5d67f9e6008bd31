/** Layers in the texts of the page. A part of a program stands for equal layers, so its texts count layers from the first: `layers.+1.wq`. */

const layers = /\blayers\.(\d+)/g;

/** Returns a text in which layers count from `base`. */
export const fromLayer = (text: string, base: number): string =>
  text.replace(layers, (_, n: string) => `layers.${Number(n) < base ? "" : "+"}${Number(n) - base}`);

/** Returns a text with `*` for the number of each layer. */
export const anyLayer = (text: string): string => text.replace(layers, "layers.*");
