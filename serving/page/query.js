/** What is asked for, as a query: one place, so that the page and the code it shows agree. */

/**
 * @typedef {object} Wanted
 * @property {string} model
 * @property {number} layer
 * @property {boolean} norm
 * @property {string} size empty for the size the model was trained at
 * @property {string} dtype
 */

/**
 * @param {Wanted} wanted
 * @returns {Record<string, string>} the parameters that differ from the endpoint's defaults, but
 *   for the model and the layer, which are always there
 */
export function parameters({ model, layer, norm, size, dtype }) {
  return {
    model,
    layers: String(layer),
    ...(norm ? {} : { norm: "false" }),
    ...(size && { size }),
    ...(dtype !== "float32" && { dtype }),
  };
}

/**
 * @param {Wanted} wanted
 * @returns {string} path and query; commas and colons stay readable
 */
export function featuresUrl(wanted) {
  const query = new URLSearchParams(parameters(wanted)).toString();
  return `/v1/features?${query.replaceAll("%2C", ",").replaceAll("%3A", ":")}`;
}

/**
 * The input sizes worth offering for some models together.
 * @param {Record<string, any>[]} models
 * @returns {{value: string, label: string}[]}
 */
export function sizeChoices(models) {
  const trained = models.map((model) => model.image_size);
  const strides = models.map((model) => model.patch_size);
  const most = Math.min(...models.map((model) => model.max_input_pixels ?? Infinity));
  const own = new Set(trained.map((size) => size.join(" × ")));
  const base = Math.max(...trained.map((size) => Math.max(...size)));
  const sides = new Set([224, 448, 672, 896].concat([1, 1.5, 2, 3, 4, 6].map((times) => base * times)));
  const possible = [...sides]
    .filter((side) => strides.every((stride) => side % stride === 0))
    .filter((side) => side >= Math.min(base, 224) && side * side <= most)
    .sort((a, b) => a - b);
  return [
    { value: "", label: own.size === 1 ? `${[...own][0]}, as trained` : "as trained, each its own" },
    ...possible.map((side) => ({ value: String(side), label: `${side} × ${side}` })),
    { value: "keep", label: "as trained, aspect kept" },
    ...possible.filter((side) => side > base).map((side) => ({ value: `keep:${side}`, label: `${side}, aspect kept` })),
    { value: "native", label: "the picture's own" },
  ];
}
