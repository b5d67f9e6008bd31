/** Names and values: of a selection in the page of `rankc view`, of a run in that of `rankc serve`. */
import type { ComponentChildren } from "preact";

/** Names and values; the style of the page places them. Undefined rows are left out. */
export function Facts({ rows }: { readonly rows: readonly (readonly [name: string, value: ComponentChildren] | undefined)[] }) {
  return (
    <dl class="pairs">
      {rows.flatMap((row) =>
        row
          ? [
              <div key={row[0]}>
                <dt>{row[0]}</dt>
                <dd>{row[1]}</dd>
              </div>,
            ]
          : [],
      )}
    </dl>
  );
}
