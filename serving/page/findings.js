/** What the model's trained heads find on the picture: classes of pixels, objects, classes. */

import { classColour } from "./colours.js";
import { announce, byId, make, readableTime } from "./dom.js";
import { decodeMask } from "./run-lengths.js";

const LONGEST_SIDE_PX = 720;
const SHOWN_CLASSES = 6;
const FIRST_LEAST = 30;

/** @typedef {{label: string, index: number, score: number, box: number[], mask?: Lengths}} Found */
/** @typedef {{size: [number, number], counts: string}} Lengths */

export class FindingsCard {
  #model = "";
  /** @type {import("./pictures.js").Picture | null} */
  #picture = null;
  /** @type {AbortController | null} */
  #running = null;
  /** @type {(() => void)[]} what draws objects again */
  #redraw = [];

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
    this.element = byId("findings");
    this.output = make("output", { text: `${FIRST_LEAST} %` });
    this.input = make("input", {
      type: "range", id: "least", min: "0", max: "95", step: "5", value: String(FIRST_LEAST),
      on: { input: () => this.#filter() },
    });
    this.input.style.setProperty("--share", String(FIRST_LEAST / 95));
    this.controls = make(
      "div", { class: "row wrap ratio", hidden: true },
      make("label", { class: "field", for: "least" }, make("span", { class: "spread" }, "Least score", this.output), this.input),
    );
    this.told = make("p", { class: "facts" });
    this.heads = make("div", { class: "findings" });
    this.alert = make("div", { class: "notice", role: "alert", hidden: true });
    this.element.append(
      make("div", { class: "spread wrap" },
        make("div", {}, make("h2", { id: "findings-title", text: "Answers" }), this.told), this.controls),
      this.alert, this.heads,
    );
  }

  /**
   * @param {import("./pictures.js").Picture} picture
   * @param {string} model empty if none has a head
   */
  show(picture, model) {
    this.element.hidden = !model;
    if (picture === this.#picture && model === this.#model) return;
    this.#picture = picture;
    this.#model = model;
    this.#running?.abort();
    if (model) this.#ask();
  }

  get #least() {
    return Number(this.input.value) / 100;
  }

  #filter() {
    this.output.textContent = `${this.input.value} %`;
    this.input.style.setProperty("--share", String(Number(this.input.value) / 95));
    for (const draw of this.#redraw) draw();
  }

