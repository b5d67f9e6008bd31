/** A live curve of losses in SVG: axes with round ticks, and the value under the pointer or, by the arrow keys, under the focus. */

export interface Chart {
  /** `steps` is how far the axis of steps goes. */
  clear(steps: number): void;
  /** Losses come in the order of their steps, from 1. */
  add(loss: number): void;
}

const HEIGHT = 320;
/** Pixels around the curve; the width is the page's. */
const area = { left: 60, top: 14, bottom: HEIGHT - 46 };
const SVG = "http://www.w3.org/2000/svg";

export function chartIn(home: HTMLElement, labelledBy: string): Chart {
  // to those who hear it, the chart is a slider along the steps
  const svg = child(home, "svg", { height: HEIGHT, role: "slider", tabindex: 0, "aria-labelledby": labelledBy });
  const hear = (now: number, text: string): void =>
    set(svg, { "aria-valuemin": 0, "aria-valuemax": losses.length, "aria-valuenow": now, "aria-valuetext": text });
  const axes = child(svg, "g");
  const curve = child(svg, "polyline", { class: "curve" });
  const hover = child(svg, "g", { visibility: "hidden" });
  const rule = child(hover, "line", { class: "hover", y1: area.top, y2: area.bottom });
  const mark = child(hover, "circle", { class: "mark", r: 4 });
  const value = child(hover, "text", { class: "value" });
  let losses: number[] = [];
  let [low, high] = [Infinity, -Infinity];
  let steps = 1;
  /** The step that is looked at; 0: none. */
  let looked = 0;
  let drawing = false;

  let levels = ticks(0, 1, 5);
  let right = 0;
  const x = (step: number): number => area.left + ((step - 1) / Math.max(1, steps - 1)) * (right - area.left);
  const y = (loss: number): number => area.bottom - ((loss - levels[0]!) / (levels.at(-1)! - levels[0]!)) * (area.bottom - area.top);

  function draw(): void {
    drawing = false;
    right = svg.clientWidth - 16;
    levels = low <= high ? ticks(low, high, 5) : ticks(0, 1, 5);
    axes.replaceChildren();
    // 0.1 as a difference may be a little less
    const decimals = Math.max(0, -Math.floor(Math.log10((levels[1]! - levels[0]!) * 1.001)));
    for (const level of levels) {
      child(axes, "line", { class: "grid", x1: area.left, x2: right, y1: y(level), y2: y(level) });
      child(axes, "text", { x: area.left - 8, y: y(level) + 4, "text-anchor": "end" }).textContent = level.toFixed(decimals);
    }
    for (const step of new Set([1, ...ticks(1, steps, right / 100).filter((s) => Number.isInteger(s) && s >= 1 && s <= steps)])) {
      child(axes, "line", { class: "axis", x1: x(step), x2: x(step), y1: area.bottom, y2: area.bottom + 4 });
      child(axes, "text", { x: x(step), y: area.bottom + 18, "text-anchor": "middle" }).textContent = String(step);
    }
    child(axes, "line", { class: "axis", x1: area.left, x2: right, y1: area.bottom, y2: area.bottom });
    child(axes, "line", { class: "axis", x1: area.left, x2: area.left, y1: area.top, y2: area.bottom });
    child(axes, "text", { x: (area.left + right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }).textContent = "step";
    const middle = (area.top + area.bottom) / 2;
    child(axes, "text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }).textContent = "loss (nats)";
    curve.setAttribute(
      "points",
      losses.map((loss, i) => (Number.isFinite(loss) ? `${x(i + 1).toFixed(1)},${y(loss).toFixed(1)}` : "")).join(" "),
    );
    show(looked);
  }
  const soon = (): void => {
    if (!drawing) requestAnimationFrame(draw);
    drawing = true;
  };

  function show(step: number): void {
    looked = Math.min(Math.max(0, step), losses.length);
    const loss = losses[looked - 1];
    hover.setAttribute("visibility", loss === undefined ? "hidden" : "visible");
    hear(looked, loss === undefined ? "no step" : `step ${looked}: loss ${loss.toFixed(4)}`);
    if (loss === undefined) return;
    const [at, level] = [x(looked), Number.isFinite(loss) ? y(loss) : area.top];
    const back = at > right - 170;
    set(rule, { x1: at, x2: at });
    set(mark, { cx: at, cy: level });
    set(value, { x: at + (back ? -10 : 10), y: Math.max(area.top + 12, level - 10), "text-anchor": back ? "end" : "start" });
    value.textContent = `step ${looked}: loss ${loss.toFixed(4)}`;
  }
  svg.addEventListener("pointermove", (event) => {
    const inside = event.clientX - svg.getBoundingClientRect().left;
    show(Math.max(1, Math.round(1 + ((inside - area.left) / (right - area.left)) * (steps - 1))));
  });
  svg.addEventListener("pointerleave", () => show(0));
  svg.addEventListener("blur", () => show(0));
  const keys: Readonly<Record<string, () => number>> = {
    ArrowLeft: () => Math.max(1, looked - 1),
    ArrowRight: () => looked + 1,
    Home: () => 1,
    End: () => losses.length,
  };
  svg.addEventListener("keydown", (event) => {
    const to = keys[event.key];
    if (!to) return;
    event.preventDefault();
    show(to());
  });

  // the first call comes with the first layout
  new ResizeObserver(soon).observe(svg);
  return {
    clear(count) {
      [losses, steps, looked, low, high] = [[], count, 0, Infinity, -Infinity];
      soon();
    },
    add(loss) {
      losses.push(loss);
      if (Number.isFinite(loss)) [low, high] = [Math.min(low, loss), Math.max(high, loss)];
      soon();
    },
  };
}

/** Round values, evenly apart, that reach from at most `from` to at least `to`; about `wanted` of them. */
function ticks(from: number, to: number, wanted: number): number[] {
  const span = to - from || 1;
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough)!;
  const first = Math.floor(from / step);
  const last = Math.max(first + 1, Math.ceil(to / step));
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

type Attributes = Readonly<Record<string, string | number>>;
function child<K extends keyof SVGElementTagNameMap>(parent: Element, name: K, attributes: Attributes = {}): SVGElementTagNameMap[K] {
  const made = document.createElementNS(SVG, name);
  set(made, attributes);
  parent.append(made);
  return made;
}
function set(element: Element, attributes: Attributes): void {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
}
