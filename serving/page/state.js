/**
 * What is shown. It lives in the URL's fragment, so that a link shows the same again; the picture
 * and the key stay out of it.
 *
 * @typedef {object} State
 * @property {string} model empty until the list is there
 * @property {number | null} layer null for the deepest
 * @property {string} other the model beside it; empty for none
 * @property {number | null} otherLayer
 * @property {boolean} norm
 * @property {string} size
 * @property {string} dtype
 * @property {[number, number]} at chosen place, fractions of the picture
 * @property {boolean} centred compare patches less the picture's mean patch
 * @property {boolean} smooth
 * @property {boolean} over
 */

/** @type {Readonly<State>} */
const DEFAULTS = Object.freeze({
  model: "",
  layer: null,
  other: "",
  otherLayer: null,
  norm: true,
  size: "",
  dtype: "float16",
  at: /** @type {[number, number]} */ ([0.5, 0.5]),
  centred: false,
  smooth: false,
  over: false,
});

const DTYPES = ["float16", "float32"];
const SIZE = /^(\d{1,5}(,\d{1,5})?|keep(:\d{1,5}(,\d{1,5})?)?|native|)$/;

/**
 * @param {string} hash
 * @returns {State}
 */
export function parseHash(hash) {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const number = (/** @type {string} */ name) => {
    const text = query.get(name) ?? "";
    return /^\d{1,4}$/.test(text) ? Number(text) : null;
  };
  const flag = (/** @type {"norm" | "centred" | "smooth" | "over"} */ name) =>
    query.has(name) ? query.get(name) === "true" : DEFAULTS[name];
  const at = (query.get("at") ?? "").split(",").map(Number);
  const size = query.get("size") ?? "";
  const dtype = query.get("dtype") ?? "";
  return {
    model: query.get("model") ?? "",
    layer: number("layer"),
    other: query.get("with") ?? "",
    otherLayer: number("with_layer"),
    norm: flag("norm"),
    size: SIZE.test(size) ? size : DEFAULTS.size,
    dtype: DTYPES.includes(dtype) ? dtype : DEFAULTS.dtype,
    at: at.length === 2 && at.every((x) => x >= 0 && x <= 1) ? [at[0], at[1]] : DEFAULTS.at,
    centred: flag("centred"),
    smooth: flag("smooth"),
    over: flag("over"),
  };
}

/**
 * @param {State} state
 * @returns {string} only what differs from the defaults
 */
export function formatHash(state) {
  const query = new URLSearchParams();
  const put = (/** @type {string} */ name, /** @type {any} */ value, /** @type {any} */ usual) => {
    if (value !== usual && value !== null && value !== "") query.set(name, String(value));
  };
  put("model", state.model, "");
  put("layer", state.layer, null);
  put("with", state.other, "");
  put("with_layer", state.other ? state.otherLayer : null, null);
  for (const name of /** @type {const} */ (["norm", "size", "dtype", "centred", "smooth", "over"])) {
    put(name, state[name], DEFAULTS[name]);
  }
  put("at", state.at.map((x) => x.toFixed(3)).join(","), DEFAULTS.at.map((x) => x.toFixed(3)).join(","));
  return query.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
}

export class Store {
  /** @param {(changed: Set<string>) => void} onChange told what changed, once it has */
  constructor(onChange) {
    this.state = parseHash(location.hash);
    this.onChange = onChange;
    addEventListener("hashchange", () => this.#become(parseHash(location.hash)));
  }

  /** @param {Partial<State>} changes */
  set(changes) {
    this.#become({ ...this.state, ...changes });
    const hash = formatHash(this.state);
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  /** @param {State} next */
  #become(next) {
    const names = /** @type {(keyof State)[]} */ (Object.keys(next));
    const changed = new Set(names.filter((name) => String(next[name]) !== String(this.state[name])));
    if (changed.size === 0) return;
    this.state = next;
    this.onChange(/** @type {Set<string>} */ (changed));
  }
}
