/** The request on show: as code to copy, and as files to download. */

import { announce, byId, make, readableBytes } from "./dom.js";
import { featuresUrl } from "./query.js";
import { FORMATS, SNIPPETS } from "./snippets.js";

/** @typedef {{label: string, wanted: import("./query.js").Wanted}} Offer */

export class RequestCard {
  #tab = SNIPPETS[0].id;
  #which = 0;
  /** @type {Offer[]} */
  #offers = [];
  /** @type {import("./pictures.js").Picture | null} */
  #picture = null;

  /**
   * @param {import("./api.js").Api} api
   * @param {(dtype: string) => void} onDtype
   */
  constructor(api, onDtype) {
    this.api = api;
    this.element = byId("request");
    this.line = make("code", { class: "line" });
    this.which = make("select", { id: "which", on: { change: () => this.#choose(Number(this.which.value)) } });
    this.whichField = make("label", { class: "field inline", for: "which" }, make("span", { text: "For" }), this.which);
    this.dtype = make("select", { id: "dtype", on: { change: () => onDtype(this.dtype.value) } });
    for (const name of ["float16", "float32"]) this.dtype.append(make("option", { value: name, text: name }));
    this.tabs = SNIPPETS.map(({ id, label }) =>
      make("button", {
        type: "button", role: "tab", id: `tab-${id}`, "aria-controls": "code", text: label,
        on: { click: () => this.#open(id), keydown: (/** @type {KeyboardEvent} */ event) => this.#key(event) },
      }),
    );
    this.code = make("code");
    this.panel = make("pre", { id: "code", role: "tabpanel", tabIndex: 0 }, this.code);
    this.copy = make("button", { type: "button", class: "button copy", text: "Copy", on: { click: () => this.#copy() } });
    this.downloads = Object.keys(FORMATS).map((format) =>
      make("button", {
        type: "button", class: "button", text: `.${format}`, "aria-label": `Download as ${format}`,
        dataset: { format }, on: { click: () => this.#download(format) },
      }),
    );
    this.told = make("p", { class: "hint told", role: "status" });
    this.element.append(
      make("div", { class: "spread wrap" },
        make("h2", { id: "request-title", text: "This request" }),
        make("div", { class: "row wrap" }, this.whichField,
          make("label", { class: "field inline", for: "dtype" }, make("span", { text: "Numbers" }), this.dtype))),
      make("p", { class: "path" }, make("b", { text: "POST" }), " ", this.line),
      make("div", { class: "spread wrap" },
        make("div", { class: "tabs", role: "tablist", "aria-label": "Code" }, ...this.tabs), this.copy),
      this.panel,
      make("div", { class: "row wrap download", role: "group", "aria-label": "Download the tensors" },
        make("span", { text: "Download the tensors" }), ...this.downloads),
      this.told,
    );
  }

  /**
   * @param {import("./pictures.js").Picture} picture
   * @param {Offer[]} offers a request for each model on show
   */
  show(picture, offers) {
    this.#picture = picture;
    this.#offers = offers;
    this.#which = Math.min(this.#which, offers.length - 1);
    this.which.replaceChildren(...offers.map(({ label }, i) => make("option", { value: String(i), text: label })));
    this.whichField.hidden = offers.length < 2;
    this.element.hidden = false;
    this.#choose(this.#which);
  }

  /** @param {number} which */
  #choose(which) {
    this.#which = which;
    this.which.value = String(which);
    this.dtype.value = this.#wanted.dtype;
    this.line.textContent = featuresUrl(this.#wanted);
    this.#open(this.#tab);
  }

  get #wanted() {
    return this.#offers[this.#which].wanted;
  }

  /** @param {string} id of a tab */
  #open(id) {
    this.#tab = id;
    for (const tab of this.tabs) {
      const chosen = tab.id === `tab-${id}`;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${id}`);
    const picture = /** @type {import("./pictures.js").Picture} */ (this.#picture);
    const snippet = /** @type {(typeof SNIPPETS)[number]} */ (SNIPPETS.find((one) => one.id === id));
    this.code.textContent = snippet.write({
      origin: location.origin,
      wanted: this.#wanted,
      file: picture.name,
      type: picture.blob.type,
      isSample: Boolean(picture.sample),
      needsKey: Boolean(this.api.key),
    });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const now = SNIPPETS.findIndex(({ id }) => id === this.#tab);
    const next = (now + step + SNIPPETS.length) % SNIPPETS.length;
    this.#open(SNIPPETS[next].id);
    this.tabs[next].focus();
  }

  async #copy() {
    const text = this.code.textContent ?? "";
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without HTTPS there is no clipboard for scripts; what is selected can be copied by hand.
      getSelection()?.selectAllChildren(this.code);
      this.#tell("Selected: press Ctrl+C or ⌘C to copy.");
      return;
    }
    this.copy.textContent = "Copied";
    announce("Copied.");
    setTimeout(() => (this.copy.textContent = "Copy"), 1600);
  }

  /** @param {string} format */
  async #download(format) {
    const picture = /** @type {import("./pictures.js").Picture} */ (this.#picture);
    const { model, layer } = this.#wanted;
    const name = `${model.replaceAll(/[^\w.-]+/g, "-")}-layer_${layer}.${format}`;
    this.#tell(`Asking for ${name} …`);
    try {
      const accept = FORMATS[/** @type {keyof typeof FORMATS} */ (format)];
      const onWait = (/** @type {number} */ seconds) =>
        this.#tell(seconds ? `The server is busy; trying again in ${seconds} s` : "Trying again …");
      const response = await this.api.post(featuresUrl(this.#wanted), picture.blob, { accept, onWait });
      const blob = await response.blob();
      const url = URL.createObjectURL(blob);
      make("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
      this.#tell(`${name}, ${readableBytes(blob.size)}`);
    } catch (error) {
      const { message, advice = "" } = /** @type {Error & {advice?: string}} */ (error);
      this.#tell(`${message} ${advice}`);
    }
  }

  /** @param {string} text */
  #tell(text) {
    this.told.textContent = text;
  }
}
