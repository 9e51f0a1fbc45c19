/** The features of one layer of one picture, and what the page computes from them. */

import { Grid } from "./grid.js";
import { principalComponents, spread } from "./pca.js";
import { readSafetensors } from "./safetensors.js";

export class FeatureMap {
  /** @type {{components: Float32Array[], explained: number} | null} */
  #components = null;
  /** @type {Record<string, {data: Float32Array, norms: Float32Array}>} */
  #measured = {};

  /**
   * @param {Float32Array} data [D, rows * columns]
   * @param {number} width D
   * @param {Grid} grid
   * @param {Record<string, any>} metadata of the answer
   */
  constructor(data, width, grid, metadata) {
    this.data = data;
    this.width = width;
    this.grid = grid;
    this.metadata = metadata;
    this.used = grid.used;
  }

  /**
   * @param {ArrayBuffer} file safetensors with one `layer_…` of one picture
   */
  static read(file) {
    const { tensors, metadata } = readSafetensors(file);
    const described = JSON.parse(metadata.mimray);
    const name = Object.keys(tensors).find((key) => key.startsWith("layer_"));
    if (!name) throw new Error("the answer holds no layer");
    const { shape, data } = tensors[name];
    const [, width, rows, columns] = shape;
    return new FeatureMap(data, width, new Grid(rows, columns, described.pictures[0]), described);
  }

  /** Three principal components, spread over 0 to 1, and how much of the variance they hold. */
  get components() {
    if (!this.#components) {
      const { projections, explained } = principalComponents(this.data, this.width, this.used);
      this.#components = { components: projections.map((values) => spread(values, this.used)), explained };
    }
    return this.#components;
  }

  /**
   * Cosine similarity of one patch to all.
   * @param {number} row
   * @param {number} column
   * @param {boolean} centred take the picture's mean patch off first
   * @returns {Float32Array} [N]
   */
  similarity(row, column, centred) {
    const count = this.data.length / this.width;
    const chosen = row * this.grid.columns + column;
    const { data, norms } = this.#measure(centred);
    const out = new Float32Array(count);
    for (let d = 0; d < this.width; d++) {
      const start = d * count;
      const weight = data[start + chosen];
      for (let i = 0; i < count; i++) out[i] += weight * data[start + i];
    }
    for (let i = 0; i < count; i++) {
      const length = norms[i] * norms[chosen];
      out[i] = length > 0 ? out[i] / length : 0;
    }
    return out;
  }

  /**
   * Features to compare, with their lengths.
   * @param {boolean} centred
   */
  #measure(centred) {
    const key = String(centred);
    const known = this.#measured[key];
    if (known) return known;
    const count = this.data.length / this.width;
    const data = centred ? new Float32Array(this.data) : this.data;
    const squares = new Float32Array(count);
    for (let d = 0; d < this.width; d++) {
      const start = d * count;
      if (centred) {
        let sum = 0;
        for (const i of this.used) sum += data[start + i];
        for (let i = 0; i < count; i++) data[start + i] -= sum / this.used.length;
      }
      for (let i = 0; i < count; i++) squares[i] += data[start + i] ** 2;
    }
    this.#measured[key] = { data, norms: squares.map(Math.sqrt) };
    return this.#measured[key];
  }
}

/**
 * The scale for similarities: up to 1, from where all but a few odd ones lie.
 * @param {Float32Array} values
 * @param {Int32Array} used
 */
export function heatRange(values, used) {
  const sorted = Float32Array.from(used, (i) => values[i]).sort();
  return { low: sorted[Math.floor(0.01 * (sorted.length - 1))], high: 1 };
}

/**
 * The most similar patches that are not next to the chosen one or to each other.
 * @param {Float32Array} values similarities
 * @param {Grid} grid
 * @param {{row: number, column: number}} chosen
 * @param {number} count
 */
export function mostSimilar(values, grid, chosen, count) {
  const apart = Math.max(1, Math.round(Math.min(grid.usedRows, grid.usedColumns) / 12));
  const taken = [chosen];
  const order = Array.from(grid.used).sort((a, b) => values[b] - values[a]);
  for (const index of order) {
    if (taken.length > count) break;
    const row = Math.floor(index / grid.columns);
    const column = index % grid.columns;
    const near = taken.some((t) => Math.max(Math.abs(t.row - row), Math.abs(t.column - column)) <= apart);
    if (!near) taken.push({ row, column });
  }
  return taken.slice(1).map((place) => ({ ...place, value: values[place.row * grid.columns + place.column] }));
}
