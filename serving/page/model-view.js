/** One model's column: its colours, its similarities, and what became of the request. */

import { paintComponents, paintHeat } from "./colours.js";
import { announce, make, readableBytes, readableTime } from "./dom.js";
import { heatRange } from "./features.js";
import { Legend } from "./legend.js";
import { PatchPanel } from "./panel.js";

/** @typedef {import("./query.js").Wanted} Wanted */

export class ModelView {
  /** @type {AbortController | null} */
  #running = null;
  #timer = 0;

  /**
   * @param {import("./source.js").Source} source
   * @param {object} listeners
   * @param {(place: {u: number, v: number} | null) => void} listeners.onPoint
   * @param {(place: {u: number, v: number}) => void} listeners.onChoose
   * @param {(view: ModelView) => void} listeners.onMap a new map is on show
   */
  constructor(source, { onPoint, onChoose, onMap }) {
    this.source = source;
    this.onMap = onMap;
    /** @type {import("./features.js").FeatureMap | null} */
    this.map = null;
    /** @type {Float32Array | null} */
    this.values = null;
    /** @type {{u: number, v: number} | null} */
    this.pointed = null;
    this.heading = make("h2");
    this.facts = make("p", { class: "facts" });
    this.colours = new PatchPanel({ title: "Principal components", onPoint, onChoose });
    this.heat = new PatchPanel({
      title: "Similarity to the chosen patch",
      onPoint,
      onChoose,
      describe: ({ row, column }) =>
        this.values && this.map
          ? `similarity ${this.values[row * this.map.grid.columns + column].toFixed(2)}`
          : "",
    });
    this.legend = new Legend();
    this.alert = make("div", { class: "notice", role: "alert", hidden: true });
    this.element = make(
      "section", { class: "column model" },
      make("header", {}, this.heading, this.facts),
      make("div", { class: "cell" }, this.alert, this.colours.element),
      make("div", { class: "cell" }, this.heat.element, this.legend.element),
    );
  }

  /** What the view shows, in words that name its column. */
  get label() {
    return this.heading.textContent ?? "";
  }

  /**
   * Asks for features and shows them; a request that is still running is given up.
   * @param {import("./pictures.js").Picture} picture
   * @param {Wanted} wanted
   * @param {string} version of the model
   */
  async show(picture, wanted, version) {
    this.#running?.abort();
    const running = new AbortController();
    this.#running = running;
    this.element.setAttribute("aria-label", `${wanted.model}, layer ${wanted.layer}`);
    this.heading.replaceChildren(wanted.model, make("span", { class: "tag", text: `layer ${wanted.layer}` }));
    for (const panel of [this.colours, this.heat]) panel.setPicture(picture.url);
    this.alert.hidden = true;
    this.#loading(true);
    try {
      const answer = await this.source.get(picture, wanted, version, {
        signal: running.signal,
        onWait: (seconds) => this.#waiting(seconds),
      });
      if (running.signal.aborted) return;
      this.#loading(false);
      this.#draw(answer);
    } catch (error) {
      if (running.signal.aborted) return;
      this.#loading(false);
      this.#refuse(/** @type {Error & {advice?: string}} */ (error), () => this.show(picture, wanted, version));
    }
  }

  /** Gives up what is running; the column goes away. */
  close() {
    this.#running?.abort();
    clearTimeout(this.#timer);
    this.element.remove();
  }

  /**
   * Shows similarities to the patch at a place.
   * @param {number} u
   * @param {number} v
   * @param {boolean} centred compare less the mean patch
   */
  choose(u, v, centred) {
    if (!this.map) return;
    const { grid, used } = this.map;
    const { row, column } = grid.at(u, v);
    this.values = this.map.similarity(row, column, centred);
    const range = heatRange(this.values, used);
    paintHeat(this.heat.canvas, grid, this.values, range);
    this.legend.show(this.values, used, range);
    for (const panel of [this.colours, this.heat]) panel.choose(u, v);
    this.point(this.pointed);
  }

  /** @param {{u: number, v: number} | null} place pointed at, in whichever panel */
  point(place) {
    this.pointed = place;
    for (const panel of [this.colours, this.heat]) panel.point(place);
    if (!this.map || !this.values) return;
    const { grid } = this.map;
    const found = place && grid.at(place.u, place.v);
    this.legend.point(found && this.values[found.row * grid.columns + found.column]);
  }

  /** @param {import("./source.js").Answer} answer */
  #draw({ map, ms, bytes }) {
    this.map = map;
    const { grid } = map;
    for (const panel of [this.colours, this.heat]) panel.setGrid(grid);
    const { components, explained } = map.components;
    paintComponents(this.colours.canvas, grid, components);
    this.colours.note.textContent = `${Math.round(100 * explained)} % of variance`;
    const stride = [...new Set(grid.stride.map((side) => Math.round(side)))].join(" × ");
    const facts = [
      ["grid", `${grid.rows} × ${grid.columns}`],
      ["stride", `${stride} px`],
      ["input", `${grid.input.join(" × ")} px`],
      ["channels", String(map.width)],
      ["took", readableTime(ms)],
      ["", readableBytes(bytes)],
    ];
    this.facts.replaceChildren(
      ...facts.map(([name, value]) => make("span", {}, name && `${name} `, make("b", { text: value }))),
    );
    this.element.dataset.state = "ready";
    this.onMap(this);
    announce(`${this.label}: ${grid.rows} by ${grid.columns} patches, after ${readableTime(ms)}.`);
  }

  /** @param {boolean} on */
  #loading(on) {
    clearTimeout(this.#timer);
    this.element.setAttribute("aria-busy", String(on));
    if (!on) return;
    this.element.dataset.state = "asked";
    // Answers that come at once need no sign of waiting.
    this.#timer = setTimeout(() => {
      this.element.dataset.state = "waiting";
      if (!this.map) this.facts.textContent = "Computing …";
    }, 150);
  }

  /** @param {number} seconds */
  #waiting(seconds) {
    clearTimeout(this.#timer);
    this.element.dataset.state = "waiting";
    this.facts.textContent = seconds ? `The server is busy; trying again in ${seconds} s` : "Trying again …";
  }

  /**
   * @param {Error & {advice?: string}} error
   * @param {() => void} again
   */
  #refuse(error, again) {
    this.map = null;
    this.values = null;
    this.element.dataset.state = "failed";
    this.facts.textContent = "";
    this.legend.element.hidden = true;
    this.alert.replaceChildren(
      make("p", {}, make("strong", { text: error.message })),
      ...(error.advice ? [make("p", { text: error.advice })] : []),
      make("button", { type: "button", class: "button", text: "Try again", on: { click: again } }),
    );
    this.alert.hidden = false;
    this.onMap(this);
  }
}
