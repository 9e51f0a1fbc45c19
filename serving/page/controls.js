/** The rail of controls: shows the state, and says what people change. */

import { byId, make } from "./dom.js";
import { LayerSlider } from "./layer-slider.js";
import { sizeChoices } from "./query.js";

/** @typedef {import("./state.js").State} State */

export class Controls {
  /** @param {(changes: Partial<State>) => void} onChange */
  constructor(onChange) {
    this.model = byId("model-a");
    this.other = byId("model-b");
    this.size = byId("size");
    this.layer = new LayerSlider(byId("layer-a"), "Layer", (layer) => onChange({ layer }));
    this.otherLayer = new LayerSlider(byId("layer-b"), "Layer of the model beside it", (layer) =>
      onChange({ otherLayer: layer }),
    );
    // Layers of one model mean nothing to another.
    this.model.addEventListener("change", () => onChange({ model: this.model.value, layer: null }));
    this.other.addEventListener("change", () => onChange({ other: this.other.value, otherLayer: null }));
    this.size.addEventListener("change", () => onChange({ size: this.size.value }));
    for (const name of /** @type {const} */ (["norm", "centred", "smooth", "over"])) {
      const box = byId(name);
      box.addEventListener("change", () => onChange({ [name]: box.checked }));
    }
  }

  /**
   * @param {State} state
   * @param {Record<string, any>[]} models all there are
   */
  show(state, models) {
    const options = models.map(({ id, ready }) => ({ value: id, label: ready ? id : `${id} (not ready)` }));
    fill(this.model, options, state.model);
    fill(this.other, [{ value: "", label: "Nothing" }, ...options], state.other);
    const model = models.find(({ id }) => id === state.model);
    const other = models.find(({ id }) => id === state.other);
    if (model?.ready) this.layer.show(model, layerOf(model, state.layer));
    if (other?.ready) this.otherLayer.show(other, layerOf(other, state.otherLayer));
    this.layer.place.hidden = !model?.ready;
    this.otherLayer.place.hidden = !other?.ready;
    const known = [model, other].filter((one) => one?.ready);
    if (known.length) {
      const sizes = sizeChoices(/** @type {Record<string, any>[]} */ (known));
      if (!sizes.some(({ value }) => value === state.size)) sizes.push({ value: state.size, label: state.size });
      fill(this.size, sizes, state.size);
    }
    const words = known.map((one, i) => `${one?.id} · layer ${[this.layer, this.otherLayer][i].input.value}`);
    byId("settings-now").textContent = words.join(", ");
    for (const name of /** @type {const} */ (["norm", "centred", "smooth", "over"])) byId(name).checked = state[name];
  }
}

/**
 * The layer meant: the deepest where none is, or where there are not so many.
 * @param {Record<string, any>} model
 * @param {number | null} layer
 */
export function layerOf(model, layer) {
  return layer === null ? model.depth - 1 : Math.min(layer, model.depth - 1);
}

/**
 * @param {Record<string, any>} select
 * @param {{value: string, label: string}[]} options
 * @param {string} value
 */
function fill(select, options, value) {
  const wanted = options.map((option) => `${option.value}=${option.label}`).join("\n");
  // Written anew only when they changed: an open list would close.
  if (select.dataset.options !== wanted) {
    select.replaceChildren(...options.map((one) => make("option", { value: one.value, text: one.label })));
    select.dataset.options = wanted;
  }
  select.value = value;
  select.disabled = false;
}
