/** The page of logs: charts of several runs over each other, as HTML with SVG that a browser shows without scripts. */
import { bytesText, countText, largest } from "../../units.ts";
import type { LoggedRun, Point } from "./readLog.ts";

/** The charts of the page: a title, and the scalars that it shows. */
const charts: readonly { readonly title: string; readonly names: readonly string[] }[] = [
  { title: "lm loss", names: ["lm loss", "lm loss validation", "lm loss test"] },
  { title: "perplexity", names: ["lm loss validation ppl", "lm loss test ppl"] },
  { title: "tokens/s", names: ["tokens/s"] },
  { title: "gradient norm", names: ["grad-norm"] },
  { title: "learning rate", names: ["learning-rate"] },
  { title: "mtp loss", names: ["mtp loss"] },
  { title: "load-balancing loss", names: ["load_balancing_loss"] },
  { title: "busiest expert over the mean", names: ["moe/max over mean load"] },
];
const COLORS = ["#3b7ddd", "#d9534f", "#2e8b57", "#b8860b", "#8a5fbf", "#0f8b8d", "#c2577e", "#6b7280"];
const [WIDTH, HEIGHT] = [560, 260];
const area = { left: 64, right: WIDTH - 12, top: 12, bottom: HEIGHT - 32 };

/** Seconds between two reloads of the page. */
const RELOAD = 5;

/** Returns the page of some runs. */
export function logPage(runs: readonly LoggedRun[]): string {
  const drawn = charts.flatMap(({ title, names }) => {
    const lines = runs.flatMap((run, i) =>
      names.flatMap((name) => {
        const points = (run.scalars.get(name) ?? []).filter(({ value }) => Number.isFinite(value));
        return points.length > 0 ? [{ run, name, points, color: COLORS[i % COLORS.length] ?? "", isMain: name === names[0] }] : [];
      }),
    );
    return lines.length > 0 ? [chart(title, lines)] : [];
  });
  return [
    "<!doctype html>",
    '<html lang="en"><head><meta charset="utf-8"><title>rankc logs</title>',
    `<meta http-equiv="refresh" content="${RELOAD}"><link rel="icon" href="data:,"><link rel="stylesheet" href="/style.css"></head><body>`,
    `<h1>${runs.length === 1 ? text(runs[0]?.name ?? "") : `${runs.length} runs`}</h1>`,
    `<table id="runs"><tr>${["", "run", "job", "steps", "lm loss", "validation", "tokens/s", "memory", "busiest expert"].map((h) => `<th>${h}</th>`).join("")}</tr>`,
    ...runs.map(row),
    "</table>",
    `<div class="charts">${drawn.join("\n")}</div>`,
    ...runs.map(expertBars),
    "</body></html>\n",
  ].join("\n");
}

const escapes: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const text = (value: unknown): string => String(value).replace(/[&<>"']/g, (c) => escapes[c] ?? c);
const lastOf = ({ scalars }: LoggedRun, name: string): Point | undefined => scalars.get(name)?.at(-1);

function row(run: LoggedRun, i: number): string {
  const show = (name: string, format: (value: number) => string): string => {
    const point = lastOf(run, name);
    return point ? format(point.value) : "–";
  };
  const step = lastOf(run, "lm loss")?.step ?? 0;
  const cells = [
    `<svg class="key" viewBox="0 0 10 10"><rect width="10" height="10" fill="${COLORS[i % COLORS.length]}"/></svg>`,
    text(run.name),
    text(run.about.name),
    `${countText(step)} of ${text(run.about.steps)}`,
    show("lm loss", (x) => x.toFixed(4)),
    show("lm loss validation", (x) => x.toFixed(4)),
    show("tokens/s", (x) => countText(Math.round(x))),
    show(lastOf(run, "mem-allocated-bytes") ? "mem-allocated-bytes" : "mem-planned-bytes", bytesText),
    show("moe/max over mean load", (x) => x.toFixed(2)),
  ];
  return `<tr>${cells.map((cell) => `<td>${cell}</td>`).join("")}</tr>`;
}

interface Line {
  readonly run: LoggedRun;
  readonly name: string;
  readonly points: readonly Point[];
  readonly color: string;
  /** Lines of other scalars are dashed. */
  readonly isMain: boolean;
}

function chart(title: string, lines: readonly Line[]): string {
  const values = lines.flatMap(({ points }) => points.map(({ value }) => value));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const steps = Math.max(
    2,
    largest(lines, ({ points }) => points.at(-1)?.step ?? 1),
  );
  const span = high - low || Math.abs(high) || 1;
  const x = (step: number): number => area.left + ((step - 1) / (steps - 1)) * (area.right - area.left);
  const y = (value: number): number => area.bottom - ((value - low) / span) * (area.bottom - area.top);
  const levels = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * span);
  const parts = [
    ...levels.map(
      (v) =>
        `<line class="grid" x1="${area.left}" x2="${area.right}" y1="${y(v).toFixed(1)}" y2="${y(v).toFixed(1)}"/><text x="${area.left - 6}" y="${(y(v) + 4).toFixed(1)}" text-anchor="end">${short(v)}</text>`,
    ),
    `<text x="${area.left}" y="${HEIGHT - 10}">1</text><text x="${area.right}" y="${HEIGHT - 10}" text-anchor="end">step ${countText(steps)}</text>`,
    ...lines.map(({ run, name, points, color, isMain }) => {
      const path = points.map((p) => `${x(p.step).toFixed(1)},${y(p.value).toFixed(1)}`).join(" ");
      const dashes = isMain ? "" : ' stroke-dasharray="5 4"';
      const dots = isMain
        ? ""
        : points.map((p) => `<circle cx="${x(p.step).toFixed(1)}" cy="${y(p.value).toFixed(1)}" r="3" fill="${color}"/>`).join("");
      const last = points.at(-1);
      return `<g><title>${text(run.name)}: ${text(name)} ${short(last?.value ?? 0)} at step ${last?.step}</title><polyline points="${path}" stroke="${color}"${dashes}/>${dots}</g>`;
    }),
  ];
  const names = [...new Set(lines.map(({ name }) => name))].filter((name) => name !== title);
  const note = names.length > 0 ? ` <small>dashed: ${names.map(text).join(", ")}</small>` : "";
  return `<figure><figcaption>${text(title)}${note}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${text(title)}">${parts.join("")}</svg></figure>`;
}

const short = (value: number): string =>
  value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(4)));

/** The balance of experts of a run: one bar for each layer, full at 4 times the mean. */
function expertBars({ name, expertLoad }: LoggedRun): string {
  if (expertLoad.length === 0) return "";
  const bars = expertLoad.map(
    (load, layer) => `<li>layer ${layer} <meter min="1" max="4" value="${load.toFixed(3)}"></meter> ${load.toFixed(2)}</li>`,
  );
  return `<section><h2>${text(name)}: busiest expert over the mean</h2><ol class="experts">${bars.join("")}</ol></section>`;
}

/** The style sheet of the page. */
export const logStyle = `:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin-bottom: 1rem; }
td, th { padding: .2rem .8rem; text-align: right; }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left; }
.key { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
svg { width: 100%; }
svg text { fill: currentColor; font-size: 11px; }
polyline { fill: none; stroke-width: 1.6; }
.grid { stroke: currentColor; opacity: .15; }
.experts { columns: 3; list-style: none; padding: 0; }
`;
