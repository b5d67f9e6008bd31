/** A live curve of losses in SVG: axes with round ticks, and the value of the step under the pointer or, with the arrow keys, the focus. */
import { type Ticks, ticks } from "../../src/page/shared/ticks.ts";

/** A chart of losses. */
export interface Chart {
  /** Removes all losses. `steps`: the end of the axis of steps. */
  clear(steps: number): void;
  /** Adds the loss of the next step; the first is step 1. */
  add(loss: number): void;
}

const HEIGHT = 320;
/** The area of the curve in pixels; its width is that of the page. */
const area = { left: 60, top: 14, bottom: HEIGHT - 46 };
const SVG = "http://www.w3.org/2000/svg";

/** Draws a chart in an element. `labelledBy`: the id of the element with its title. */
export const chartIn = (home: HTMLElement, labelledBy: string): Chart => new LossChart(home, labelledBy);

class LossChart implements Chart {
  /** For assistive technology, the chart is a slider along the steps. */
  readonly #svg: SVGSVGElement;
  readonly #axes: SVGGElement;
  readonly #curve: SVGPolylineElement;
  readonly #hover: SVGGElement;
  readonly #rule: SVGLineElement;
  readonly #mark: SVGCircleElement;
  readonly #value: SVGTextElement;
  #losses: number[] = [];
  /** The range of finite losses. */
  #low = Infinity;
  #high = -Infinity;
  #steps = 1;
  /** The step under the pointer or the focus; 0: none. */
  #selected = 0;
  #isDrawing = false;
  #scale: Ticks = ticks(0, 1, 5);
  #right = 0;

  constructor(home: HTMLElement, labelledBy: string) {
    this.#svg = child(home, "svg", { height: HEIGHT, role: "slider", tabindex: 0, "aria-labelledby": labelledBy });
    this.#axes = child(this.#svg, "g");
    this.#curve = child(this.#svg, "polyline", { class: "curve" });
    this.#hover = child(this.#svg, "g", { visibility: "hidden" });
    this.#rule = child(this.#hover, "line", { class: "hover", y1: area.top, y2: area.bottom });
    this.#mark = child(this.#hover, "circle", { class: "mark", r: 4 });
    this.#value = child(this.#hover, "text", { class: "value" });
    this.#listen();
    // the first call comes with the first layout
    new ResizeObserver(() => this.#drawSoon()).observe(this.#svg);
  }

  clear(steps: number): void {
    this.#losses = [];
    this.#steps = steps;
    this.#selected = 0;
    this.#low = Infinity;
    this.#high = -Infinity;
    this.#drawSoon();
  }

  add(loss: number): void {
    this.#losses.push(loss);
    if (Number.isFinite(loss)) {
      this.#low = Math.min(this.#low, loss);
      this.#high = Math.max(this.#high, loss);
    }
    this.#drawSoon();
  }

  #x(step: number): number {
    return area.left + ((step - 1) / Math.max(1, this.#steps - 1)) * (this.#right - area.left);
  }

  #y(loss: number): number {
    const { from, to } = this.#scale;
    return area.bottom - ((loss - from) / (to - from)) * (area.bottom - area.top);
  }

  #drawSoon(): void {
    if (!this.#isDrawing) requestAnimationFrame(() => this.#draw());
    this.#isDrawing = true;
  }

  #draw(): void {
    this.#isDrawing = false;
    this.#right = this.#svg.clientWidth - 16;
    this.#scale = this.#low <= this.#high ? ticks(this.#low, this.#high, 5) : ticks(0, 1, 5);
    this.#drawAxes();
    this.#curve.setAttribute(
      "points",
      this.#losses.map((loss, i) => (Number.isFinite(loss) ? `${this.#x(i + 1).toFixed(1)},${this.#y(loss).toFixed(1)}` : "")).join(" "),
    );
    this.#show(this.#selected);
  }

  #drawAxes(): void {
    const [axes, right, steps] = [this.#axes, this.#right, this.#steps];
    const { values, step: apart } = this.#scale;
    axes.replaceChildren();
    // a difference such as 0.1 may be slightly less in floating point
    const decimals = Math.max(0, -Math.floor(Math.log10(apart * 1.001)));
    for (const level of values) {
      child(axes, "line", { class: "grid", x1: area.left, x2: right, y1: this.#y(level), y2: this.#y(level) });
      child(axes, "text", { x: area.left - 8, y: this.#y(level) + 4, "text-anchor": "end" }).textContent = level.toFixed(decimals);
    }
    const labelled = ticks(1, steps, right / 100).values.filter((s) => Number.isInteger(s) && s >= 1 && s <= steps);
    for (const step of new Set([1, ...labelled])) {
      const x = this.#x(step);
      child(axes, "line", { class: "axis", x1: x, x2: x, y1: area.bottom, y2: area.bottom + 4 });
      child(axes, "text", { x, y: area.bottom + 18, "text-anchor": "middle" }).textContent = String(step);
    }
    child(axes, "line", { class: "axis", x1: area.left, x2: right, y1: area.bottom, y2: area.bottom });
    child(axes, "line", { class: "axis", x1: area.left, x2: area.left, y1: area.top, y2: area.bottom });
    child(axes, "text", { x: (area.left + right) / 2, y: HEIGHT - 8, "text-anchor": "middle" }).textContent = "step";
    const middle = (area.top + area.bottom) / 2;
    child(axes, "text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }).textContent = "loss (nats)";
  }

  /** Shows the value of a step; of none, if the step is 0 or has no loss yet. */
  #show(step: number): void {
    this.#selected = Math.min(Math.max(0, step), this.#losses.length);
    const selected = this.#selected;
    const loss = this.#losses[selected - 1];
    this.#hover.setAttribute("visibility", loss === undefined ? "hidden" : "visible");
    const text = loss === undefined ? "no step" : `step ${selected}: loss ${loss.toFixed(4)}`;
    set(this.#svg, { "aria-valuemin": 0, "aria-valuemax": this.#losses.length, "aria-valuenow": selected, "aria-valuetext": text });
    if (loss === undefined) return;
    const [at, level] = [this.#x(selected), Number.isFinite(loss) ? this.#y(loss) : area.top];
    const back = at > this.#right - 170;
    set(this.#rule, { x1: at, x2: at });
    set(this.#mark, { cx: at, cy: level });
    set(this.#value, { x: at + (back ? -10 : 10), y: Math.max(area.top + 12, level - 10), "text-anchor": back ? "end" : "start" });
    this.#value.textContent = text;
  }

  #listen(): void {
    const svg = this.#svg;
    svg.addEventListener("pointermove", (event) => {
      const inside = event.clientX - svg.getBoundingClientRect().left;
      this.#show(Math.max(1, Math.round(1 + ((inside - area.left) / (this.#right - area.left)) * (this.#steps - 1))));
    });
    svg.addEventListener("pointerleave", () => this.#show(0));
    svg.addEventListener("blur", () => this.#show(0));
    const keys: Readonly<Record<string, () => number>> = {
      ArrowLeft: () => Math.max(1, this.#selected - 1),
      ArrowRight: () => this.#selected + 1,
      Home: () => 1,
      End: () => this.#losses.length,
    };
    svg.addEventListener("keydown", (event) => {
      const to = keys[event.key];
      if (!to) return;
      event.preventDefault();
      this.#show(to());
    });
  }
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
