/** Numbers as people read them: bytes in powers of 1024, operations in powers of 1000, tables with aligned columns. */
export const bytesText = (n: number): string => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
/** Formats a number of floating-point operations: `1.2 Tflop`. */
export const flopsText = (n: number): string => scaled(n, 1000, ["flop", "Kflop", "Mflop", "Gflop", "Tflop", "Pflop", "Eflop"]);
/** Formats an integer with thousands separators. */
export const countText = (n: number): string =>
  // the locales of V8 take 10 ms to load
  Number.isSafeInteger(n) ? String(n).replace(/\B(?=(?:\d{3})+$)/g, ",") : n.toLocaleString("en-US");
/** Formats a large count: `8.0 billion`, `0.3 million`; below 100,000 all digits. */
export const millionsText = (n: number): string =>
  n < 1e5 ? countText(n) : n >= 1e9 ? `${(n / 1e9).toFixed(1)} billion` : `${(n / 1e6).toFixed(1)} million`;
/** Formats a count with its noun: `1 layer`, `1,024 layers`. */
export const plural = (n: number, noun: string): string => `${countText(n)} ${noun}${n === 1 ? "" : "s"}`;

function scaled(n: number, base: number, units: readonly string[]): string {
  let i = 0;
  let value = n;
  while (value >= base && i < units.length - 1) {
    value /= base;
    i++;
  }
  return `${i === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[i]}`;
}

/** The largest `of` of all items, and at least `least`. Any number of items: as arguments of Math.max, too many overflow the stack. */
export function largest<T>(items: Iterable<T>, of: (item: T) => number, least = 0): number {
  let most = least;
  for (const item of items) most = Math.max(most, of(item));
  return most;
}

/** Columns padded to their widest cell; those named in `right` are flush right. */
export function table(rows: readonly (readonly string[])[], right: readonly number[] = [], indent = "  "): string[] {
  const widths: number[] = [];
  for (const row of rows) for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  return rows.map((row) => {
    const cells = row.map((cell, i) => (right.includes(i) ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0)));
    return (indent + cells.join("  ")).trimEnd();
  });
}

/** `[0,1,2,5]` as `0-2,5`. */
export function ranges(numbers: Iterable<number>): string {
  const sorted = [...new Set(numbers)].sort((a, b) => a - b);
  const runs: [number, number][] = [];
  for (const n of sorted) {
    const last = runs.at(-1);
    if (last && last[1] === n - 1) last[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}-${to}`)).join(",");
}

/** Formats the ranks of a group: `0,1,2`; more than four at even distances as `0..14 by 2`. */
export function rankList(group: readonly number[]): string {
  const [first = 0, second = first + 1] = group;
  const step = second - first;
  const isEven = group.length > 4 && group.every((rank, i) => rank === first + i * step);
  return isEven ? `${first}..${group.at(-1)}${step > 1 ? ` by ${step}` : ""}` : group.join(",");
}

/** Formats a time: `12.3 s`, `4.56 ms`, `78 µs`, with three digits. */
export function secondsText(seconds: number): string {
  // less than a nanosecond is a rest of sums and differences
  if (Math.abs(seconds) < 1e-9) return "0 s";
  const [value, unit] = seconds >= 1 ? [seconds, "s"] : seconds >= 1e-3 ? [1e3 * seconds, "ms"] : [1e6 * seconds, "µs"];
  return `${value >= 1000 ? countText(Math.round(value)) : value.toPrecision(3)} ${unit}`;
}
/** Formats a rate of arithmetic: `412 TFLOP/s`, `1.35 GFLOP/s`. */
export const rateText = (perSecond: number): string =>
  perSecond >= 1e12 ? `${(perSecond / 1e12).toPrecision(3)} TFLOP/s` : `${(perSecond / 1e9).toPrecision(3)} GFLOP/s`;
/** Formats a share: `41.2 %`. */
export const percentOf = (share: number): string => `${(100 * share).toFixed(1)} %`;

/** Returns the axes of which a collective spans ranks: `ep` for `ep/4@2`, a part of it, and `tp`, `dp` for `tp*dp`. */
export const wholeAxes = (axes: string): string[] => [...new Set(axes.split("*").map((axis) => axis.replace(/\/.*/, "")))];