  async #ask() {
    const running = new AbortController();
    this.#running = running;
    this.element.setAttribute("aria-busy", "true");
    const began = performance.now();
    const { blob } = /** @type {import("./pictures.js").Picture} */ (this.#picture);
    try {
      const query = new URLSearchParams({ model: this.#model });
      const response = await this.api.post(`/v1/predict?${query}`, blob, {
        accept: "application/json",
        signal: running.signal,
        onWait: (seconds) => {
          if (seconds) this.told.textContent = `The server is busy; trying again in ${seconds} s`;
        },
      });
      const answer = await response.json();
      // A format that the browser does not know is drawn on grey.
      const bitmap = await createImageBitmap(blob).catch(() => null);
      if (running.signal.aborted) return;
      this.#draw(answer, bitmap, performance.now() - began);
    } catch (error) {
      if (running.signal.aborted) return;
      const { message, advice = "" } = /** @type {Error & {advice?: string}} */ (error);
      this.alert.replaceChildren(make("p", { text: `${message} ${advice}` }));
      this.alert.hidden = false;
      this.heads.replaceChildren();
    }
    this.element.setAttribute("aria-busy", "false");
  }

  /**
   * @param {Record<string, any>} answer
   * @param {ImageBitmap | null} bitmap
   * @param {number} ms
   */
  #draw(answer, bitmap, ms) {
    this.alert.hidden = true;
    this.#redraw = [];
    const [row] = answer.data;
    const [height, width] = row.source_size;
    const names = Object.keys(row.heads);
    this.controls.hidden = !names.some((name) => row.heads[name].task === "detection");
    this.heads.replaceChildren(
      ...names.map((name) => {
        const found = row.heads[name];
        const about = make("figcaption", {}, make("strong", { text: name }), ` ${found.task}`);
        if (found.task === "classification") return make("figure", {}, about, scores(found));
        const canvas = make("canvas", { role: "img" });
        const scale = Math.min(1, LONGEST_SIDE_PX / Math.max(height, width));
        canvas.width = Math.max(1, Math.round(width * scale));
        canvas.height = Math.max(1, Math.round(height * scale));
        const legend = make("ul", { class: "classes" });
        if (found.task === "segmentation") paintRegions(canvas, bitmap, found.regions, legend);
        else this.#redraw.push(() => paintObjects(canvas, bitmap, found.objects, width, this.#least, legend));
        canvas.setAttribute("aria-label", `${name} on the picture`);
        return make("figure", {}, about, canvas, legend);
      }),
    );
    for (const draw of this.#redraw) draw();
    this.told.textContent = `${this.#model}: ${names.join(", ")}, ${readableTime(ms)}`;
    announce(`${names.length} ${names.length === 1 ? "head" : "heads"} answered.`);
  }
}

/**
 * @param {HTMLCanvasElement & Record<string, any>} canvas
 * @param {ImageBitmap | null} bitmap
 * @returns {CanvasRenderingContext2D}
 */
function background(canvas, bitmap) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.fillStyle = "#888";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (bitmap) context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return context;
}

/**
 * @param {HTMLCanvasElement & Record<string, any>} canvas
 * @param {ImageBitmap | null} bitmap
 * @param {{label: string, index: number, share: number, mask: Lengths}[]} regions
 * @param {HTMLElement} legend
 */
function paintRegions(canvas, bitmap, regions, legend) {
  const context = background(canvas, bitmap);
  for (const { index, mask } of regions) blend(context, mask, classColour(index), 0.55);
  legend.replaceChildren(
    ...regions.map(({ label, index, share }) => entry(label, index, `${(100 * share).toFixed(1)} %`)),
  );
}

/**
 * @param {HTMLCanvasElement & Record<string, any>} canvas
 * @param {ImageBitmap | null} bitmap
 * @param {Found[]} objects
 * @param {number} width of the picture
 * @param {number} least score
 * @param {HTMLElement} legend
 */
function paintObjects(canvas, bitmap, objects, width, least, legend) {
  const context = background(canvas, bitmap);
  const shown = objects.filter(({ score }) => score >= least);
  const scale = canvas.width / width;
  for (const { index, mask } of shown) if (mask) blend(context, mask, classColour(index), 0.45);
  context.lineWidth = 2;
  for (const { index, box } of shown) {
    const [left, top, right, bottom] = box.map((side) => side * scale);
    context.strokeStyle = `rgb(${classColour(index).join(" ")})`;
    context.strokeRect(left, top, right - left, bottom - top);
  }
  /** @type {Map<number, Found[]>} */
  const byClass = new Map();
  for (const one of shown) byClass.set(one.index, [...(byClass.get(one.index) ?? []), one]);
  const lines = [...byClass.entries()].map(([index, found]) =>
    entry(found[0].label, index, `${found.length}, best ${found[0].score.toFixed(2)}`),
  );
  const none = objects.length ? `none of ${objects.length} reaches this score` : "nothing found";
  legend.replaceChildren(...(lines.length ? lines : [make("li", { class: "hint", text: none })]));
}

/**
 * Lays a colour over the pixels of a mask.
 * @param {CanvasRenderingContext2D} context
 * @param {Lengths} lengths
 * @param {[number, number, number]} colour
 * @param {number} share of the colour
 */
function blend(context, lengths, colour, share) {
  const [height, width] = lengths.size;
  const mask = decodeMask(lengths.counts, lengths.size);
  const { canvas } = context;
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    const row = Math.min(height - 1, Math.floor(((y + 0.5) * height) / canvas.height));
    for (let x = 0; x < canvas.width; x++) {
      const column = Math.min(width - 1, Math.floor(((x + 0.5) * width) / canvas.width));
      if (!mask[column * height + row]) continue;
      const at = 4 * (y * canvas.width + x);
      for (let c = 0; c < 3; c++) pixels.data[at + c] += share * (colour[c] - pixels.data[at + c]);
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** @param {{scores: {label: string, index: number, score: number}[]}} found */
function scores({ scores: all }) {
  const most = Math.max(...all.map(({ score }) => Math.abs(score)), 1e-9);
  return make(
    "ul", { class: "classes bars" },
    ...all.slice(0, SHOWN_CLASSES).map(({ label, index, score }) => {
      const line = entry(label, index, score.toFixed(3));
      line.style.setProperty("--share", String(Math.max(0, score) / most));
      return line;
    }),
  );
}

/**
 * @param {string} label
 * @param {number} index
 * @param {string} told
 */
function entry(label, index, told) {
  const line = make("li", {}, make("i", {}), make("span", { text: label }), make("b", { text: told }));
  line.style.setProperty("--class", `rgb(${classColour(index).join(" ")})`);
  return line;
}
