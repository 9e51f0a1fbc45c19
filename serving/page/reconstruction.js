/** Hides a part of the picture and shows what the model makes of the rest. */

import { announce, byId, debounced, make, readableTime } from "./dom.js";

/** Which members of the answer are shown, and what they are called. */
const SHOWN = [
  ["masked", "What the model is given"],
  ["reconstruction", "Its reconstruction"],
  ["raw", "Its prediction alone"],
];

export class ReconstructionCard {
  #seed = 0;
  /** @type {number | null} null for the model's own */
  #ratio = null;
  #model = "";
  /** @type {import("./pictures.js").Picture | null} */
  #picture = null;
  /** @type {AbortController | null} */
  #running = null;

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
    this.element = byId("reconstruction");
    const ask = debounced(() => this.#ask(), 140);
    this.output = make("output");
    this.input = make("input", {
      type: "range", id: "ratio", min: "5", max: "95", step: "5",
      on: {
        input: () => {
          this.#setRatio(Number(this.input.value) / 100);
          ask();
        },
      },
    });
    this.controls = make(
      "div", { class: "row wrap ratio" },
      make("label", { class: "field", for: "ratio" }, make("span", { class: "spread" }, "Hidden", this.output), this.input),
      make("button", { type: "button", class: "button", text: "Another mask", on: { click: () => this.#again() } }),
    );
    this.title = make("h2", { id: "reconstruction-title", text: "Reconstruction" });
    this.told = make("p", { class: "facts" });
    this.images = make("div", { class: "reconstructed" });
    this.alert = make("div", { class: "notice", role: "alert", hidden: true });
    this.element.append(
      make("div", { class: "spread wrap" }, make("div", {}, this.title, this.told), this.controls),
      this.alert, this.images,
    );
  }

  /**
   * @param {import("./pictures.js").Picture} picture
   * @param {string} model empty if none can reconstruct
   */
  show(picture, model) {
    this.element.hidden = !model;
    if (picture === this.#picture && model === this.#model) return;
    if (model !== this.#model) this.#ratio = null;
    this.#picture = picture;
    this.#model = model;
    this.#running?.abort();
    if (model) this.#ask();
  }

  #again() {
    this.#seed++;
    this.#ask();
  }

  /** @param {number} ratio */
  #setRatio(ratio) {
    this.#ratio = ratio;
    this.input.value = String(Math.round(100 * ratio));
    this.input.style.setProperty("--share", String((100 * ratio - 5) / 90));
    this.output.textContent = `${Math.round(100 * ratio)} %`;
  }

  async #ask() {
    this.#running?.abort();
    const running = new AbortController();
    this.#running = running;
    const query = new URLSearchParams({ model: this.#model, seed: String(this.#seed) });
    if (this.#ratio !== null) query.set("mask_ratio", String(this.#ratio));
    this.element.setAttribute("aria-busy", "true");
    const began = performance.now();
    try {
      const picture = /** @type {import("./pictures.js").Picture} */ (this.#picture);
      const response = await this.api.post(`/v1/reconstruct?${query}`, picture.blob, {
        accept: "application/json",
        signal: running.signal,
        onWait: (seconds) => {
          if (seconds) this.told.textContent = `The server is busy; trying again in ${seconds} s`;
        },
      });
      const answer = await response.json();
      if (!running.signal.aborted) this.#draw(answer, performance.now() - began);
    } catch (error) {
      if (running.signal.aborted) return;
      const { message, advice = "" } = /** @type {Error & {advice?: string}} */ (error);
      this.alert.replaceChildren(make("p", { text: `${message} ${advice}` }));
      this.alert.hidden = false;
    }
    this.element.setAttribute("aria-busy", "false");
  }

  /**
   * @param {Record<string, any>} answer
   * @param {number} ms
   */
  #draw(answer, ms) {
    this.alert.hidden = true;
    const hides = answer.mask_ratio !== null;
    this.controls.hidden = !hides;
    if (hides && this.#ratio === null) this.#setRatio(answer.mask_ratio);
    const shown = SHOWN.filter(([member]) => answer[member]);
    // Pictures that are there already are changed in place, so that nothing flickers.
    if (this.images.children.length !== shown.length) {
      this.images.replaceChildren(
        ...shown.map(([, caption]) =>
          make("figure", {}, make("figcaption", { text: caption }), make("img", { alt: caption })),
        ),
      );
    }
    [...this.images.querySelectorAll("img")].forEach((image, i) => {
      image.src = answer[shown[i][0]];
    });
    const [rows, columns] = answer.grid;
    const hidden = hides ? answer.mask.reduce((/** @type {number} */ a, /** @type {number} */ b) => a + b, 0) : 0;
    const words = hides ? `${hidden} of ${rows * columns} patches hidden` : "nothing is hidden";
    this.told.textContent = `${this.#model}: ${words}, ${readableTime(ms)}`;
    announce(`Reconstruction: ${words}.`);
  }
}
