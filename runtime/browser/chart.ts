/** A live curve of losses in SVG: axes with round ticks, and the value under the pointer or, by the arrow keys, under the focus. */

export interface Chart {
  /** `steps` is how far the axis of steps goes. */
  clear(steps: number): void;
  /** Losses come in the order of their steps, from 1. */
  add(loss: number): void;
}

const [WIDTH, HEIGHT] = [880, 340];
const area = { left: 64, right: WIDTH - 16, top: 14, bottom: HEIGHT - 46 };
const SVG = "http://www.w3.org/2000/svg";

export function chartIn(home: HTMLElement, labelledBy: string): Chart {
  const svg = child(home, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "slider", tabindex: 0, "aria-labelledby": labelledBy });
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
  const x = (step: number): number => area.left + ((step - 1) / Math.max(1, steps - 1)) * (area.right - area.left);
  const y = (loss: number): number => area.bottom - ((loss - levels[0]!) / (levels.at(-1)! - levels[0]!)) * (area.bottom - area.top);

  function draw(): void {
    drawing = false;
    levels = low <= high ? ticks(low, high, 5) : ticks(0, 1, 5);
    axes.replaceChildren();
    for (const level of levels) {
      child(axes, "line", { class: "grid", x1: area.left, x2: area.right, y1: y(level), y2: y(level) });
      child(axes, "text", { x: area.left - 8, y: y(level) + 4, "text-anchor": "end" }).textContent = short(level);
    }
    for (const step of new Set([1, ...ticks(1, steps, 8).filter((s) => Number.isInteger(s) && s >= 1 && s <= steps)])) {
      child(axes, "line", { class: "axis", x1: x(step), x2: x(step), y1: area.bottom, y2: area.bottom + 4 });
      child(axes, "text", { x: x(step), y: area.bottom + 18, "text-anchor": "middle" }).textContent = String(step);
    }
    child(axes, "line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom });
    child(axes, "line", { class: "axis", x1: area.left, x2: area.left, y1: area.top, y2: area.bottom });
    child(axes, "text", { x: (area.left + area.right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }).textContent = "step";
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
    if (loss === undefined) return;
    const [at, level] = [x(looked), Number.isFinite(loss) ? y(loss) : area.top];
    const right = at > WIDTH - 190;
    set(rule, { x1: at, x2: at });
    set(mark, { cx: at, cy: level });
    set(value, { x: at + (right ? -10 : 10), y: Math.max(area.top + 12, level - 10), "text-anchor": right ? "end" : "start" });
    value.textContent = `step ${looked}: loss ${loss.toFixed(4)}`;
    // to those who hear it, the chart is a slider along the steps
    set(svg, { "aria-valuemin": 1, "aria-valuemax": losses.length, "aria-valuenow": looked, "aria-valuetext": value.textContent });
  }
  svg.addEventListener("pointermove", (event) => {
    const { left, width } = svg.getBoundingClientRect();
    const inside = ((event.clientX - left) / width) * WIDTH;
    show(Math.max(1, Math.round(1 + ((inside - area.left) / (area.right - area.left)) * (steps - 1))));
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

  draw();
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

const short = (value: number): string => String(Number(value.toPrecision(4)));

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
