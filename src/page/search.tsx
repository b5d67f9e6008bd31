/** The search over everything: a dialog with a field and a list of hits. */
import { useComputed, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { type Hit, searchPlan } from "./searchIndex.ts";
import { isSearching, panel, plan, select } from "./state.ts";

/** The dialog; it is open while `isSearching`. */
export function Search() {
  const dialog = useRef<HTMLDialogElement>(null);
  const isOpen = isSearching.value;
  useEffect(() => {
    if (isOpen) dialog.current?.showModal();
    else dialog.current?.close();
  }, [isOpen]);
  return (
    <dialog ref={dialog} class="search" aria-label="search" onClose={() => (isSearching.value = false)}>
      {isOpen && <SearchField />}
    </dialog>
  );
}

function open(hit: Hit): void {
  isSearching.value = false;
  if (hit.selection) select(hit.selection, hit.panel);
  else panel.value = hit.panel;
}

function SearchField() {
  const text = useSignal("");
  const at = useSignal(0);
  const list = useRef<HTMLDivElement>(null);
  // a key may be pressed before the last letter is drawn: the list for keys is always that of the text
  const found = useComputed(() => searchPlan(plan.value, text.value));
  const place = useComputed(() => Math.min(at.value, found.value.length - 1));
  const [hits, chosen] = [found.value, place.value];
  useEffect(() => {
    list.current?.children[chosen]?.scrollIntoView({ block: "nearest" });
  }, [chosen]);
  const onKey = (event: KeyboardEvent): void => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const hit = found.value[place.value];
    if (by !== undefined) at.value = Math.min(found.value.length - 1, Math.max(0, place.value + by));
    else if (event.key === "Enter" && hit) open(hit);
    else return;
    event.preventDefault();
  };
  return (
    <>
      <input
        type="text"
        role="combobox"
        aria-expanded="true"
        aria-controls="hits"
        aria-activedescendant={`hit-${chosen}`}
        aria-label="search instructions, tensors, kernels, ranks, axes, job keys"
        placeholder="instructions, tensors, kernels, ranks, axes, job keys"
        value={text.value}
        autofocus
        onInput={(event) => {
          text.value = event.currentTarget.value;
          at.value = 0;
        }}
        onKeyDown={onKey}
      />
      <div id="hits" ref={list} role="listbox" aria-label="hits" class="hits">
        {hits.map((hit, i) => (
          // biome-ignore lint/a11y/useKeyWithClickEvents: the field has the keys of the list
          <div
            key={`${hit.kind} ${hit.text} ${hit.note}`}
            id={`hit-${i}`}
            role="option"
            tabIndex={-1}
            aria-selected={i === chosen}
            onClick={() => open(hit)}
          >
            <span class="kind">{hit.kind}</span>
            <span class="id">{hit.text}</span>
            <span class="quiet">{hit.note}</span>
          </div>
        ))}
      </div>
      {hits.length === 0 && <p class="note">Nothing has these words in its name.</p>}
    </>
  );
}
