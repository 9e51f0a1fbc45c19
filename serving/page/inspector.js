/** The chosen patch, enlarged, and the patches elsewhere that are most like it. */

import { byId, make } from "./dom.js";
import { mostSimilar } from "./features.js";

const SHOWN = 4;
const SIDE_PX = 180;
/** How much is shown, in patches: one alone says little. */
const AROUND = 3;

/**
 * A patch with what is around it, the patch itself framed.
 * @param {HTMLCanvasElement} canvas
 * @param {HTMLImageElement} image
 * @param {{left: number, top: number, width: number, height: number}} box shares of the picture
 */
function crop(canvas, image, box) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.clearRect(0, 0, canvas.width, canvas.height);
  const { naturalWidth: width, naturalHeight: height } = image;
  if (!image.complete || !width) return; // a format that the browser does not show
  context.imageSmoothingQuality = "high";
  const [across, down] = [box.width * width, box.height * height];
  const margin = (AROUND - 1) / 2;
  context.drawImage(
    image, box.left * width - margin * across, box.top * height - margin * down, AROUND * across, AROUND * down,
    0, 0, canvas.width, canvas.height,
  );
  const side = canvas.width / AROUND;
  for (const [colour, line] of [["rgb(12 8 20 / 80%)", 6], ["#fff", 3]]) {
    context.strokeStyle = String(colour);
    context.lineWidth = Number(line);
    context.strokeRect(margin * side, margin * side, side, side);
  }
}

export class Inspector {
  /** @param {(place: {u: number, v: number}) => void} onChoose */
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.element = byId("inspector");
    this.shown = SHOWN;
  }

  /**
   * @param {HTMLImageElement} image
   * @param {[number, number]} at
   * @param {import("./model-view.js").ModelView[]} views
   */
  show(image, at, views) {
    const ready = views.filter((view) => view.map && view.values);
    this.element.hidden = ready.length === 0;
    if (ready.length === 0) return;
    // One model leaves room for twice as many.
    this.shown = ready.length === 1 ? 2 * SHOWN : SHOWN;
    const { grid } = /** @type {import("./features.js").FeatureMap} */ (ready[0].map);
    const { row, column } = grid.at(...at);
    crop(/** @type {any} */ (byId("patch")), image, grid.box(row, column));
    byId("patch-name").textContent = `row ${row + 1}, column ${column + 1}`;
    byId("nearest").replaceChildren(...ready.map((view) => this.#row(view, image, at)));
  }

  /**
   * @param {import("./model-view.js").ModelView} view
   * @param {HTMLImageElement} image
   * @param {[number, number]} at
   */
  #row(view, image, at) {
    const { grid } = /** @type {import("./features.js").FeatureMap} */ (view.map);
    const found = mostSimilar(/** @type {Float32Array} */ (view.values), grid, grid.at(...at), this.shown);
    const buttons = found.map(({ row, column, value }) => {
      const canvas = make("canvas", { width: SIDE_PX, height: SIDE_PX, "aria-hidden": "true" });
      crop(canvas, image, grid.box(row, column));
      return make(
        "button",
        {
          type: "button",
          class: "near",
          "aria-label": `Choose row ${row + 1}, column ${column + 1}, similarity ${value.toFixed(view.legend.digits)}`,
          on: { click: () => this.onChoose(grid.middle(row, column)) },
        },
        canvas, make("span", { text: value.toFixed(view.legend.digits) }),
      );
    });
    return make(
      "div", { class: "nearest", role: "group", "aria-label": `Most similar patches, ${view.element.ariaLabel}` },
      make("h3", {}, "Most like it elsewhere", make("span", { class: "tag", text: view.element.ariaLabel ?? "" })),
      make("div", { class: "row" }, ...buttons),
    );
  }
}
