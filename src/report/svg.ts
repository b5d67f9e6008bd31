/** Pieces of SVG pictures: escaped text, axes with numbers, legends, and colours for light and dark pages. */

/** A picture follows the page's colours, or has those of one kind of page. */
export const themes = ["auto", "light", "dark"] as const;
/** The name of a theme. */
export type Theme = (typeof themes)[number];

/** Where bars begin. */
export const LEFT = 90;
/** The width of the longest bar. */
export const WIDE = 1500;
/** The distance of two rows. */
export const ROW = 22;
/** Room for numbers behind bars. */
const RIGHT = 130;

const light =
  "svg{background:#fff}.page{fill:#fff}text{fill:#1f2328}.axis{stroke:#8c959f}.grid{stroke:#d8dee4}.limit{stroke:#cf222e}.limit-text{fill:#cf222e}.on{fill:#fff}.on-light{fill:#1f2328}";
const dark =
  "svg{background:#0d1117}.page{fill:#0d1117}text{fill:#e6edf3}.axis{stroke:#7d8590}.grid{stroke:#30363d}.limit{stroke:#ff7b72}.limit-text{fill:#ff7b72}.on{fill:#fff}.on-light{fill:#1f2328}";

const styleOf = (theme: Theme): string =>
  theme === "auto" ? `${light}@media (prefers-color-scheme:dark){${dark}}` : theme === "light" ? light : dark;

const escapes: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
/** Escapes text for SVG. */
const escaped = (words: string): string => words.replace(/[&<>"]/g, (c) => escapes[c] ?? c);
/** Returns a number with at most two digits behind the point. */
export const round = (n: number): number => Number(n.toFixed(2));
/** Returns a text element. */
export const text = (x: number, y: number, words: string, more = ""): string =>
  `<text x="${round(x)}" y="${round(y)}"${more ? ` ${more}` : ""}>${escaped(words)}</text>`;

/** A part of a picture with its own height, drawn from y = 0 on. */
export interface Drawn {
  readonly lines: readonly string[];
  readonly height: number;
}

/** Puts parts below one another on a page. */
export function page(title: string, parts: readonly Drawn[], theme: Theme): string {
  const width = LEFT + WIDE + RIGHT;
  let y = 36;
  const placed = parts.flatMap(({ lines, height }) => {
    const group = [`<g transform="translate(0 ${y})">`, ...lines, "</g>"];
    y += height + 26;
    return group;
  });
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y}" viewBox="0 0 ${width} ${y}" font-family="sans-serif" font-size="11">`,
    `<title>${escaped(title)}</title>`,
    `<style>${styleOf(theme)}</style>`,
    `<rect class="page" width="${width}" height="${y}"/>`,
    text(10, 22, title, 'font-size="15"'),
    ...placed,
    "</svg>",
    "",
  ].join("\n");
}

/** Returns a heading with colours beside it, 18 pixels high. */
export const legend = (title: string, entries: readonly (readonly [name: string, colour: string])[]): string[] => {
  const from = Math.max(LEFT + 200, 20 + title.length * 7);
  return [
    text(10, 12, title, 'font-size="13"'),
    ...entries.flatMap(([name, colour], i) => [
      `<rect x="${from + i * 150}" y="2" width="12" height="12" fill="${colour}"/>`,
      text(from + i * 150 + 18, 12, name),
    ]),
  ];
};

/** Returns the distance of about `most` ticks from 0 to `end`: 1, 2 or 5 times a power of `base`, so that labels are round. */
export function tickStep(end: number, most: number, base: 10 | 2): number {
  const steps = base === 10 ? [1, 2, 5] : [1];
  for (let power = 1; ; power *= base) for (const step of steps) if (end / (step * power) <= most) return step * power;
}

/** Returns an axis below bars: a line, ticks with numbers, and grid lines over the height of the bars. */
export function axis(end: number, step: number, scale: number, height: number, label: (value: number) => string): Drawn {
  const lines = [`<path class="axis" d="M${LEFT} ${height}h${WIDE}"/>`];
  for (let value = 0; value <= end * (1 + 1e-9); value += step) {
    const x = round(LEFT + value * scale);
    lines.push(
      `<path class="grid" d="M${x} 0V${height}"/>`,
      `<path class="axis" d="M${x} ${height}v5"/>`,
      text(x, height + 16, label(value), 'text-anchor="middle"'),
    );
  }
  return { lines, height: height + 20 };
}
