/**
 * A picture with a grid of patches over it, for pointers, keys and screen readers alike.
 *
 * To assistive technology it is a grid of which one cell is drawn, the one in focus: thousands of
 * cells would be slow, and `aria-activedescendant` needs only that one.
 */

import { make } from "./dom.js";

/** @typedef {{row: number, column: number}} Place */

let count = 0;

export class PatchPanel {
  /** @type {import("./grid.js").Grid | null} */
  #grid = null;
  /** @type {Place | null} */
  #chosen = null;
  /** @type {Place | null} */
  #cursor = null;
  #keyed = false;

  /**
   * @param {object} options
   * @param {string} options.title
   * @param {(place: {u: number, v: number} | null) => void} options.onPoint a patch is pointed at
   * @param {(place: {u: number, v: number}) => void} options.onChoose
   * @param {(place: Place) => string} [options.describe] what is to be said of a patch
   */
  constructor({ title, onPoint, onChoose, describe = () => "" }) {
    this.onPoint = onPoint;
    this.onChoose = onChoose;
    this.describe = describe;
    this.canvas = make("canvas", { class: "map", "aria-hidden": "true" });
    this.picture = make("img", { class: "picture", alt: "", draggable: false });
    this.cell = make("div", { class: "cursor", role: "gridcell", id: `cell-${++count}` });
    this.mark = make("div", { class: "mark", hidden: true });
    this.title = make("span", { text: title });
    this.note = make("span", { class: "note" });
    this.frame = make(
      "div",
      { class: "frame", role: "grid", tabIndex: 0, "aria-label": `${title}: patches`, "aria-readonly": "true" },
      this.picture, this.canvas, make("div", { role: "row" }, this.cell), this.mark,
    );
    this.element = make(
      "figure", { class: "panel" },
      make("figcaption", {}, this.title, this.note), make("div", { class: "box" }, this.frame),
    );
    this.#listen();
  }

  /** @param {import("./grid.js").Grid} grid */
  setGrid(grid) {
    this.#grid = grid;
    this.setRatio(grid.source[1] / grid.source[0]);
    this.frame.setAttribute("aria-rowcount", String(grid.usedRows));
    this.frame.setAttribute("aria-colcount", String(grid.usedColumns));
    // The last patches may lie half beyond the picture: what is beyond is cut off.
    this.canvas.style.width = `${(100 * grid.usedColumns) / grid.spanColumns}%`;
    this.canvas.style.height = `${(100 * grid.usedRows) / grid.spanRows}%`;
    this.#cursor = null;
  }

  /** @param {number} ratio width by height */
  setRatio(ratio) {
    this.frame.style.setProperty("--ratio", String(ratio));
  }

  /** @param {string} url of the picture; empty for none */
  setPicture(url) {
    if (url) this.picture.src = url;
    else this.picture.removeAttribute("src");
  }

  /**
   * Shows which patch is chosen.
   * @param {number} u
   * @param {number} v
   */
  choose(u, v) {
    if (!this.#grid) return;
    this.#chosen = this.#grid.at(u, v);
    this.mark.hidden = false;
    this.#lay(this.mark, this.#chosen);
    if (!this.#cursor) this.#describeCell(this.#chosen);
  }

  /**
   * Shows which patch is pointed at, here or in another panel.
   * @param {{u: number, v: number} | null} place
   */
  point(place) {
    this.#cursor = place && this.#grid ? this.#grid.at(place.u, place.v) : null;
    this.frame.classList.toggle("pointed", Boolean(this.#cursor));
    const shown = this.#cursor ?? this.#chosen;
    if (shown) this.#describeCell(shown);
  }

  /** @param {Place} place */
  #describeCell(place) {
    this.#lay(this.cell, place);
    const chosen = this.#chosen?.row === place.row && this.#chosen?.column === place.column;
    this.cell.setAttribute("aria-rowindex", String(place.row + 1));
    this.cell.setAttribute("aria-colindex", String(place.column + 1));
    this.cell.setAttribute("aria-selected", String(chosen));
    const said = this.describe(place);
    const label = `row ${place.row + 1}, column ${place.column + 1}${said && `, ${said}`}`;
    this.cell.setAttribute("aria-label", label);
    this.frame.setAttribute("aria-activedescendant", this.cell.id);
  }

  /**
   * @param {HTMLElement} element
   * @param {Place} place
   */
  #lay(element, { row, column }) {
    const box = /** @type {import("./grid.js").Grid} */ (this.#grid).box(row, column);
    for (const [name, share] of Object.entries(box)) element.style.setProperty(name, `${100 * share}%`);
  }

  #listen() {
    const { frame } = this;
    let pressed = false;
    const placeOf = (/** @type {PointerEvent | MouseEvent} */ event) => {
      const box = frame.getBoundingClientRect();
      const inside = (/** @type {number} */ x) => Math.max(0, Math.min(1 - 1e-9, x));
      return { u: inside((event.clientX - box.left) / box.width), v: inside((event.clientY - box.top) / box.height) };
    };
    frame.addEventListener("pointerdown", (event) => {
      // A finger may be about to scroll; it chooses when it is lifted (`click`).
      if (event.pointerType === "touch" || event.button !== 0 || !this.#grid) return;
      pressed = true;
      frame.setPointerCapture(event.pointerId);
      this.onChoose(placeOf(event));
    });
    frame.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch" || !this.#grid) return;
      const place = placeOf(event);
      this.#keyed = false;
      if (pressed && this.#isNew(place)) this.onChoose(place);
      this.onPoint(place);
    });
    for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, () => (pressed = false));
    frame.addEventListener("pointerleave", () => this.onPoint(null));
    frame.addEventListener("blur", () => {
      // Only what keys pointed at goes with the focus; the pointer may be in another panel.
      if (this.#keyed) this.onPoint(null);
      this.#keyed = false;
    });
    frame.addEventListener("click", (event) => {
      if (/** @type {PointerEvent} */ (event).pointerType === "touch" && this.#grid) this.onChoose(placeOf(event));
    });
    frame.addEventListener("keydown", (event) => this.#key(event));
  }

  /** @param {{u: number, v: number}} place */
  #isNew(place) {
    const { row, column } = /** @type {import("./grid.js").Grid} */ (this.#grid).at(place.u, place.v);
    return row !== this.#chosen?.row || column !== this.#chosen?.column;
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const grid = this.#grid;
    const from = this.#cursor ?? this.#chosen;
    if (!grid || !from || event.altKey || event.metaKey) return;
    let { row, column } = from;
    const far = Math.max(1, Math.round(grid.usedRows / 4));
    if (event.key === "ArrowUp") row--;
    else if (event.key === "ArrowDown") row++;
    else if (event.key === "ArrowLeft") column--;
    else if (event.key === "ArrowRight") column++;
    else if (event.key === "PageUp") row -= far;
    else if (event.key === "PageDown") row += far;
    else if (event.key === "Home") [row, column] = [event.ctrlKey ? 0 : row, 0];
    else if (event.key === "End") [row, column] = [event.ctrlKey ? grid.usedRows - 1 : row, grid.usedColumns - 1];
    else if (event.key === "Escape") return this.onPoint(null);
    else if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    row = Math.max(0, Math.min(grid.usedRows - 1, row));
    column = Math.max(0, Math.min(grid.usedColumns - 1, column));
    const place = grid.middle(row, column);
    this.#keyed = true;
    if (event.key === "Enter" || event.key === " ") this.onChoose(place);
    this.onPoint(place);
  }
}
