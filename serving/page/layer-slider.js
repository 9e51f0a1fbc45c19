/** A slider over a model's layers, with shortcuts to those its card recommends. */

import { make } from "./dom.js";

export class LayerSlider {
  /**
   * @param {HTMLElement} place
   * @param {string} name what it is for, for screen readers
   * @param {(layer: number) => void} onLayer
   */
  constructor(place, name, onLayer) {
    this.place = place;
    this.onLayer = onLayer;
    this.output = make("output");
    this.input = make("input", {
      type: "range", min: "0", step: "1", "aria-label": name,
      on: { input: () => this.#choose(Number(this.input.value)) },
    });
    this.shortcuts = make("div", { class: "chips", role: "group", "aria-label": `${name}, shortcuts` });
    place.append(
      make("div", { class: "field" }, make("span", { class: "spread" }, "Layer", this.output), this.input),
      this.shortcuts,
    );
  }

  /**
   * @param {Record<string, any>} model
   * @param {number} layer
   */
  show(model, layer) {
    const last = model.depth - 1;
    this.input.max = String(last);
    this.input.value = String(layer);
    this.input.style.setProperty("--share", String(last ? layer / last : 1));
    this.input.setAttribute("aria-valuetext", `${layer} of 0 to ${last}`);
    this.output.textContent = `${layer} of 0–${last}`;
    const known = [...new Set([...model.layers, last])];
    this.shortcuts.replaceChildren(
      ...known.map((number) =>
        make("button", {
          type: "button", class: "chip", text: String(number), "aria-label": `Layer ${number}`,
          "aria-pressed": String(number === layer), on: { click: () => this.#choose(number, true) },
        }),
      ),
    );
  }

  /**
   * @param {number} layer
   * @param {boolean} [refocus] the shortcuts are drawn anew, and the focus must not get lost
   */
  #choose(layer, refocus = false) {
    this.onLayer(layer);
    if (refocus) /** @type {HTMLElement | null} */ (this.shortcuts.querySelector("[aria-pressed=true]"))?.focus();
  }
}
