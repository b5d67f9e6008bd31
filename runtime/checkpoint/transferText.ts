/** Returns a line about bytes that are read or written: how many of how many, the rate, and the time left at that rate. */
export function transferText(what: string, done: number, total: number, seconds: number): string {
  const rate = done / seconds;
  const left = done > 0 ? `, ${gigabytes(rate)} GB/s, ${Math.ceil((total - done) / rate)} s left` : "";
  return `${what}: ${gigabytes(done)} of ${gigabytes(total)} GB${left}`;
}
const gigabytes = (bytes: number): string => (bytes / 1e9).toFixed(2);
