/** The parts of the page that the page of `rankc view` has as well: the theme, and names with values. */
import { type Signal, signal } from "@preact/signals";
import { render } from "preact";
import { Facts } from "../../src/page/shared/facts.tsx";
import { chosenTheme, followTheme, isPageKey, switchTheme, ThemeButton, themeOf } from "../../src/page/shared/themeChoice.tsx";

/** The figures of a run, by the id of their element. */
export const figures = {
  step: signal("–"),
  loss: signal("–"),
  speed: signal("–"),
  memory: signal("–"),
  adapter: signal("–"),
} as const satisfies Record<string, Signal<string>>;
const names: Readonly<Record<keyof typeof figures, string>> = {
  ...{ step: "step", loss: "loss", speed: "tokens/s", memory: "memory of the plan", adapter: "adapter" },
};

/** Shows the button of the theme and the figures. The address holds a chosen theme, as `#theme=dark`. */
export function showParts(theme: HTMLElement, facts: HTMLElement): void {
  chosenTheme.value = themeOf(new URLSearchParams(location.hash.slice(1)).get("theme"));
  followTheme();
  addEventListener("keydown", (event) => {
    if (event.key !== "t" || !isPageKey(event)) return;
    event.preventDefault();
    switchTheme();
  });
  chosenTheme.subscribe((name) => {
    if (name) history.replaceState(null, "", `#theme=${name}`);
  });
  render(<ThemeButton />, theme);
  const ids = Object.keys(figures) as (keyof typeof figures)[];
  render(
    <Facts
      rows={ids.map((id) => [
        names[id],
        <span key={id} id={id}>
          {figures[id]}
        </span>,
      ])}
    />,
    facts,
  );
}
