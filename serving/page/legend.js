/** The scale of a similarity map: how the values spread, what the colours mean, and numbers. */

import { heatColour, paintScale } from "./colours.js";
import { make } from "./dom.js";

const BINS = 40;

export class Legend {
  constructor() {
    this.bars = Array.from({ length: BINS }, () => make("i"));
    this.scale = make("canvas");
    paintScale(this.scale);
    this.tick = make("b", { hidden: true });
    this.labels = [make("span"), make("span"), make("span", { text: "1" })];
    this.numbers = make("p", { class: "numbers" });
    this.element = make(
      "div", { class: "legend", hidden: true },
      make("div", { class: "histogram", "aria-hidden": "true" }, ...this.bars),
      make("div", { class: "scale", "aria-hidden": "true" }, this.scale, this.tick),
      make("div", { class: "labels", "aria-hidden": "true" }, ...this.labels),
      this.numbers,
    );
    this.range = { low: 0, high: 1 };
    this.digits = 2;
    this.summary = "";
  }

  /**
   * @param {Float32Array} values similarities
   * @param {Int32Array} used patches that count
   * @param {{low: number, high: number}} range
   */
  show(values, used, range) {
    this.range = range;
    const counts = new Array(BINS).fill(0);
    for (const index of used) {
      const share = (values[index] - range.low) / (range.high - range.low || 1);
      counts[Math.max(0, Math.min(BINS - 1, Math.floor(share * BINS)))]++;
    }
    const most = Math.max(...counts);
    this.bars.forEach((bar, bin) => {
      bar.style.height = `${counts[bin] ? Math.max(6, (100 * counts[bin]) / most) : 0}%`;
      bar.style.background = heatColour(range.low + ((bin + 0.5) / BINS) * (range.high - range.low), range);
    });
    // Where features are much alike, two digits would tell nothing apart.
    this.digits = range.high - range.low < 0.15 ? 3 : 2;
    const sorted = Float32Array.from(used, (index) => values[index]).sort();
    const written = (/** @type {number} */ value) => value.toFixed(this.digits);
    this.labels[0].textContent = written(range.low);
    this.labels[1].textContent = written((range.low + range.high) / 2);
    const least = written(sorted[0]);
    const median = written(sorted[Math.floor(sorted.length / 2)]);
    const next = written(sorted[Math.max(0, sorted.length - 2)]);
    this.summary = `least ${least}, median ${median}, next most ${next}`;
    this.element.hidden = false;
    this.point(null);
  }

  /** @param {number | null} value of the patch pointed at */
  point(value) {
    this.tick.hidden = value === null;
    if (value === null) {
      this.numbers.textContent = this.summary;
      return;
    }
    const { low, high } = this.range;
    const share = high > low ? (value - low) / (high - low) : 1;
    this.tick.style.left = `${100 * Math.max(0, Math.min(1, share))}%`;
    this.numbers.replaceChildren("here ", make("strong", { text: value.toFixed(this.digits) }));
  }
}
