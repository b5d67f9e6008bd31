/** The theme of a page: that of the system, or the one that a person chose on it. */
import { computed, effect, signal } from "@preact/signals";

/** The name of a theme. */
export type ThemeName = "light" | "dark";

/** The chosen theme; undefined: that of the system. */
export const chosenTheme = signal<ThemeName | undefined>(undefined);

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isSystemDark = signal(systemDark.matches);
systemDark.addEventListener("change", ({ matches }) => {
  isSystemDark.value = matches;
});
/** Whether the page is dark. */
export const isDark = computed(() => (chosenTheme.value === undefined ? isSystemDark.value : chosenTheme.value === "dark"));

/** Chooses the other theme. */
export function switchTheme(): void {
  chosenTheme.value = isDark.value ? "light" : "dark";
}

/** Returns a theme of this name; undefined if there is none. */
export const themeOf = (name: string | null): ThemeName | undefined => (name === "light" || name === "dark" ? name : undefined);

/** Gives the page its theme, now and when it changes. */
export const followTheme = (): (() => void) =>
  effect(() => {
    const name: ThemeName = isDark.value ? "dark" : "light";
    document.documentElement.style.colorScheme = name;
    document.documentElement.dataset.theme = name;
  });

/** Returns whether a key is for the page: not one of a field of text or of a dialog, and without Control, Alt or Meta. */
export function isPageKey({ target, ctrlKey, metaKey, altKey }: KeyboardEvent): boolean {
  if (ctrlKey || metaKey || altKey) return false;
  return !(target instanceof HTMLElement && target.closest("input, textarea, select, dialog"));
}

/** The button that switches the theme; the key is `t`. */
export function ThemeButton() {
  return (
    <button
      type="button"
      class="theme-button"
      aria-label={isDark.value ? "use the light theme" : "use the dark theme"}
      title="theme (t)"
      onClick={switchTheme}
    >
      {isDark.value ? "☀" : "☾"}
    </button>
  );
}
